"""Choices in each row, and labels that are indices into them or texts of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.data.task_data import TaskData, open_split
from restitch.registry.specs.data import DataSpec

PROMPT = Prompt("Q {q}\nA", "options")


def rows_of(
    folder: Path, rows: list[dict[str, Any]], form: str = "jsonl", prompt: Prompt = PROMPT
) -> Rows:
    file = folder / f"t.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(path=str(folder), test=file.name, input=("q",))
    return open_split(spec, "test", prompt=prompt)


def row(label: Any, *options: Any, q: Any = "what") -> dict[str, Any]:
    return {"q": q, "options": list(options), "label": label}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_is_a_question_with_its_own_choices(tmp_path: Path, form: str) -> None:
    rows = rows_of(tmp_path, [row(1, "a", "b"), row(0, "c", "d", "e")], form)
    assert rows.class_count == 3
    assert (rows[0].inputs, rows[0].choices, rows[0].label) == (("Q what\nA",), ("a", "b", None), 1)
    assert rows[1].choices == ("c", "d", "e")
    memory = rows.select([1, 0]).in_memory()
    assert [memory[n].choices for n in range(2)] == [("c", "d", "e"), ("a", "b", None)]
    assert memory.targets.tolist() == [0, 1]
    assert memory.digest() == rows.select([1, 0]).digest() != rows.digest()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("b", "a", "b"), row("c", "c", "d")], [1, 0]),
        ([row("1", "a", "b"), row("0", "c", "d")], [1, 0]),
        ([row("7", "7", "8"), row("8", "7", "8")], [0, 1]),
        ([row(1, "2", "1"), row(0, "1", "0")], [1, 0]),
        ([row("0", "0", "1"), row("1", "0", "1")], [0, 1]),
        ([row("1", "1", "0"), row("x", "x", "y")], [0, 0]),
    ],
)
def test_labels_are_indices_or_texts(
    tmp_path: Path, rows: list[dict[str, Any]], expected: list[int]
) -> None:
    assert rows_of(tmp_path, rows).targets.tolist() == expected


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_may_have_several_right_choices(tmp_path: Path, form: str) -> None:
    rows = rows_of(tmp_path, [row(["c", "a"], "a", "b", "c"), row(["e"], "d", "e")], form)
    assert rows.right == [(2, 0), (1,)]
    assert rows.targets.tolist() == [2, 1], "losses take the first one"
    assert rows.select([1]).right == rows.select([1]).in_memory().right == [(1,)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, "a", "b"), row([0, 2], "a", "b")], "row 1: the label is not one of the row's"),
        ([row([0], "a", "b"), row([], "a", "b")], "row 1 has no right choice"),
        ([row([["a"]], "a", "b")], "the label is not one of the row's choices"),
        ([row(0, "a", "b"), row(2, "a", "b")], "t.jsonl row 1: the label is not one of the row's"),
        ([row("c", "a", "b")], "the label is not one of the row's choices"),
        ([row(-1, "a", "b")], "the label is not one of the row's choices"),
        ([row(None, "a", "b")], "the label is not one of the row's choices"),
        ([row(True, "a", "b")], "the label is not one of the row's choices"),
        ([row(1.0, "a", "b")], "the label is not one of the row's choices"),
        ([row("1", "1", "0")], "the label can be read in two ways"),
        ([row("b", "a", "b"), row("1", "c", "d")], "the label is not one of the row's choices"),
    ],
)
def test_other_labels_are_refused_with_their_row(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        rows_of(tmp_path, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("a, b", "column 'options' is no list of choices"),
        (None, "is no list of choices"),
        ({"text": ["a"]}, "is no list of choices"),
        (["a"], "at least two choices"),
        (["a", "a"], "choices occur twice"),
        (["a", "  "], "a choice is empty"),
        (["a", 3], "choice 1 is not a text"),
        (["a", "\ud800"], "choice 1 has half of a character"),
    ],
)
def test_choices_that_are_no_list_of_different_texts_are_refused(
    tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(BadInput, match=f"row 1.*{message}"):
        rows_of(tmp_path, [row(0, "a", "b"), {"q": "x", "options": options, "label": 0}])


def test_whole_numbers_are_written_into_a_prompt_and_other_values_refused(tmp_path: Path) -> None:
    assert rows_of(tmp_path, [row(0, "a", "b", q=7)])[0].inputs == ("Q 7\nA",)
    for value in (None, True, 0.5, ["x"]):
        with pytest.raises(BadInput, match="column 'q' is not a text"):
            rows_of(tmp_path, [row(0, "a", "b", q=value)])[0]


def test_a_column_that_the_prompt_names_must_be_there(tmp_path: Path) -> None:
    rows = [{"Q": "x", "options": ["a", "b"], "label": 0}]
    with pytest.raises(BadInput, match="has no column 'q'") as caught:
        rows_of(tmp_path, rows)
    assert "did you mean 'Q'?" in str(caught.value.hint)
    assert "prompt:" in str(caught.value.hint)
    with pytest.raises(BadInput, match="has no column 'options'"):
        rows_of(tmp_path, [{"q": "x", "label": 0}])


def test_calibration_takes_rows_of_every_index(tmp_path: Path) -> None:
    rows = [row(n % 3, "a", "b", "c", q=str(n)) for n in range(30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    spec = DataSpec(path=str(tmp_path), train="t.jsonl", input=("q",))
    chosen = TaskData(spec, (), "text", PROMPT).calibration(2, 0)
    assert sorted(chosen.targets.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("value", "text"), [("red", "red"), (7, "7"), (3.2, "3.2"), (1 / 3, "0.333333"), (5.0, "5")]
)
def test_an_answer_that_is_a_number_is_read_as_text(value: object, text: str) -> None:
    table = ListTable("rows", Path(), {"q": ["what"], "a": [value]})
    rows = Rows(table, ("q",), "a", (), "text", prompt=Prompt("{q}", answer="a"))
    assert rows[0].choices == (text,)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_may_have_several_right_answers(tmp_path: Path, form: str) -> None:
    written = [row(["blue", "azure"], q="sky"), row(["grey"], q="sea")]
    rows = rows_of(tmp_path, written, form, Prompt("{q}", answer="label"))
    assert rows.answers == [("blue", "azure"), ("grey",)]
    assert [rows[place].choices for place in range(2)] == [("blue",), ("grey",)]
    assert rows.select([1]).answers == rows.select([1]).in_memory().answers == [("grey",)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "is not a text"),
        (float("nan"), "is not a text"),
        (float("inf"), "is not a text"),
        (["a", None], "is not a text"),
        ([["a"]], "is not a text"),
        (["a", " "], "is an empty answer"),
        ([], "has no answer"),
    ],
)
def test_another_answer_is_refused(value: object, message: str) -> None:
    table = ListTable("rows", Path(), {"q": ["what"], "a": [value]})
    rows = Rows(table, ("q",), "a", (), "text", prompt=Prompt("{q}", answer="a"))
    with pytest.raises(BadInput, match=message):
        _ = rows[0].choices
