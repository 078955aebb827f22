"""Hostile tables of rows for the fuzzer, and the check of their readers.

A table is written as its author would write it, in one of many forms, and perhaps damaged. The
check reads it. What is read must be what the author wrote, or what `datasets` reads from damaged
bytes; anything else must be refused with an explanation.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.modeling.data.task_data import open_split
from restitch.registry.specs.data import DataSpec
from tests.stress.hostile_files import damaged_bytes

FORMS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow")
# In the order of their indices. The names of the second and third look like indices.
LABELS = (("no", "yes"), ("3", "5"), ("1", "0"), ("a b", "B", "caf\u00e9", "d"))
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

_TEXTS = st.one_of(
    st.text(st.sampled_from('ab "",\t;\n\r\\\'|{}[]\u00e9\u2028\x85\x00\ufeff'), max_size=8),
    st.sampled_from(["", '"', '""', "NA", "null", "1", "1.5", "#", "a" * 200_000, "\ud83d", "1e5"]),
)


@dataclass(frozen=True)
class TableFile:
    """One file with rows.

    Attributes:
        form: the suffix of its name.
        packing: the suffix of its compression, or nothing.
        data: its bytes, before they are packed.
        labels: the labels of the task.
        rows: texts and classes as the author meant them; None if the bytes are damaged.
    """

    form: str
    packing: str
    data: bytes
    labels: tuple[str, ...]
    rows: tuple[tuple[str, int], ...] | None


@st.composite
def tables(draw: st.DrawFn) -> TableFile:
    """The bytes of one table."""
    form = draw(st.sampled_from(FORMS))
    labels = draw(st.sampled_from(LABELS))
    classes = st.integers(0, len(labels) - 1)
    rows = draw(st.lists(st.tuples(_TEXTS, classes), min_size=1, max_size=6))
    style = draw(st.sampled_from(["index", "numeral", "name", "case", "own", "own and more"]))
    values, own = _labels(style, labels, [row[1] for row in rows])
    texts = [row[0] for row in rows]
    if own is not None and form in ("parquet", "arrow"):
        data = _arrow(form, texts, values, own)
    else:
        if own is not None:
            values = [own[value] for value in values]
        data = draw(_written(form, texts, values))
    meant: tuple[tuple[str, int], ...] | None = tuple(rows)
    if style == "numeral" and labels == ("1", "0") and form not in ("csv", "tsv"):
        # A text that is a name means the name.
        meant = tuple((text, labels.index(str(index))) for text, index in rows)
    if form not in ("parquet", "arrow") and draw(st.booleans()):
        broken = draw(damaged_bytes(data))
        meant, data = (meant if broken == data else None), broken
    packing = draw(st.sampled_from(["", "", "", *PACKINGS])) if form in FORMS[:4] else ""
    return TableFile(form, packing, data, labels, meant)


def _labels(
    style: str, labels: tuple[str, ...], classes: list[int]
) -> tuple[list[Any], list[str] | None]:
    """The values of the label column, and the names that the data set gives to them."""
    if style == "index":
        return list(classes), None
    if style == "numeral":
        return [str(index) for index in classes], None
    if style == "case":
        return [labels[index].upper() for index in classes], None
    if style == "name":
        return [labels[index] for index in classes], None
    own = [*reversed(labels), *(["unused"] if style == "own and more" else [])]
    return [own.index(labels[index]) for index in classes], own


@st.composite
def _written(draw: st.DrawFn, form: str, texts: list[str], values: list[Any]) -> bytes:
    if form in ("parquet", "arrow"):
        return _arrow(form, texts, values)
    records = [{"text": text, "label": value} for text, value in zip(texts, values, strict=True)]
    bom = draw(st.sampled_from(["", "\ufeff"]))
    if form in ("csv", "tsv"):
        end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
        quoting: Any = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        stream = io.StringIO()
        delimiter = "," if form == "csv" else "\t"
        writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerows([["text", "label"], *([r["text"], r["label"]] for r in records)])
        text = stream.getvalue()
        plain = not any(sign in one for one in texts for sign in "\t\r\n")
        if form == "tsv" and plain and draw(st.booleans()):  # as most TSV files are
            lines = ["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in records)]
            text = end.join(lines) + end
    else:
        pretty = draw(st.booleans())
        if form == "jsonl":
            text = "\n".join(json.dumps(record, ensure_ascii=pretty) for record in records)
        else:
            whole: Any = draw(st.sampled_from([records, {"data": records}]))
            text = json.dumps(whole, ensure_ascii=pretty, indent=1 if pretty else None)
    return (bom + text).encode("utf-8", "surrogatepass")


def _arrow(form: str, texts: list[str], values: list[Any], own: list[str] | None = None) -> bytes:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    # Without a check, as a careless writer does: a text may not be UTF-8.
    column = pa.array(encoded, pa.binary()).view(pa.string())
    table = pa.table({"text": column, "label": values})
    if own is not None:
        features = {"label": {"names": own, "_type": "ClassLabel"}}
        known = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": known})
    sink = io.BytesIO()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def check_table(file: TableFile) -> str:
    """Read a table, and compare the rows with those that the author meant or `datasets` reads."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, f"t.{file.form}{file.packing}")
        place.write_bytes(PACKINGS[file.packing](file.data))
        try:
            spec = DataSpec(path=folder, test=place.name)
            rows = open_split(spec, "test", labels=file.labels)
            read = [(rows[n].inputs[0], rows[n].label) for n in range(len(rows))]
        except BadInput as error:
            return explained(error)
        if file.rows is not None:
            _check_meaning(file, read)
            return "read"
        known = [one for one in _read_by_datasets(file, Path(folder)) if one is not None]
    meant = [[(text, _class(label, file.labels)) for text, label in one] for one in known]
    assert read in meant, f"datasets reads {meant}, not {read}"
    return "read"


def explained(error: BadInput) -> str:
    """The outcome of an input that is refused, which must say more than that."""
    assert error.found or error.expected or error.hint, f"no explanation: {error}"
    return "refused"


def _check_meaning(file: TableFile, read: Sequence[tuple[Any, int | None]]) -> None:
    meant = list(file.rows or ())
    if read == meant:
        return
    # In TSV without quotes, a text can look like one with quotes, and then lose them.
    assert file.form == "tsv", f"{read} is not what the author wrote: {meant}"
    assert [label for _, label in read] == [label for _, label in meant]
    assert all('"' in text for (text, _), one in zip(meant, read, strict=True) if text != one[0])


def _class(label: Any, labels: tuple[str, ...]) -> int | None:
    """The class of a label that is a name in any case or a number."""
    text = str(label)
    names = [name.casefold() for name in labels]
    if text.strip().casefold() in names:
        return names.index(text.strip().casefold())
    return int(text) if text.strip().isdigit() else None


def _read_by_datasets(file: TableFile, folder: Path) -> list[list[tuple[Any, Any]] | None]:
    """The rows that `datasets` reads; for TSV both without and with quotes."""
    place = folder / f"unpacked.{file.form}"
    # With a byte order mark, `datasets` reads one form of JSON and not the others.
    place.write_bytes(file.data.removeprefix(codecs.BOM_UTF8))
    if file.form == "tsv":
        return [_rows("csv", place, sep="\t", quoting=3), _rows("csv", place, sep="\t")]
    if file.form == "csv":
        return [_rows("csv", place)]
    fields = re.findall(r'"(\w+)": \[', file.data.decode("utf-8", "replace"))[:1]
    return [_rows("json", place), *(_rows("json", place, field=name) for name in fields)]


def _rows(kind: str, file: Path, **settings: Any) -> list[tuple[Any, Any]] | None:
    builder = _builder(kind, tuple(settings.items()))
    given: dict[str, Any] = {"base_files": [str(file)], "files_iterables": [[str(file)]]}
    if kind == "json":
        given["original_files"] = [str(file)]
    try:
        parts = [part for _, part in builder._generate_tables(**given)]
        found = pa.concat_tables(parts).to_pydict()
        return list(zip(found["text"], found["label"], strict=True))
    except Exception:  # it refuses the bytes in many ways
        return None


@cache
def _builder(kind: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    from datasets import Features, Value, logging
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    logging.set_verbosity(logging.CRITICAL)
    features = Features({"text": Value("string"), "label": Value("string")})
    cache_dir = tempfile.mkdtemp()
    data_files = {"test": [__file__]}
    more = {
        "cache_dir": cache_dir,
        "data_files": data_files,
        "features": features,
        **dict(settings),
    }
    # A text that looks like a missing value is a text.
    return Json(**more) if kind == "json" else Csv(**more, keep_default_na=False)
