"""`evaluate` measures the data as it is now, or refuses it."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.shell import Shell
from tests.worlds import ROWS, World, write_rows, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


def own_copy(world: World, folder: Path, name: str) -> tuple[Path, Path]:
    """A task file with a copy of its rows: (the task file, the rows)."""
    values = yaml.safe_load(world.task(name).read_text())
    shutil.copytree(values["data"]["path"], folder / name)
    values["data"]["path"] = str(folder / name)
    return write_yaml(folder / f"{name}.yaml", values), folder / name / "test.jsonl"


def relabelled(rows: Path) -> None:
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    labels = sorted({row["label"] for row in read})
    turned = {label: labels[index - 1] for index, label in enumerate(labels)}
    write_rows(rows, [{**row, "label": turned[row["label"]]} for row in read])


def removed(rows: Path) -> None:
    rows.unlink()


@pytest.mark.parametrize("change", [relabelled, removed])
@pytest.mark.parametrize("of", ["a task", "the benchmark"])
def test_changed_data_is_refused_like_a_forced_remerge_does(
    world: World, shell: Shell, tmp_path: Path, change: Any, of: str
) -> None:
    task, rows = own_copy(world, tmp_path, "colour")
    general, benchmark = own_copy(world, tmp_path, "general")
    shell("init", world.line(tmp_path / "line.yaml", retention=str(general)))
    shell("register", "demo", "--task", task, "--model", world.model("colour"))
    before = shell("evaluate", "demo").out
    file, name = (rows, "colour") if of == "a task" else (benchmark, "general")
    kept = file.read_bytes()
    change(file)
    refused = shell("evaluate", "demo", code=3)
    assert name in refused.err
    assert refused.out == ""
    assert (
        shell("remerge", "demo", "--force", code=3).err.splitlines()[0]
        == (refused.err.splitlines()[0])
    )
    file.write_bytes(kept)
    assert shell("evaluate", "demo").out == before


def test_rows_without_a_label_are_left_out_and_reported(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    task, rows = own_copy(world, tmp_path, "colour")
    with rows.open("a") as stream:
        stream.write('{"text": "x", "label": "-1"}\n')
    values = yaml.safe_load(task.read_text())
    values["data"]["unlabelled"] = -1
    general = write_yaml(task.with_name("general.yaml"), values | {"task": "general"})
    line = world.line(tmp_path / "line.yaml", localize={"density": 1}, retention=str(general))
    shell("init", line)
    shell("register", "demo", "--task", write_yaml(task, values), "--model", world.model("colour"))
    note = "1 test row has no label (unlabelled: -1) and is left out"
    shown = shell.json("show", "demo", "1")
    for measured in (shown["results"]["colour"], shown["retention"]):
        assert (measured["count"], measured["notes"]) == (ROWS, [note])
    for name in ("colour", "general"):
        assert f"{name}: {note}" in shell("show", "demo", "1").out
    shell("report", "demo", "1", tmp_path / "report.html")
    assert html.unescape((tmp_path / "report.html").read_text()).count(note) >= 2
    shell("export", "demo", "1", tmp_path / "out")
    assert note in (tmp_path / "out" / "README.md").read_text()
