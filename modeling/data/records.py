"""Rows of text files: JSON, JSON lines, CSV and TSV, with errors that name the line.

CSV holds strings only; the reader of a column decides what they mean.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular


def read_records(file: Path) -> Iterator[Mapping[str, Any]]:
    """Read the rows of a file in order, as column to value.

    Raises:
        BadInput: the file cannot be read; names the line.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv_records(file, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".jsonl":
            yield from _jsonl_records(file)
        else:
            yield from _json_records(file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text", found=error) from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read", found=error) from error


def _jsonl_records(file: Path) -> Iterator[Mapping[str, Any]]:
    with TextIOWrapper(open_regular(file), encoding="utf-8") as stream:
        # Not enumerate over splitlines: texts may contain other line separators.
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{file} line {number} is not valid JSON", found=error) from error
            if not isinstance(record, dict):
                raise BadInput(
                    f"{file} line {number} is not a row",
                    expected="a JSON object {column: value}",
                    found=type(record).__name__,
                )
            yield record


def _json_records(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with open_regular(file) as stream:
            content = json.loads(stream.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        try:  # .json files often hold one object per line
            return _jsonl_records(file)
        except BadInput:
            raise BadInput(f"{file} is not valid JSON", found=error) from error
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise BadInput(
            f"{file} does not hold rows", expected="a JSON list of objects {column: value}"
        )
    return iter(content)


def _csv_records(file: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    with TextIOWrapper(open_regular(file), "utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise BadInput(
                        f"{file} line {reader.line_num} has too many or too few fields",
                        expected=f"{len(reader.fieldnames or ())} fields, as in the first line",
                    )
                yield record
        except csv.Error as error:
            raise BadInput(
                f"{file} line {reader.line_num} is not valid CSV", found=error
            ) from error
