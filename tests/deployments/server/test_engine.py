"""Flows in a real Prefect engine: their runs in the API, and the same bytes as without it."""

import json
import os
import re
import shutil
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.tasks.runtime.prefect_api import PrefectApi
from tests.modeling.conftest import png
from tests.servers import prefect_server
from tests.shell import Done, Shell
from tests.tiny_models import (
    tiny_classifier,
    tiny_decoder,
    tiny_encoder,
    tiny_image_model,
    tiny_masked,
    tiny_seq2seq,
    tweaked,
)
from tests.worlds import World, write_rows, write_yaml

pytestmark = pytest.mark.servers

FLOWS = {
    "onboard": {"validate", "localize", "evaluate", "log"},
    "remerge": {"stitch", "evaluate", "analyze", "log"},
}
WORKER = ("worker", "start", "--pool", "gpu", "--type", "process", "--run-once")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


def ask(api: str, path: str, **body: Any) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


@dataclass(frozen=True)
class Run:
    """A flow run with the states of its task runs, by task name in order.

    Attributes:
        named: the names of the task runs.
    """

    flow: str
    name: str
    state: str
    tasks: list[tuple[str, str]]
    named: set[str]


def runs(api: str) -> list[Run]:
    flows = {flow["id"]: flow["name"] for flow in ask(api, "flows/filter")}
    found = []
    for run in ask(api, "flow_runs/filter", sort="START_TIME_ASC"):
        of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        begun = [t for t in ask(api, "task_runs/filter", **of_run) if t["state_type"] is not None]
        tasks = [(re.split("[ -]", task["name"])[0], task["state_name"]) for task in begun]
        named = {task["name"] for task in begun}
        found.append(Run(flows[run["flow_id"]], run["name"], run["state_name"], tasks, named))
    return found


@dataclass(frozen=True)
class Both:
    """The same registrations with and without the engine.

    Attributes:
        command: the first registration with the engine, by the command.
        script: the output of `SCRIPT`, with its exit codes.
        runs: all flow runs in the API.
    """

    engine: Shell
    embedded: Shell
    command: Done
    script: Done
    runs: list[Run]


# One process for three registrations: a model, a model that cannot join, and a model whose data is
# gone when it is merged. Starting processes takes seconds.
SCRIPT = """
import json, sys
from pathlib import Path
from restitch.flows.register import register
from restitch.flows.remerge import remerge
from restitch.merging.errors import RestitchError

world, work = map(Path, sys.argv[1:])
codes = [
    register("demo", world / "number.yaml", str(world / "models/number")).exit_code,
    register("demo", world / "animal.yaml", str(world / "base")).exit_code,
    register("demo", work / "gone.yaml", str(world / "models/animal"), merge=False).exit_code,
]
(work / "gone" / "test.jsonl").write_text("")
try:
    remerge("demo")
except RestitchError as error:
    codes.append(error.exit_code)
print(json.dumps(codes))
"""


def with_data_that_goes(world: World, folder: Path) -> Path:
    """A task whose data is a copy, which may be changed."""
    shutil.copytree(world.root / "data" / "animal", folder / "gone")
    values = yaml.safe_load(world.task("animal").read_text())
    values["data"]["path"] = str(folder / "gone")
    return write_yaml(folder / "gone.yaml", {**values, "task": "gone"})


@pytest.fixture(scope="module")
def both(
    api: str, world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path
) -> Both:
    root = tmp_path_factory.mktemp("engine")
    with_data_that_goes(world, root)
    engine = Shell(root / "engine", {"PREFECT_API_URL": api})
    embedded = Shell(root / "embedded")
    for shell in (engine, embedded):
        shell.home.mkdir()
        shutil.copyfile(empty_mlflow, shell.home / "mlflow.db")
        Shell(shell.home)("init", world.line(root / "line.yaml"))
    files = ("--task", world.task("colour"), "--model", world.model("colour"), "--json")
    command = engine.process("register", "demo", *files)
    script = engine.python(SCRIPT, world.root, root)
    for task in ("colour", "number"):
        embedded.add(world, task)
    return Both(engine, embedded, command, script, runs(api))


def test_flow_runs_have_names_and_final_states(both: Both) -> None:
    assert [(run.flow, run.name) for run in both.runs] == [
        ("onboard", "demo/colour/1"),
        ("remerge", "demo"),
        ("onboard", "demo/number/1"),
        ("remerge", "demo"),
        ("onboard", "demo/animal/1"),
        ("onboard", "demo/gone/1"),
        ("remerge", "demo"),
    ]
    assert [run.state for run in both.runs] == ["Completed"] * 6 + ["Failed"]


def test_every_step_is_a_task_run(both: Both) -> None:
    for run in both.runs[:4]:
        assert {name for name, _ in run.tasks} == FLOWS[run.flow]
        assert {state for _, state in run.tasks} <= {"Completed", "Cached"}


def test_task_runs_name_their_subject(both: Both) -> None:
    onboarded, merged = both.runs[0].named, both.runs[1].named
    assert {"localize colour", "evaluate grafted on colour"} <= onboarded
    expected = {"evaluate merged on colour", "evaluate base on general", "analyze version 1"}
    assert expected <= merged


def test_results_in_the_store_are_cached_task_runs(both: Both) -> None:
    first, second, third, fourth = (Counter(run.tasks) for run in both.runs[:4])
    assert first["evaluate", "Cached"] == 0
    assert second["evaluate", "Completed"] == 3, "merged on its task and the benchmark, and base"
    assert second["evaluate", "Cached"] == 3, "base, finetuned and grafted on the task"
    assert fourth["evaluate", "Completed"] == 3, "only the merged model is evaluated"
    # Base, finetuned and grafted on two tasks, the base on the benchmark, the champion on its task.
    assert fourth["evaluate", "Cached"] == 8
    assert third["localize", "Completed"] == 1
    assert fourth["stitch", "Completed"] == 1


def test_a_quarantine_is_a_completed_flow_run(both: Both) -> None:
    run = both.runs[4]
    assert run.state == "Completed"
    assert ("validate", "Failed") in run.tasks
    assert both.engine.state().tasks["animal"].versions[1].state == "quarantined"
    assert both.engine.kinds().count("quarantined") == 1


def test_errors_pass_through_the_engine_with_their_exit_codes(both: Both) -> None:
    assert both.script.json == [0, 4, 0, 3]
    assert ("evaluate", "Failed") in both.runs[6].tasks
    assert "Traceback" not in both.script.err


def test_the_engine_gives_the_same_bytes_as_the_embedded_mode(both: Both) -> None:
    assert both.engine.patch_bytes() == both.embedded.patch_bytes()
    ours, theirs = both.engine.state(), both.embedded.state()
    for task in ("colour", "number"):
        one, other = (line_state.tasks[task].versions[1] for line_state in (ours, theirs))
        assert (one.delta, one.mask) == (other.delta, other.mask)
        process = {"localized_by": None, "seconds": None}
        assert one.facts.model_copy(update=process) == other.facts.model_copy(update=process)
    assert both.engine.kinds()[: len(both.embedded.kinds())] == both.embedded.kinds()
    for version in (1, 2):
        first, second = (s.ledger().merged(version) for s in (both.engine, both.embedded))
        assert (first.recipe_digest, first.patch) == (second.recipe_digest, second.patch)
        assert (first.results, first.retention) == (second.results, second.retention)


CHOICES = {"prompt": "{text} it was {mask}.", "choices": ["no", "one"]}
ANSWER = {"prompt": "{text} =", "answer": "label", "generate": {"max_new_tokens": 2}}
MAKERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "causal-lm": (tiny_decoder, ANSWER),
    "seq2seq-lm": (tiny_seq2seq, ANSWER),
    "masked-lm": (tiny_masked, CHOICES),
    "text-classifier": (tiny_encoder, {}),
    "image-classifier": (tiny_image_model, {}),
}

# All families in one process: each line gets a model, and a merged version.
REGISTER = """
import sys
from pathlib import Path
from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register

for family in sys.argv[2:]:
    folder = Path(sys.argv[1]) / family
    init_line(folder / "line.yaml")
    assert register(family, folder / "skill.yaml", str(folder / "models/skill")).exit_code == 0
"""


def small(root: Path, family: str) -> None:
    """A base, a finetuned model, and a task of six rows, which decide nothing."""
    world, (make, scored) = World(root / family, family), MAKERS[family]
    make(world.base)
    data = {"path": str(world.root / "data"), "test": "test.jsonl"}
    if scored:
        tweaked(world.base, world.model("skill"), seed=1, size=0.3, globs=("*layer*", "*block*"))
    else:
        tiny_classifier(world.base, world.model("skill"), ("no", "one"), size=0.3)
    if family == "image-classifier":
        data["test"] = "test"
        for n in range(6):
            file = world.root / "data" / "test" / ("no", "one")[n % 2] / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(n))
    else:
        rows = [{"text": f"{n * 79} and {n}", "label": ("no", "one")[n % 2]} for n in range(6)]
        write_rows(world.root / "data" / "test.jsonl", rows)
    write_yaml(world.task("skill"), {"task": "skill", "data": data, **scored})
    world.line(world.root / "line.yaml", line=family, retention=None)


@pytest.mark.slow
def test_a_line_of_every_family_is_merged_by_the_engine(api: str, tmp_path: Path) -> None:
    for family in MAKERS:
        small(tmp_path, family)
    engine = Shell(tmp_path / "engine", {"PREFECT_API_URL": api})
    embedded = Shell(tmp_path / "embedded")
    for shell in (engine, embedded):
        shell.home.mkdir()
    engine.python(REGISTER, tmp_path, *MAKERS)
    for family in MAKERS:
        folder = tmp_path / family
        embedded("init", folder / "line.yaml")
        files = ("--task", folder / "skill.yaml", "--model", folder / "models" / "skill")
        embedded("register", family, *files)
        ours, theirs = (shell.ledger(family).merged(1) for shell in (engine, embedded))
        assert (ours.recipe_digest, ours.patch) == (theirs.recipe_digest, theirs.patch)
        assert ours.results == theirs.results
        assert ours.results["skill"].count == 6


# Nothing in these tests takes the two seconds after which work is shown.
ENTRY = """
from restitch.deployments.server.entry import remerge_flow
from restitch.tasks.runtime import prefect_artifacts

prefect_artifacts.SHOW_AFTER_SECONDS = prefect_artifacts.UPDATE_SECONDS = 0.0
"""


def test_a_worker_shows_the_progress_of_long_steps_as_artifacts(
    both: Both, api: str, tmp_path: Path
) -> None:
    (tmp_path / "entry.py").write_text(ENTRY)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = Shell(both.embedded.home, {"PREFECT_API_URL": api, "PATH": path})
    shell.process("deploy")
    server = PrefectApi(api)
    deployment = server.deployment("remerge/restitch")
    assert deployment is not None
    server.set_entrypoint(deployment["id"], f"{tmp_path / 'entry.py'}:remerge_flow")
    run = server.create_run(deployment["id"], {"line": "demo", "force": True}, "progress")["id"]
    shell.python("from prefect.cli import app; app()", *WORKER)
    ended = server.run(run)
    assert ended is not None
    assert ended["state_type"] == "COMPLETED"
    shown = ask(api, "artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
    bars = {one["description"]: one["data"] for one in shown if one["type"] == "progress"}
    assert bars["evaluating merged on colour"] == 100.0
    assert bars["stitching"] == 100.0


def test_the_command_prints_one_json_document_with_the_engine(both: Both) -> None:
    assert both.command.json["merged"]["action"] == "promoted"


def test_a_live_server_in_the_stack_file_is_used(api: str, tmp_path: Path) -> None:
    from restitch.tasks.runtime.engine import engine_url

    (tmp_path / "stack.json").write_text(json.dumps({"prefect_api_url": api}))
    with Shell(tmp_path).inside():
        assert engine_url() == api
