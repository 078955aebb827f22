"""Rows of CSV and TSV files; all values are strings.

CSV has quotes, as in RFC 4180. TSV has none, unless the whole file is written with quotes: then
every field with a quote in it is one that a writer of CSV makes. A file that can be read in two
ways that give other rows is refused, and `quotes:` under `data` decides.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from restitch.merging.errors import BadInput
from restitch.modeling.data.file_kinds import printable, table_kind
from restitch.modeling.data.text_files import read_text

Record = Mapping[str, str]
_OTHER_DELIMITERS = ",;\t|"
_DECIDE = "set quotes: true or quotes: false under data"


@dataclass(frozen=True)
class CsvFormat:
    """What the task says about its CSV and TSV files.

    Attributes:
        delimiter: between two fields; None is a comma in CSV and a tab in TSV.
        quotes: whether fields are quoted; None decides as this module describes.
    """

    delimiter: str | None = None
    quotes: bool | None = None


@dataclass(frozen=True)
class _Row:
    first: int  # the numbers of its lines
    last: int
    fields: list[str]


def csv_records(file: Path, form: CsvFormat) -> tuple[list[Record], list[str]]:
    """Read the rows of a CSV or TSV file as column to value, and notes about skipped lines.

    Raises:
        BadInput: the file cannot be read, or has two readings; names the line.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses fields of more than 131,072 characters
    text = read_text(file)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise BadInput(f"{file} line {line} has a NUL character", hint="remove it")
    tsv = table_kind(file.name) == ".tsv"
    delimiter = form.delimiter or ("\t" if tsv else ",")
    lines = list(io.StringIO(text, newline=""))
    if form.quotes is False or '"' not in text:
        rows = _checked(file, _parse(file, lines, delimiter, csv.QUOTE_NONE), delimiter)
    elif form.quotes or not tsv:
        rows = _checked(file, _parse(file, lines, delimiter, csv.QUOTE_MINIMAL), delimiter)
    else:
        rows = _tsv_rows(file, lines, delimiter)
    _check_ends(file, lines, rows)
    if form.quotes is None:
        _check_joined(file, lines, delimiter, rows)
    header, notes = rows[0].fields if rows else [], _empty_lines(file, rows)
    return [dict(zip(header, row.fields, strict=True)) for row in rows[1:]], notes


def _parse(file: Path, lines: Sequence[str], delimiter: str, quoting: int) -> list[_Row]:
    """All rows that are not empty."""
    # mypy knows the constants of `csv` as literals only.
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    rows = []
    first = 1
    try:
        for fields in reader:
            if fields:
                rows.append(_Row(first, reader.line_num, fields))
            first = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(
            f"{file} line {first} is not valid CSV",
            found=error,
            hint="close and double the quotes, or set quotes: false under data",
        ) from error
    return rows


def _checked(file: Path, rows: list[_Row], delimiter: str) -> list[_Row]:
    """The rows, if all of them have the columns of the first one."""
    if not rows:
        return rows
    header = rows[0].fields
    _check_header(file, header, delimiter)
    for row in rows[1:]:
        if len(row.fields) != len(header):
            raise BadInput(
                f"{file} line {row.first} has too many or too few fields",
                expected=f"{len(header)} fields, as in the first line",
                found=f"{len(row.fields)} fields",
                hint="repair the line; quote a field that holds the delimiter",
            )
        if len(header) == 1 and not row.fields[0].strip() and row.fields[0]:
            raise BadInput(
                f"{file} line {row.first} has blanks only: it can be a row or none",
                hint="remove the line, or quote its blanks in a file with two columns",
            )
    return rows


def _check_header(file: Path, header: Sequence[str], delimiter: str) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise BadInput(
            f"{file} has several columns of one name",
            found=", ".join(map(repr, twice)),
            hint="rename all but one of them",
        )
    others = [one for one in _OTHER_DELIMITERS if one != delimiter and one in header[0]]
    if len(header) == 1 and others:
        raise BadInput(
            f"{file} has one column, named {header[0][:60]!r}",
            expected=f"columns that {delimiter!r} separates",
            hint=f"set delimiter: {others[0]!r} under data",
        )


def _tsv_rows(file: Path, lines: Sequence[str], delimiter: str) -> list[_Row]:
    """The rows of a TSV file with quotes in it."""
    plain = _parse(file, lines, delimiter, csv.QUOTE_NONE)
    try:
        _checked(file, plain, delimiter)
    except BadInput:
        # As lines without quotes it makes no sense; perhaps a field holds a tab or a line break.
        try:
            quoted = _parse(file, lines, delimiter, csv.QUOTE_MINIMAL)
            return _checked(file, quoted, delimiter)
        except BadInput:
            pass
        raise
    if _is_quoted([row.fields for row in plain]):
        return _parse(file, lines, delimiter, csv.QUOTE_MINIMAL)
    return plain


def _is_quoted(rows: Sequence[Sequence[str]]) -> bool:
    """True if a writer that quotes made these lines: all fields, or those that need it."""
    everything = all(_inside(field) is not None for field in rows[0])
    for field in (field for row in rows for field in row if '"' in field):
        inside = _inside(field)
        needed = inside is not None and (not inside or '"' in inside)
        if inside is None or not (everything or needed):
            return False
    return True


def _inside(field: str) -> str | None:
    """The text in a quoted field, where quotes are doubled; None if it is not quoted so."""
    if len(field) < 2 or not (field[0] == field[-1] == '"'):
        return None
    inside = field[1:-1]
    return None if '"' in inside.replace('""', "") else inside


def _check_ends(file: Path, lines: Sequence[str], rows: Sequence[_Row]) -> None:
    """Refuse a carriage return alone where other lines end with a newline: it may be in a text."""
    inside = {number for row in rows for number in range(row.first, row.last)}
    ends = {number: line for number, line in enumerate(lines, 1) if number not in inside}
    returns = [number for number, line in ends.items() if line.endswith("\r")]
    if returns and any(line.endswith("\n") for line in ends.values()):
        raise BadInput(
            f"{file} line {returns[0]} ends with a carriage return, and other lines with a newline",
            expected="one kind of line end, and quotes around a text with another",
            hint="remove the carriage return, or quote the text",
        )


def _check_joined(file: Path, lines: Sequence[str], delimiter: str, rows: Sequence[_Row]) -> None:
    """Refuse quotes that may join rows: each line of a quoted field looks like a row, too.

    A line looks like a row if it has all fields, and one of its values is usual in its column.
    """
    joined = [row for row in rows[1:] if row.last > row.first]
    if not joined:
        return
    width = len(rows[0].fields)
    single = [row.fields for row in rows[1:] if row.last == row.first]
    usual = [{fields[column] for fields in single} for column in range(width)]
    for row in joined:
        parts = [
            part.fields
            for part in _parse(file, lines[row.first - 1 : row.last], delimiter, csv.QUOTE_NONE)
        ]
        if len(parts) < 2 or any(len(fields) != width for fields in parts):
            continue
        columns = ([fields[column] for fields in parts] for column in range(width))
        if any(_are_usual(values, usual[c]) for c, values in enumerate(columns)):
            raise BadInput(
                f"{file} lines {row.first} to {row.last} can be read in two ways",
                expected="quotes that do not span lines which look like rows",
                found=f"one row with {len(parts)} lines in quotes, or {len(parts)} rows with "
                f"quotes in their texts: {printable(lines[row.first - 1][:60])}",
                hint=_DECIDE,
            )


def _are_usual(values: Sequence[str], usual: Iterable[str]) -> bool:
    known = {*usual, values[-1]}
    return all(value in known for value in values)


def _empty_lines(file: Path, rows: Sequence[_Row]) -> list[str]:
    """A note about empty lines between rows."""
    between = sum(_gaps(rows))
    if not between:
        return []
    return [f"{file.name}: {between} empty line{'s' if between > 1 else ''} between rows skipped"]


def _gaps(rows: Sequence[_Row]) -> Iterator[int]:
    end = 0
    for row in rows:
        yield row.first - end - 1
        end = row.last
