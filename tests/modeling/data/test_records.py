"""Text tables: packed, with a byte order mark, as lines or as one document; others are refused."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.records import read_records

ROWS = [{"text": "a\u2028b", "label": 0}, {"text": "\U0001f600", "label": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(folder: Path, name: str, data: bytes | str) -> list[Any]:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_records(folder / name)[0])


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_text_table_is_read(tmp_path, packing):
    assert read(tmp_path, f"t.jsonl.{packing}", PACKED[packing](LINES)) == ROWS
    assert read(tmp_path, f"t.csv.{packing}", PACKED[packing](b"a,b\n1,2\n")) == [
        {"a": "1", "b": "2"}
    ]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda _: b"other bytes"])
def test_a_damaged_packed_file_is_refused(tmp_path, packing, damage):
    with pytest.raises(BadInput, match="cannot be unpacked"):
        read(tmp_path, f"t.jsonl.{packing}", damage(PACKED[packing](LINES)))


def test_a_file_that_unpacks_to_very_much_is_refused(tmp_path):
    with pytest.raises(BadInput, match="too large when it is unpacked"):
        read(tmp_path, "t.jsonl.gz", gzip.compress(b"\n" * (65 << 20)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.json", json.dumps(ROWS)),
        ("t.json", json.dumps({"data": ROWS, "version": 1})),
        ("t.json", json.dumps({"text": [r["text"] for r in ROWS], "label": [0, 1]})),
        ("t.json", LINES.decode()),
        ("t.jsonl", LINES.decode()),
        ("t.ndjson", LINES.decode().replace("\n", "\r\n")),
        ("t.jsonl", LINES.decode().rstrip("\n")),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_of_each_form_has_the_same_rows(tmp_path, name, data, mark):
    assert read(tmp_path, name, mark + data) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.json", json.dumps({"train": ROWS, "test": ROWS}), "several lists of rows"),
        ("t.json", json.dumps({"text": {"0": "a"}, "label": {"0": 1}}), "orient='records'"),
        ("t.json", json.dumps({"text": ["a"], "label": []}), "columns of different lengths"),
        ("t.json", "[1, 2]", "does not hold rows"),
        ("t.jsonl", json.dumps(ROWS), "one JSON list .json"),
        ("t.jsonl", '{"a": 1, "a": 2}', "'a' occurs twice"),
        ("t.jsonl", '{"a": 1} {"a": 2}', "line 1 is not valid JSON"),
        ("t.json", '{"a": 1}\n{"a"\n', "line 2 is not valid JSON"),
        ("t.jsonl", '{"a": 1}\n{"a": "caf\xe9"}'.encode("latin-1"), "line 2 is not UTF-8"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16 text"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), "has NUL bytes"),
        ("t.csv", gzip.compress(b"a,b\n1,2\n", mtime=0), "is a gzip file"),
        ("t.csv", b"PK\x03\x04 and so on", "a zip file or a spreadsheet"),
        ("t.jsonl", b"PAR1 and so on", "is a parquet file"),
        ("t.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    ],
)
def test_another_form_is_named(tmp_path, name, data, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, name, data)
    assert name in caught.value.summary


def test_what_is_skipped_and_chosen_is_noted(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(LINES.replace(b"\n", b"\n\n\n"))
    (tmp_path / "t.json").write_text(json.dumps({"rows": ROWS}))
    assert read_records(tmp_path / "t.jsonl")[1] == ["t.jsonl: 2 empty lines between rows skipped"]
    assert read_records(tmp_path / "t.json")[1] == ["t.json: the rows are those under 'rows'"]
