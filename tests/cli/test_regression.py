"""Classifiers with one output: tasks of numbers for pairs of texts, from `init` to `export`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.specs.head import HeadSpec
from tests.conftest import NewHome, leave_mlflow_alone
from tests.shell import Shell
from tests.tiny_models import tiny_classifier, tiny_encoder
from tests.worlds import World, write_rows, write_yaml

FAMILY = get_family("text-classifier")
TASKS = ("similar", "fluent")
ROWS = 30


@dataclass(frozen=True)
class Line:
    """A home with a line of two members, and its world."""

    shell: Shell
    world: World
    registered: dict[str, Any]

    @property
    def record(self) -> Any:
        return self.registered[TASKS[-1]]["merged"]["record"]


def pairs(name: str) -> list[tuple[str, str]]:
    return [(f"{name[n % 3 :]} {n * 79 % 97}", name[: n % 5 + 1]) for n in range(ROWS)]


def outputs(base: Path, body: Path, head_of: Path, name: str) -> torch.Tensor:
    """The numbers of a task's rows with the body of one model and the head of another."""
    spec = HeadSpec(of_number=True)
    head = FAMILY.build_head(torch.nn.Identity(), base, spec, finetuned=head_of)
    batch = FAMILY.preprocessor(base)([Example(pair, None, "") for pair in pairs(name)])
    with torch.inference_mode():
        return FAMILY.logits(FAMILY.load(body), batch, head)[:, 0]


@pytest.fixture(scope="module", autouse=True)
def without_mlflow_in_this_module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_mlflow_alone(patch)
        yield


@pytest.fixture(scope="module")
def number_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An encoder, and two regressions finetuned from it whose rows are almost what they say."""
    world = World(tmp_path_factory.mktemp("numbers"), "text-classifier")
    tiny_encoder(world.base)
    for seed, name in enumerate(TASKS, 5):
        model = tiny_classifier(world.base, world.model(name), ("LABEL_0",), seed=seed, size=0.3)
        found = outputs(world.base, model, model, name)
        rows = [
            {"a": a, "b": b, "score": round(value + (0.1 if n % 2 else -0.1), 3)}
            for n, ((a, b), value) in enumerate(zip(pairs(name), found.tolist(), strict=True))
        ]
        for split in ("train", "test"):
            write_rows(world.root / "data" / name / f"{split}.jsonl", rows)
        write_yaml(world.task(name), task(world, name))
    return world


def task(world: World, name: str, **data: Any) -> dict[str, Any]:
    columns = {"test": "test.jsonl", "input": ["a", "b"], "label": "score"}
    values = {"path": str(world.root / "data" / name), **columns, **data}
    return {"task": name, "data": values, "metric": "squared_error"}


@pytest.fixture(scope="module")
def line(number_world: World, tmp_path_factory: pytest.TempPathFactory) -> Line:
    root = tmp_path_factory.mktemp("line")
    shell = Shell(root / "home")
    (root / "home").mkdir()
    shell("init", number_world.line(root / "line.yaml", retention=None))
    return Line(shell, number_world, {name: shell.add(number_world, name) for name in TASKS})


def test_the_errors_of_numbers_are_measured_and_merged(line: Line) -> None:
    for name, found in line.registered.items():
        assert (found["state"], found["merged"]["action"]) == ("ready", "promoted"), name
        result, own = line.record["results"][name], line.world.model(name)
        right = torch.tensor([row["score"] for row in rows_of(line.world, name)])
        base = outputs(line.world.base, line.world.base, own, name)
        assert result["metric"] == "squared_error"
        assert result["finetuned"] == pytest.approx(0.01, abs=1e-3)
        assert result["base"] == pytest.approx(float((base - right).square().mean()), rel=1e-4)
        assert result["finetuned"] < result["merged"]
        assert result["normalized"] == pytest.approx(result["finetuned"] / result["merged"])
        interval = result["interval"]
        assert interval["low"] <= result["merged"] <= interval["high"]
        assert result["gain"]["verdict"] == "better"


def rows_of(world: World, name: str) -> list[dict[str, Any]]:
    file = world.root / "data" / name / "test.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()]


def test_every_view_of_a_line_of_numbers_works(line: Line) -> None:
    assert "squared_error" in line.shell("show", "demo", "champion").out
    assert line.shell("diff", "demo", "1", "2").out
    assert line.shell("status", "demo").out
    found = line.shell.json("verify", "demo")
    assert found["intact"]
    assert found["rebuilt"] == [1, 2]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_exported_as_a_regression_that_gives_the_measured_error(
    line: Line, tmp_path: Path, name: str
) -> None:
    line.shell("export", "demo", "champion", tmp_path / "out", "--task", name)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    batch = FAMILY.preprocessor(tmp_path / "out")([Example(p, None, "") for p in pairs(name)])
    with torch.no_grad():
        found = model(**batch).logits[:, 0]
    right = torch.tensor([row["score"] for row in rows_of(line.world, name)])
    error = float((found - right).square().mean())
    assert error == pytest.approx(line.record["results"][name]["merged"], rel=1e-4)


@pytest.mark.parametrize("mode", ["trained", "fisher", "distilled"])
def test_every_localizer_reads_numbers(
    number_world: World, new_home: NewHome, tmp_path: Path, mode: str
) -> None:
    shell = new_home(mode)
    values = {"mode": mode, "density": 0.2, "shots": 8, "epochs": 1}
    shell("init", number_world.line(tmp_path / "line.yaml", retention=None, localize=values))
    write_yaml(tmp_path / "similar.yaml", task(number_world, "similar", train="train.jsonl"))
    files = ("--task", tmp_path / "similar.yaml", "--model", number_world.model("similar"))
    found = shell.json("register", "demo", *files)
    facts = shell.state().tasks["similar"].versions[1].facts
    assert found["state"] == "ready"
    assert facts.localizer is not None
    assert facts.localizer.startswith(mode)
    assert facts.calibration_rows == 8


@pytest.mark.parametrize("method", ["mats", "fisher-merging", "adamerging"])
def test_methods_with_statistics_measure_numbers(
    number_world: World, new_home: NewHome, tmp_path: Path, method: str
) -> None:
    shell = new_home(method)
    values = {"retention": None, "localize": None, "method": method}
    shell("init", number_world.line(tmp_path / "line.yaml", **values))
    for name in TASKS:
        write_yaml(tmp_path / f"{name}.yaml", task(number_world, name, train="train.jsonl"))
        files = ("--task", tmp_path / f"{name}.yaml", "--model", number_world.model(name))
        found = shell.json("register", "demo", *files, code=None)
    assert found["merged"]["record"]["results"]["fluent"]["merged"] > 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a text": ({"label": "b"}, "column 'b' is not a number"),
    "no such column": ({"label": "stars"}, "has no column 'stars'"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_rows_without_numbers_are_explained_and_change_nothing(
    line: Line, tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    before = line.shell.head_bytes()
    file = write_yaml(tmp_path / "t.yaml", task(line.world, "similar", **data))
    done = line.shell("task", "demo", "--task", file, "--replace-task", code=3)
    assert message in " ".join(done.err.split())
    assert line.shell.head_bytes() == before


def test_a_regression_and_a_task_of_classes_do_not_fit(line: Line, tmp_path: Path) -> None:
    classes = task(line.world, "similar") | {"task": "other", "metric": "accuracy"}
    file = write_yaml(tmp_path / "classes.yaml", classes)
    own = line.world.model("similar")
    done = line.shell("register", "demo", "--task", file, "--model", own, code=3)
    assert "write metric: squared_error in the task's file" in " ".join(done.err.split())
    chooses = tiny_classifier(line.world.base, tmp_path / "chooses", ("no", "yes"))
    file = write_yaml(tmp_path / "n.yaml", task(line.world, "similar") | {"task": "other"})
    done = line.shell("register", "demo", "--task", file, "--model", chooses, code=3)
    assert "does not give one number" in " ".join(done.err.split())


def test_a_task_of_numbers_has_no_classes(line: Line, tmp_path: Path) -> None:
    values = task(line.world, "similar") | {"head": {"labels": ["no", "yes"]}}
    file = write_yaml(tmp_path / "t.yaml", values)
    done = line.shell("task", "demo", "--task", file, code=3)
    assert "leave out 'head': metric 'squared_error' compares numbers" in " ".join(done.err.split())
