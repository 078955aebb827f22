"""One stack for all tests of this folder: servers and workers as `restitch up` starts them.

It has its own home, and an environment without a developer's settings. Tests share it: each uses
its own lines, and starts again the processes that it stops.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import psutil
import pytest

from restitch.registry.stack import StackFile
from restitch.tasks.runtime.prefect_api import PrefectApi
from tests.shell import Done, Shell
from tests.stress.test_secrets import SECRETS
from tests.worlds import World

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

# So late that no test sees it begin.
NEVER = "0 0 1 1 *"
# Prefect's own are another server's, which a stack does not use.
PLANTED = {name: value for name, value in SECRETS.items() if not name.startswith("PREFECT_")}
PATIENCE = 240.0


@dataclass(frozen=True)
class Stack:
    """A home whose servers and workers run.

    Attributes:
        shell: the command in this home.
        environment: for commands in processes of their own.
    """

    shell: Shell
    world: World
    environment: dict[str, str]

    def process(self, *args: object, code: int | None = 0) -> Done:
        """Run a command in a process of its own."""
        return self.shell.process(*args, code=code, environment=self.environment)

    @property
    def file(self) -> StackFile:
        """The stack file."""
        return StackFile.read(self.shell.home)

    @property
    def prefect(self) -> PrefectApi:
        """Our client of the Prefect server."""
        url = self.file.prefect_api_url
        assert url is not None, "the stack is down"
        return PrefectApi(url)

    @property
    def mlflow(self) -> "MlflowClient":
        """MLflow's client of the MLflow server."""
        from mlflow import MlflowClient

        uri = self.file.mlflow_uri
        assert uri is not None, "the stack is down"
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def line(self, name: str, **changes: Any) -> None:
        """Make a line without a schedule on the server, so that only events start runs."""
        from restitch.flows.lines.init_line import init_line

        file = self.world.line(
            self.shell.home.parent / f"{name}.yaml", line=name, schedule=NEVER, **changes
        )
        with self.shell.inside():
            init_line(file)

    def register(self, line: str, task: str, *, announced: bool = True) -> dict[str, Any]:
        """Register the model that has the task's name.

        Args:
            announced: tell the server; without, the event is lost.
        """
        from restitch.flows.register import register

        with self.shell.inside(), patch_unless(announced, "restitch.flows.register.announce"):
            return register(line, self.world.task(task), str(self.world.model(task))).as_dict()

    def train(self, line: str, task: str) -> None:
        """Make a version in MLflow, as a training job does that knows nothing else."""
        client, name = self.mlflow, f"{line}.{task}"
        experiment = client.get_experiment_by_name("training")
        where = (
            client.create_experiment("training") if experiment is None else experiment.experiment_id
        )
        run = client.create_run(where)
        client.log_artifacts(run.info.run_id, str(self.world.model(task)), "model")
        client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/model"
        client.create_model_version(name, source, run.info.run_id, {"team": "vision"})

    def remerge(self, line: str, key: str) -> str:
        """Start a remerge as the schedule does, and return its id."""
        deployment = self.prefect.deployment("remerge/restitch")
        assert deployment is not None
        return str(self.prefect.create_run(deployment["id"], {"line": line}, key)["id"])

    def runs(self, flow: str, line: str, *states: str) -> list[dict[str, Any]]:
        """The runs of a line, in the given states or all."""
        every = ("SCHEDULED", "PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        found = self.prefect.runs(flow, "restitch", *(states or every))
        return [run for run in found if run["parameters"].get("line") == line]

    def finished(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run."""

        def look() -> dict[str, Any] | None:
            found = self.prefect.run(run)
            assert found is not None
            over = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
            return found if found["state_type"] in over else None

        return self.until(f"run {run} is over", look)

    def champion(self, line: str, *tasks: str) -> set[str]:
        """Wait until the champion has these tasks; return all of its tasks."""

        def look() -> set[str] | None:
            ledger = self.shell.ledger(line)
            champion = ledger.state().champion
            members = set() if champion is None else set(ledger.merged(champion).members)
            return members if set(tasks) <= members else None

        return self.until(f"the champion of {line} has {', '.join(tasks)}", look)

    def until(self, what: str, look: Callable[[], T | None]) -> T:
        """Wait until `look` returns something, and return it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = look()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"not after {PATIENCE:.0f} s: {what}\n{self._logs()}")

    def processes(self) -> list[psutil.Process]:
        """Every process that works in this home."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RESTITCH_HOME") == str(self.shell.home):
                    found.append(process)
        return found

    def _logs(self) -> str:
        logs = sorted((self.shell.home / "logs").glob("*.log"))
        tails = (f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
        return "\n".join(tails)


def patch_unless(condition: bool, name: str) -> Any:
    """Replace a function by one that does nothing, unless the condition holds."""
    from contextlib import nullcontext

    return nullcontext() if condition else patch(name, lambda *_, **__: False)


@pytest.fixture(scope="package")
def stack(
    tmp_path_factory: pytest.TempPathFactory, world: World, empty_mlflow: Path
) -> Iterator[Stack]:
    """A Prefect server, an MLflow server, the receiver of webhooks, and two workers.

    All have secrets in their environment, which must not appear anywhere else.
    """
    root = tmp_path_factory.mktemp("stack")
    (root / "home").mkdir()
    shutil.copyfile(empty_mlflow, root / "home" / "mlflow.db")
    with running_stack(root, world, **PLANTED) as found:
        yield found


@contextmanager
def running_stack(root: Path, world: World, **variables: str) -> Iterator[Stack]:
    """A stack with two workers for the length of the context.

    Args:
        root: a folder for its home, which may be there already.
        variables: the environment of the first `up`, and of no later one.
    """
    (root / "home").mkdir(exist_ok=True)
    (root / "user").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root / "user"),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    found = Stack(Shell(root / "home"), world, environment)
    try:
        up = replace(found, environment={**environment, **variables})
        told = json.loads(up.process("up", "--workers", 2, "--json").out)
        assert told["started"] == ["prefect", "mlflow", "webhook", "worker-1", "worker-2"]
        yield found
        found.process("down")
        left = [" ".join(process.cmdline()) for process in found.processes()]
        assert left == [], "everything that `up` started has ended"
        assert [path.name for path in (root / "user").iterdir()] == []
    finally:
        for process in found.processes():
            with suppress(psutil.Error):
                process.kill()
