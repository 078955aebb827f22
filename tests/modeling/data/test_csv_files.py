"""CSV and TSV: no row is dropped, joined or invented, and a file with two readings is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.modeling.data.csv_files import CsvFormat, csv_records

SWALLOWED = 'text,label\n" a,0\nb,1\nc,0\nd ",1\ne,0\n'


def read(folder: Path, text: str, name: str = "t.csv", form: CsvFormat | None = None) -> list[Any]:
    (folder / name).write_bytes(text.encode())
    records, _ = csv_records(folder / name, form or CsvFormat())
    return [tuple(record.values()) for record in records]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quotes_commas_and_line_breaks_stay_in_their_field(tmp_path, end):
    text = f'text,label{end}"a, ""b""{end}c",0{end}d,1{end}'
    assert read(tmp_path, text) == [(f'a, "b"{end}c', "0"), ("d", "1")]


def test_a_field_may_be_long(tmp_path):
    assert read(tmp_path, f"text,label\n{'a' * 200_000},0\n") == [("a" * 200_000, "0")]


def test_quotes_of_two_texts_never_swallow_the_rows_between_them(tmp_path):
    tsv = SWALLOWED.replace(",", "\t")
    assert len(read(tmp_path, tsv, "t.tsv")) == 5
    with pytest.raises(BadInput, match=r"t\.csv lines 2 to 5 can be read in two ways") as caught:
        read(tmp_path, SWALLOWED)
    assert "one row with 4 lines in quotes, or 4 rows" in str(caught.value)
    assert "set quotes: true or quotes: false" in str(caught.value)


def test_the_task_says_which_of_two_readings_is_meant(tmp_path):
    assert len(read(tmp_path, SWALLOWED, form=CsvFormat(quotes=True))) == 2
    assert len(read(tmp_path, SWALLOWED, form=CsvFormat(quotes=False))) == 5


def test_a_text_of_several_lines_is_not_taken_for_rows(tmp_path):
    text = 'text,label\n"Hello, Bob\nbye",1\nx,0\n'
    assert read(tmp_path, text) == [("Hello, Bob\nbye", "1"), ("x", "0")]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Not quoted: a quote is a letter.
        ('"a" he said\t0', '"a" he said'),
        ('"a"\t0', '"a"'),
        ('"\t0', '"'),
        ('6" nails\t0', '6" nails'),
        # Quoted as a writer of CSV does it.
        ('"a ""b"""\t0', 'a "b"'),
        ('"a\tb"\t0', "a\tb"),
        ('"a\nb"\t0', "a\nb"),
    ],
)
def test_tsv_has_quotes_only_if_all_of_it_is_written_so(tmp_path, lines, expected):
    text = f"text\tlabel\n{lines}\nlast\t1\n"
    assert read(tmp_path, text, "t.tsv") == [(expected, "0"), ("last", "1")]


def test_a_tsv_file_with_all_fields_in_quotes_loses_them(tmp_path):
    text = '"text"\t"label"\n"a"\t"0"\n"b"\t"1"\n'
    assert read(tmp_path, text, "t.tsv") == [("a", "0"), ("b", "1")]


def test_one_field_that_no_writer_quotes_so_shows_that_tsv_has_no_quotes(tmp_path):
    text = 'text\tlabel\n"a ""b"""\t0\n"c" d\t1\n'
    assert read(tmp_path, text, "t.tsv") == [('"a ""b"""', "0"), ('"c" d', "1")]


@settings(max_examples=100)
@given(texts=st.lists(st.text(st.sampled_from('ab" ,'), max_size=6), min_size=1, max_size=8))
def test_tsv_has_as_many_rows_as_lines(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tsv")
    text = "text\tlabel\n" + "".join(f"{text}\t0\n" for text in texts)
    assert len(read(folder, text, "t.tsv")) == len(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\na\n", "line 2 has too many or too few fields"),
        ("text,label\na,0,1\n", "line 2 has too many or too few fields"),
        ('text,label\n"a"b,0\n', "line 2 is not valid CSV"),
        ('text,label\na,0\n"b,1\n', "line 3 is not valid CSV"),
        ("text,label,text\na,0,b\n", "several columns of one name"),
        ("text;label\na;0\n", "has one column, named 'text;label'"),
        ("text\tlabel\na\t0\n", "has one column"),
        ("text,label\n\rb,0\n", "line 2 ends with a carriage return"),
        (f"text,label\n{'a' * 90},0\na\0b,1\n", "line 3 has a NUL character"),
        ("text\n \na\n", "line 2 has blanks only"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.hint is not None


def test_another_delimiter_is_a_setting(tmp_path):
    assert read(tmp_path, "text;label\na,b;0\n", form=CsvFormat(";")) == [("a,b", "0")]


def test_a_column_without_a_name_is_no_obstacle(tmp_path):
    assert read(tmp_path, ",text,label\n0,a,1\n") == [("0", "a", "1")]


def test_empty_lines_are_no_rows_and_are_counted(tmp_path):
    (tmp_path / "t.csv").write_text("\ntext,label\n\n\na,0\n\n\n")
    records, notes = csv_records(tmp_path / "t.csv", CsvFormat())
    assert len(list(records)) == 1
    assert notes == ["t.csv: 3 empty lines between rows skipped"]
