"""Labels mean the same in every form; what has two readings is refused with both lists."""

import csv
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.modeling.data.task_data import data_digest, open_split
from restitch.registry.specs.data import DataSpec

FORMS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow")


def write(folder: Path, form: str, values: list[Any], own: list[str] | None = None) -> str:
    """One row for each label; `own` are the names that the data set gives to its classes."""
    texts = [f"text {row}" for row in range(len(values))]
    records = [{"text": text, "label": value} for text, value in zip(texts, values, strict=True)]
    file = folder / f"t.{form}"
    if form in ("csv", "tsv"):
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="," if form == "csv" else "\t")
            writer.writerows([["text", "label"], *(list(r.values()) for r in records)])
    elif form == "jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif form == "json":
        file.write_text(json.dumps(records))
    else:
        table = pa.table({"text": texts, "label": values})
        if own is not None:
            features = {"label": {"names": own, "_type": "ClassLabel"}}
            known = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": known})
        if form == "parquet":
            pq.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
    return file.name


def read(folder: Path, labels: tuple[str, ...], name: str, **spec: Any) -> list[int]:
    data = DataSpec(path=str(folder), test=name, **spec)
    targets: list[int] = open_split(data, "test", labels=labels).targets.tolist()
    return targets


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (("no", "yes"), [1, 0, 1]),
        (("no", "yes"), ["1", " 0", "1"]),
        (("no", "yes"), ["yes", "no", "yes"]),
        (("no", "yes"), ["Yes", "NO", "yes "]),
        (("caf\u00e9", "Stra\u00dfe"), ["STRASSE", "cafe\u0301", "stra\u00dfe"]),
        (("3", "5"), [5, 3, 5]),
        (("3", "5"), ["5", "3", "5"]),
        (("3", "5"), [1, 0, 1]),
        (("0", "1"), ["1", "0", "1"]),
        (("A", "a"), ["a", "A", "a"]),
        (("1", "2", "other"), ["2", "1", "2", "other"]),
    ],
)
def test_labels_mean_the_same_in_every_form(tmp_path, form, labels, values):
    name = write(tmp_path, form, values)
    assert read(tmp_path, labels, name)[:3] == [1, 0, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [("1", "0"), ("1", "2", "3", "4", "5")])
def test_numbers_that_are_names_and_indices_are_refused(tmp_path, form, labels):
    name = write(tmp_path, form, [1, 1])
    with pytest.raises(BadInput, match="can be read in two ways") as caught:
        read(tmp_path, labels, name)
    assert caught.value.details == ("in the data: 1", f"classes of the task: {', '.join(labels)}")
    assert read(tmp_path, labels, name, classes=labels) == [0, 0]
    indices = tuple(str(index) for index in range(len(labels)))
    assert read(tmp_path, labels, name, classes=indices) == [1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_a_number_with_one_reading_shows_what_the_others_are(tmp_path, form):
    stars = ("1", "2", "3", "4", "5")
    assert read(tmp_path, stars, write(tmp_path, form, [1, 5])) == [0, 4]
    assert read(tmp_path, stars, write(tmp_path, form, [1, 0])) == [1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_other_names_are_refused_with_both_lists_unless_the_task_has_them(tmp_path, form):
    name = write(tmp_path, form, ["neg", "pos"])
    labels = ("negative", "positive")
    with pytest.raises(BadInput, match="row 0: the label is not one of the classes") as caught:
        read(tmp_path, labels, name)
    assert caught.value.details == (
        "in the data: neg, pos",
        "classes of the task: negative, positive",
    )
    assert "set classes:" in str(caught.value.hint)
    assert read(tmp_path, labels, name, classes=("neg", "pos")) == [0, 1]
    assert read(tmp_path, labels, name, classes=("pos", "neg")) == [1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_label_are_explained(tmp_path, form):
    with pytest.raises(BadInput, match="row 1: the label is not") as caught:
        read(tmp_path, ("no", "yes"), write(tmp_path, form, [0, -1]))
    assert "unlabelled: -1 under data" in str(caught.value.hint)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("values", "unlabelled", "expected"),
    [
        ([-1, 1, 0, -1], -1, [1, 0]),
        (["-1", "yes", "no"], "-1", [1, 0]),
        (["-", "yes", "no", "-"], "-", [1, 0]),
        ([None, "yes", "no"], "", [1, 0]),
        (["yes", " unsure", "no"], "unsure", [1, 0]),
    ],
)
def test_rows_that_the_task_marks_as_unlabelled_are_left_out(
    tmp_path, form, values, unlabelled, expected
):
    spec = DataSpec(path=str(tmp_path), test=write(tmp_path, form, values), unlabelled=unlabelled)
    rows = open_split(spec, "test", labels=("no", "yes"))
    kept = [row for row, value in enumerate(values) if value in (0, 1, "no", "yes")]
    assert [rows[place].inputs[0] for place in range(len(rows))] == [f"text {row}" for row in kept]
    assert [rows[place].where for place in range(len(rows))] == [f"t.{form} row {r}" for r in kept]
    assert (rows.targets.tolist(), rows.left_out) == (expected, len(values) - len(kept))


def test_a_data_set_may_have_a_name_for_no_label(tmp_path):
    own = ["none", "yes", "no"]
    name = write(tmp_path, "parquet", [1, 0, 2, 0], own)
    assert read(tmp_path, ("no", "yes"), name, unlabelled="none") == [1, 0]
    name = write(tmp_path, "parquet", [1, -1, 0], ["no", "yes"])
    assert read(tmp_path, ("no", "yes"), name, unlabelled=-1) == [1, 0]


@pytest.mark.parametrize(
    ("values", "unlabelled", "message"),
    [
        ([-1, -1], -1, "t.jsonl has no row with a label"),
        ([0, 1], 1, "cannot be told from those of a class"),
        (["no", "yes"], "No", "cannot be told from those of a class"),
        ([0, -2], -1, "row 1: the label is not one of the classes"),
    ],
)
def test_rows_without_a_label_never_hide_what_is_wrong(tmp_path, values, unlabelled, message):
    name = write(tmp_path, "jsonl", values)
    with pytest.raises(BadInput, match=message):
        read(tmp_path, ("no", "yes"), name, unlabelled=unlabelled)


def test_a_number_may_stand_for_no_number(tmp_path):
    for form, values in (("csv", [3.5, -1.0, 2.0]), ("parquet", [3.5, -1.0, 2.0])):
        spec = DataSpec(path=str(tmp_path), test=write(tmp_path, form, values), unlabelled=-1)
        rows = open_split(spec, "test", of_numbers=True)
        assert rows.targets.tolist() == [3.5, 2.0]


def test_the_rows_left_out_belong_to_the_digest_of_the_data(tmp_path):
    name = write(tmp_path, "jsonl", [0, -1, 1])
    plain = DataSpec(path=str(tmp_path), test=name)
    marked = plain.model_copy(update={"unlabelled": "-1"})
    assert "read_as" not in data_digest(plain, "text")
    assert data_digest(marked, "text")["read_as"] == {"unlabelled": "-1"}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_number_with_a_fraction_is_no_index(tmp_path, form):
    with pytest.raises(BadInput, match="row 0") as caught:
        read(tmp_path, ("no", "yes"), write(tmp_path, form, [1.0, 0.0]))
    assert "whole numbers" in str(caught.value.hint)
    assert read(tmp_path, ("0.0", "1.0"), write(tmp_path, form, [1.0, 0.0])) == [1, 0]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_true_is_a_name_and_never_the_index_one(tmp_path, form):
    name = write(tmp_path, form, [True, False])
    assert read(tmp_path, ("False", "True"), name) == [1, 0]
    with pytest.raises(BadInput, match="row 0"):
        read(tmp_path, ("no", "yes"), name)


def test_true_is_not_taken_for_a_one_in_another_row(tmp_path):
    with pytest.raises(BadInput, match="row 1"):
        read(tmp_path, ("no", "yes"), write(tmp_path, "jsonl", [1, True]))


def test_a_name_in_another_case_of_several_classes_is_refused(tmp_path):
    with pytest.raises(BadInput, match="several classes"):
        read(tmp_path, ("Ab", "aB"), write(tmp_path, "csv", ["AB"]))


class TestOwnNames:
    """A data set whose schema names its classes; values are indices into these names."""

    def read(self, folder: Path, own: list[str], labels: tuple[str, ...], **spec: Any) -> list[int]:
        found = []
        for form in ("parquet", "arrow"):
            name = write(folder, form, list(range(len(own))), own)
            found.append(read(folder, labels, name, **spec))
        assert found[0] == found[1]
        return found[0]

    @pytest.mark.parametrize(
        ("own", "labels", "expected"),
        [
            (["yes", "no"], ("no", "yes"), [1, 0]),
            (["YES", "No"], ("no", "yes"), [1, 0]),
            (["hot_dog", "Apple_Pie"], ("apple pie", "hot dog"), [1, 0]),
            (["apple pie", "hot dog"], ("hot_dog", "apple_pie"), [1, 0]),
            (["a b", "a_b"], ("a_b", "a b"), [1, 0]),
            (["1", "0"], ("no", "yes"), [1, 0]),
            (["0", "1"], ("no", "yes"), [0, 1]),
            (["5", "3"], ("3", "5"), [1, 0]),
            (["1", "0"], ("1", "0"), [0, 1]),
        ],
    )
    def test_names_decide_and_not_their_order(self, tmp_path, own, labels, expected):
        assert self.read(tmp_path, own, labels) == expected

    def test_names_that_are_known_in_part_decide_for_the_rows_that_use_them(self, tmp_path):
        own = ["yes", "maybe", "no"]
        for form in ("parquet", "arrow"):
            name = write(tmp_path, form, [0, 2, 0], own)
            assert read(tmp_path, ("no", "yes"), name) == [1, 0, 1]
        with pytest.raises(BadInput, match="row 1: the label is not one of") as caught:
            self.read(tmp_path, own, ("no", "yes"))
        assert caught.value.details == (
            "in the data: yes, maybe, no",
            "classes of the task: no, yes",
        )

    def test_all_other_names_in_the_same_number_are_matched_by_order_and_noted(self, tmp_path):
        name = write(tmp_path, "parquet", [1, 0], ["neg", "pos"])
        spec = DataSpec(path=str(tmp_path), test=name)
        rows = open_split(spec, "test", labels=("It was bad.", "It was good."))
        assert rows.targets.tolist() == [1, 0]
        assert rows.notes == (
            "t.parquet: classes are matched by their order: "
            "'neg' is 'It was bad.', 'pos' is 'It was good.'",
        )

    @pytest.mark.parametrize(
        ("own", "labels"),
        [
            (["neg", "pos"], ("positive", "negative")),
            (["cat", "dog"], ("a dog", "a cat")),
            (["a", "b", "c"], ("no", "yes")),
            (["x", "y"], ("no", "yes", "maybe")),
            (["yes", "Yes"], ("yes", "no")),
        ],
    )
    def test_names_that_do_not_match_are_refused_with_both_lists(self, tmp_path, own, labels):
        with pytest.raises(BadInput, match="do not match those of the task") as caught:
            self.read(tmp_path, own, labels)
        assert caught.value.details == (
            f"in the data: {', '.join(own)}",
            f"classes of the task: {', '.join(labels)}",
        )

    def test_the_task_names_them_instead(self, tmp_path):
        labels = ("positive", "negative")
        assert self.read(tmp_path, ["neg", "pos"], labels, classes=("pos", "neg")) == [1, 0]

    def test_files_of_one_split_have_the_same_classes(self, tmp_path):
        write(tmp_path, "parquet", [0], ["no", "yes"])
        (tmp_path / "t.parquet").rename(tmp_path / "test-00000-of-00002.parquet")
        write(tmp_path, "parquet", [0], ["yes", "no"])
        (tmp_path / "t.parquet").rename(tmp_path / "test-00001-of-00002.parquet")
        with pytest.raises(BadInput, match="different classes in column 'label'"):
            read(tmp_path, ("no", "yes"), "test")


def test_a_long_value_is_cut_in_the_error(tmp_path):
    with pytest.raises(BadInput) as caught:
        read(tmp_path, ("no", "yes"), write(tmp_path, "jsonl", ["a" * 10_000]))
    assert len(str(caught.value)) < 600


def test_classes_fit_the_labels(tmp_path):
    with pytest.raises(BadInput, match="classes does not fit the labels"):
        read(tmp_path, ("no", "yes"), write(tmp_path, "csv", ["a"]), classes=("a",))


def test_only_a_setting_that_is_used_enters_the_digest(tmp_path):
    plain = DataSpec(path=str(tmp_path), test=write(tmp_path, "csv", ["a", "b"]))
    assert "read_as" not in data_digest(plain, "text")
    changes: list[dict[str, Any]] = [{"classes": ("a", "b")}, {"delimiter": ";"}, {"quotes": True}]
    specs = [plain, *(plain.model_copy(update=change) for change in changes)]
    assert len({json.dumps(data_digest(spec, "text")) for spec in specs}) == 4


@settings(max_examples=60)
@given(data=st.data())
def test_rows_are_the_same_in_every_form_or_refused(tmp_path_factory, data):
    names = st.sampled_from(["a", "B", "0", "1", "2", "10", "\u00e9"])
    labels = tuple(data.draw(st.lists(names, min_size=2, max_size=4, unique=True)))
    index = st.integers(0, len(labels) - 1)
    classes = data.draw(st.lists(index, min_size=1, max_size=5))
    if data.draw(st.booleans()):
        values: list[Any] = classes
    else:
        values = [labels[place] for place in classes]
    found = set()
    for form in FORMS:
        folder = tmp_path_factory.mktemp("form")
        name = write(folder, form, values)
        with suppress(BadInput):
            found.add(tuple(read(folder, labels, name)))
    assert found <= {tuple(classes)}
