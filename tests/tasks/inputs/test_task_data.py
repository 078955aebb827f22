"""What a task file means, and when its rows are read."""

from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example, Rows
from restitch.modeling.families.family import get_family
from restitch.registry.home import Home
from restitch.registry.specs.files import load_task
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import (
    check_rows,
    description_digest,
    evaluation_split,
    left_out_note,
    resolve_task,
    same_task,
    verified_data,
)
from restitch.tasks.runtime.console import Reporter, reporting_to
from restitch.tasks.runtime.workspace import Workspace
from tests.worlds import World, write_rows, write_yaml

FAMILY = get_family("text-encoder")


def task_of(folder: Path, **changes: Any) -> TaskSpec:
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(10)]
    write_rows(folder / "rows" / "test.jsonl", rows)
    values: dict[str, Any] = {
        "task": "colour",
        "data": {"path": "rows", "test": "test.jsonl"},
        "head": {"labels": ["red", "green"]},
        **changes,
    }
    return load_task(write_yaml(folder / "task.yaml", values))


def test_missing_keys_are_filled_in(tmp_path: Path) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    assert spec.data is not None
    assert (spec.data.input, spec.data.label) == (("text",), "label")
    assert spec.data.content is not None
    given = {"path": "rows", "test": "test.jsonl", "input": "text", "label": "label"}
    assert resolve_task(task_of(tmp_path, data=given), FAMILY) == spec


def test_rows_without_a_label_are_counted_at_registration(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 2 if n % 3 else -1} for n in range(20)]
    write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "some.jsonl", rows[:3])
    data = {"path": "rows", "train": "train.jsonl", "unlabelled": -1}
    with reporting_to(notes := Notes()):
        spec = resolve_task(task_of(tmp_path, data=data | {"test": "some.jsonl"}), FAMILY)
    assert spec.data is not None
    assert spec.data.left_out == {"train": 7, "test": 1}
    assert resolve_task(spec, FAMILY) == spec
    said = notes.warnings
    assert said == [
        "colour: 7 train rows have no label (unlabelled: -1) and are left out",
        "colour: 1 test row has no label (unlabelled: -1) and is left out",
    ]
    assert left_out_note(spec.data, "test") == said[1].removeprefix("colour: ")
    apart = resolve_task(task_of(tmp_path, data=data), FAMILY).data
    assert apart is not None
    assert left_out_note(apart, "validation") == said[0].removeprefix("colour: ")
    assert left_out_note(apart.model_copy(update={"left_out": None}), "test") is None


def test_resolving_again_changes_nothing(tmp_path: Path) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    assert resolve_task(spec, FAMILY) == spec


def test_a_task_is_the_same_wherever_its_files_lie(tmp_path: Path) -> None:
    one, other = (resolve_task(task_of(tmp_path / n), FAMILY) for n in ("one", "other"))
    assert one != other
    assert same_task(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "f1"},
        {"scale": 5},
        {"max_length": 7},
        {"head": {"labels": ["green", "red"]}},
        {"head": {"labels": ["red", "green"], "templates": ["a {}"]}},
        {"data": {"path": "rows", "validation": "test.jsonl"}},
    ],
)
def test_a_change_that_affects_results_makes_another_task(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    assert not same_task(spec, resolve_task(task_of(tmp_path, **changes), FAMILY))


def test_keys_of_prompts_leave_the_digest_of_other_tasks_alone() -> None:
    spec = TaskSpec.model_validate({"task": "t", "head": {"labels": ["a", "b"]}})
    expected = "379906ae434353ca78c3c7daedeca5095adf0d1a2fab2f65ecefc284726ed5df"
    assert description_digest(spec) == expected


def test_other_rows_make_another_task(tmp_path: Path) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    write_rows(tmp_path / "rows" / "test.jsonl", [{"text": "x", "label": 0}])
    again = resolve_task(load_task(tmp_path / "task.yaml"), FAMILY)
    assert not same_task(spec, again)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "validation", "test"), "test"),
        (("train", "validation"), "validation"),
        (("train",), "validation"),
        (("validation",), "validation"),
        ((), None),
    ],
)
def test_results_are_reported_on_test_or_else_on_validation(
    tmp_path: Path, splits: tuple[str, ...], expected: str | None
) -> None:
    data = {"path": "rows", **dict.fromkeys(splits, "test.jsonl")}
    assert evaluation_split(task_of(tmp_path, data=data)) == expected
    assert evaluation_split(TaskSpec(task="bare")) is None


def test_a_path_may_hold_an_at_sign(tmp_path: Path) -> None:
    spec = task_of(tmp_path / "user@host")
    resolved = resolve_task(spec, FAMILY)
    assert resolved.data is not None
    assert resolved.data.path == str(tmp_path / "user@host" / "rows")


def test_rows_are_read_once_for_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Workspace(Home(tmp_path / "home"))
    spec = resolve_task(task_of(tmp_path), FAMILY)
    read = []
    real = Rows.__getitem__

    def noted(rows: Rows, place: int) -> Example:
        read.append(place)
        return real(rows, place)

    monkeypatch.setattr(Rows, "__getitem__", noted)
    check_rows(spec, FAMILY, space)()
    assert read == list(range(10))
    check_rows(spec, FAMILY, space)()
    assert len(read) == 10


def test_rows_to_calibrate_on_are_read_too(tmp_path: Path) -> None:
    """Not all of train, which may be large, but those that a trained mask will ask for."""
    spec = task_of(tmp_path, data={"path": "rows", "train": "train.jsonl", "test": "test.jsonl"})
    rows: list[dict[str, Any]] = [{"text": f"t {n}", "label": n % 2} for n in range(40)]
    rows[7]["text"] = None
    write_rows(tmp_path / "rows" / "train.jsonl", rows)
    spec = resolve_task(spec, FAMILY)
    space = Workspace(Home(tmp_path / "home"))
    check_rows(spec, FAMILY, space, LocalizeSpec(mode="dataless"))()
    with pytest.raises(BadInput, match="row 7"):
        check_rows(spec, FAMILY, space, LocalizeSpec(mode="trained"))


def test_rows_to_choose_by_are_read_if_the_line_chooses_its_method(tmp_path: Path) -> None:
    splits = {"validation": "validation.jsonl", "test": "test.jsonl"}
    spec = task_of(tmp_path, data={"path": "rows", **splits})
    rows: list[dict[str, Any]] = [{"text": f"t {n}", "label": n % 2} for n in range(9)]
    rows[7]["text"] = "half \ud83d"
    write_rows(tmp_path / "rows" / "validation.jsonl", rows)
    spec = resolve_task(spec, FAMILY)
    space = Workspace(Home(tmp_path / "home"))
    check_rows(spec, FAMILY, space)
    with pytest.raises(BadInput, match=r"validation\.jsonl row 7, column 'text' has half of"):
        check_rows(spec, FAMILY, space, chosen=True)


class Notes(Reporter):
    """Keeps the warnings of a step."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_is_left_out_or_empty_is_a_warning(tmp_path: Path) -> None:
    spec = task_of(tmp_path, data={"path": "rows", "test": "folder"})
    write_rows(tmp_path / "rows" / "folder" / "t.jsonl", [{"text": "", "label": "RED"}])
    (tmp_path / "rows" / "folder" / "notes.txt").write_text("about")
    with reporting_to(notes := Notes()):
        spec = resolve_task(spec, FAMILY)
        check_rows(spec, FAMILY, Workspace(Home(tmp_path / "home")))
    assert notes.warnings == [
        f"colour: left out of {tmp_path}/rows/folder: 1 file that is not read (notes.txt)",
        "colour: t.jsonl: labels in another form: 'RED' is read as 'red'",
        "colour: 1 of 1 rows have an empty text, t.jsonl row 0 first",
    ]


def test_missing_data_names_its_task(tmp_path: Path) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    (tmp_path / "rows").rename(tmp_path / "gone")
    with pytest.raises(BadInput, match="the data of task colour is missing"):
        verified_data(spec, FAMILY)


@pytest.mark.parametrize("change", [{"classes": ["1", "0"]}, {"delimiter": ";"}, {"quotes": True}])
def test_how_rows_are_read_makes_another_task(tmp_path: Path, change: dict[str, Any]) -> None:
    spec = resolve_task(task_of(tmp_path), FAMILY)
    data = {"path": "rows", "test": "test.jsonl", **change}
    assert not same_task(spec, resolve_task(task_of(tmp_path, data=data), FAMILY))


def test_data_without_a_head_says_what_is_missing(world: World, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no head"):
        resolve_task(task_of(tmp_path, head=None), FAMILY)
