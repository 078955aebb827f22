"""Rows of text files: JSON, JSON lines, CSV and TSV, with errors that name the line.

CSV holds strings only; the reader of a column decides what they mean.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.modeling.data.csv_files import CsvFormat, csv_records
from restitch.modeling.data.file_kinds import shortened, table_kind
from restitch.modeling.data.text_files import read_text, text_lines

Records = tuple[Iterable[Mapping[str, Any]], list[str]]


def read_records(file: Path, form: CsvFormat | None = None) -> Records:
    """Read the rows of a file in order, as column to value, and notes about what is skipped.

    Args:
        file: a text table; it may be packed.
        form: what is known about CSV files.

    Raises:
        BadInput: the file cannot be read; names the line.
    """
    kind = table_kind(file.name)
    if kind in (".csv", ".tsv"):
        return csv_records(file, form or CsvFormat())
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(file)
    return _json_document(file)


def _json_lines(file: Path) -> Records:
    records: list[Mapping[str, Any]] = []
    empty = skipped = 0
    for number, line in text_lines(file):
        if not line.strip():
            empty += 1
            continue
        skipped += empty
        empty = 0
        record = _parsed(f"{file} line {number}", line)
        if not isinstance(record, dict):
            raise BadInput(
                f"{file} line {number} is not a row",
                expected="a JSON object {column: value}",
                found=type(record).__name__,
                hint="name a file with one JSON list .json" if isinstance(record, list) else None,
            )
        records.append(record)
    plural = "s" if skipped > 1 else ""
    notes = [f"{file.name}: {skipped} empty line{plural} between rows skipped"] if skipped else []
    return records, notes


def _json_document(file: Path) -> Records:
    text = read_text(file)
    try:
        content = _parsed(str(file), text)
    except BadInput:
        # .json files often hold one object per line.
        if _is_object(text.lstrip().partition("\n")[0]):
            return _json_lines(file)
        raise
    return _rows_of(file, content)


def _rows_of(file: Path, content: Any) -> Records:
    """The rows of a document: a list of objects, such a list under one key, or columns."""
    notes: list[str] = []
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if _are_objects(value)]
        if len(lists) > 1:
            raise BadInput(
                f"{file} holds several lists of rows",
                found=f"under {shortened(lists)}",
                hint="save each split as a file of its own",
            )
        if lists:
            notes = [f"{file.name}: the rows are those under {lists[0]!r}"]
            content = content[lists[0]]
        elif content and all(isinstance(value, list) for value in content.values()):
            content = _from_columns(file, content)
        elif any(isinstance(value, dict) for value in content.values()):
            raise BadInput(
                f"{file} does not hold rows",
                expected="a JSON list of objects {column: value}",
                found=f"objects under {shortened(list(content))}",
                hint="with pandas, write orient='records'",
            )
        else:
            content = [content]
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise BadInput(
            f"{file} does not hold rows", expected="a JSON list of objects {column: value}"
        )
    return content, notes


def _from_columns(file: Path, columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise BadInput(
            f"{file} has columns of different lengths",
            found=", ".join(f"{name} {len(values)}" for name, values in columns.items()),
        )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid JSON", found=error) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {twice[0]!r} occurs twice in an object")
    return record
