"""Give every test run an environment of its own, and fixtures that make homes and worlds.

A developer's settings for restitch, Prefect and MLflow do not reach a test. Tests write nothing to
the developer's home and report nothing to anyone.
"""

import gc
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The tests that draw the plots of reports: of all kinds of lines, and of the plots themselves.
_WITH_PLOTS = (
    "tasks",
    "playground",
    "cli/test_end_to_end.py",
    "cli/test_classifiers.py",
    "cli/test_language_models.py",
    "flows/audit/test_report.py",
    "flows/research",
    "flows/test_adapter_space.py",
    "flows/test_subspaces.py",
)
_FOREIGN = ("RESTITCH_", "PREFECT_", "MLFLOW_")
for _name in [name for name in os.environ if name.startswith(_FOREIGN)]:
    del os.environ[_name]
# Before the first import of these libraries, which read their folders then.
_libraries = Path(tempfile.mkdtemp(prefix="restitch-tests-"))
os.environ.update(
    {
        "PREFECT_HOME": str(_libraries / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

from tests.shell import ROOT, Shell  # noqa: E402
from tests.worlds import SKILLS, World  # noqa: E402
from tests.worlds import clip_world as make_clip_world  # noqa: E402
from tests.worlds import text_world as make_text_world  # noqa: E402

NewHome = Callable[[str], Shell]

# How long a test takes depends on the machine, and is no failure.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")


@dataclass(frozen=True)
class Three:
    """A line with three members.

    Attributes:
        registered: the output of `register --json` by task, in the order of registration.
    """

    shell: Shell
    registered: dict[str, Any]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, and all files that share the servers of `up`."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "the stack" if file.startswith("tests/deployments/local/test_stack") else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Look for garbage more rarely, and not in libraries and tests.

    Two files of flows needed an eighth less processor time so.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Sync no file in this process: tests kill processes, and cut no power.

    A seventh of the time of flows was spent on it. Processes of their own do sync.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    shutil.rmtree(_libraries, ignore_errors=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A text world; read only."""
    return make_text_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def clip_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of images; read only."""
    return make_clip_world(tmp_path_factory.mktemp("clip-world"))


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty database of MLflow, which takes MLflow two seconds to make."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from restitch.registry.home import Home
    from restitch.registry.mlflow.connection import connect

    @event.listens_for(Engine, "connect")
    def _do_not_wait_for_the_disk(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            with suppress(sqlite3.DatabaseError):
                connection.execute("PRAGMA synchronous=OFF")

    home = Home(tmp_path_factory.mktemp("mlflow"))
    connect(home).search_registered_models()
    yield home.root / "mlflow.db"
    event.remove(Engine, "connect", _do_not_wait_for_the_disk)


@pytest.fixture
def new_home(tmp_path: Path, empty_mlflow: Path) -> NewHome:
    """Make homes by name, each with the command that works in it."""

    def make(name: str) -> Shell:
        home = tmp_path / name
        home.mkdir()
        shutil.copyfile(empty_mlflow, home / "mlflow.db")
        return Shell(home)

    return make


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, world: World, empty_mlflow: Path) -> Three:
    """A home with three models in its champion; read only."""
    root = tmp_path_factory.mktemp("three")
    (root / "home").mkdir()
    shutil.copyfile(empty_mlflow, root / "home" / "mlflow.db")
    shell = Shell(root / "home")
    shell("init", world.line(root / "line.yaml"))
    return Three(shell, {name: shell.add(world, name) for name in SKILLS})


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave MLflow alone, which takes most of the time of a registration."""
    leave_mlflow_alone(monkeypatch)


def leave_mlflow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write nothing to MLflow and read nothing from it."""
    from restitch.flows.lines import adopt_mlflow
    from restitch.registry.mlflow.sync import MlflowProjection

    monkeypatch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
    monkeypatch.setattr(adopt_mlflow, "external_models_of", lambda *_: ())


@pytest.fixture(autouse=True)
def _blank_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots of reports empty, which take most of their time, in all other tests."""
    path = request.path.relative_to(ROOT / "tests").as_posix()
    if not path.startswith(_WITH_PLOTS):
        monkeypatch.setattr("restitch.tasks.report.page.to_svg", lambda _: "")
        monkeypatch.setattr("restitch.tasks.report.page.to_file", lambda _: b"")


@pytest.fixture
def shell(new_home: NewHome) -> Shell:
    """The command in a fresh home."""
    return new_home("home")
