"""Base, finetuned model and data from a hub are pinned to a commit at registration."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import FakeHub, fake_hub
from tests.shell import Shell
from tests.worlds import World, write_yaml

# All commands in one process, which takes seconds to start, and without MLflow. Between two rounds
# it waits for the hub to move on.
SCRIPT = """
import json, sys
from pathlib import Path
from restitch.flows.lines import adopt_mlflow
from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register
from restitch.flows.remerge import remerge
from restitch.merging.errors import RestitchError
from restitch.registry.mlflow.sync import MlflowProjection

MlflowProjection.repair = lambda *_, **__: 0
adopt_mlflow.external_models_of = lambda *_: ()
folder = Path(sys.argv[1])
for _ in sys.stdin:
    found = {}
    try:
        found["init"] = init_line(folder / "line.yaml").as_dict()
        found["register"] = register("demo", folder / "task.yaml", "team/colour").as_dict()
        found["remerge"] = remerge("demo").as_dict()
    except RestitchError as error:
        found["error"] = [error.exit_code, error.message()]
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as served:
        yield served


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@contextmanager
def rounds(hub: FakeHub, home: Path, folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run all commands once per call."""
    environment = hub.environment(folder / "cache") | {"RESTITCH_HOME": str(home)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def run() -> dict[str, Any]:
            asked.write("again\n")
            asked.flush()
            for line in answers:
                if line.startswith("{"):
                    found: dict[str, Any] = json.loads(line)
                    return found
            raise AssertionError("the process ended without an answer")

        yield run
        asked.close()
    assert process.returncode == 0


def test_a_model_from_the_hub_is_pinned_to_its_commit(
    hub: FakeHub, world: World, tmp_path: Path
) -> None:
    rows = (world.root / "data" / "colour" / "test.jsonl").read_bytes()
    commits = {
        "base": hub.commit("team/base", files_of(world.base)),
        "colour": hub.commit("team/colour", files_of(world.model("colour"))),
        "rows": hub.commit("team/rows", {"test.jsonl": rows}, kind="datasets"),
    }
    world.line(tmp_path / "line.yaml", base="team/base", retention=None)
    write_yaml(
        tmp_path / "task.yaml",
        {
            "task": "colour",
            "data": {"path": "team/rows", "test": "test", "input": "text", "label": "label"},
            "head": {"labels": ["red", "green", "blue"], "templates": ["{}", "it is {}"]},
        },
    )
    home = tmp_path / "home"
    with rounds(hub, home, tmp_path) as run:
        first = run()
        assert "error" not in first, first
        assert first["init"]["base"] == f"team/base@{commits['base']}"
        assert first["register"]["merged"]["action"] == "promoted"
        line_state = Shell(home).state()
        task = line_state.tasks["colour"]
        assert task.versions[1].model.uri == f"team/colour@{commits['colour']}"
        assert task.spec.data is not None
        assert task.spec.data.path == f"team/rows@{commits['rows']}"

        # Everything moves on, and the line stays where it is.
        before = Shell(home).head_bytes()
        hub.commit("team/base", files_of(world.model("number")))
        hub.commit("team/rows", {"test.jsonl": rows + rows}, kind="datasets")
        again = run()
    assert "error" not in again, again
    assert again["init"]["changes"] == []
    assert again["register"]["already"] is True
    assert again["remerge"]["action"] == "unchanged"
    assert Shell(home).head_bytes() == before
