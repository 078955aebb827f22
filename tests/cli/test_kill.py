"""After a kill or an interrupt at any time, the next command finds a consistent state.

The command runs in children of its own, which are killed for good: at every call that makes
something durable, one after the other, and at seeded random moments.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from restitch.registry.mlflow.sync import MlflowProjection
from tests.conftest import NewHome, Three
from tests.flows.test_localizing import with_splits
from tests.flows.test_mlflow_projection import client_of, image
from tests.shell import Shell
from tests.worlds import World, write_yaml

ALL = ["configured", "registered", "localized", "merged", "promoted"]
MADE = ("keys/mask/", "keys/fisher/", "/audit/")
DURABLE = ("fsync", "link", "replace", "rename", "unlink", "rmdir")

# Children of a server that has imported everything and computed nothing: a fork of this very
# process would wait for ever for the threads that torch has started here.
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(
    [
        *(
            "restitch.cli.main",
            "restitch.flows.lines.init_line",
            "restitch.flows.register",
            "restitch.flows.remerge",
            "restitch.flows.export",
            "restitch.flows.follow",
        ),
        *("restitch.flows.decisions", "tests.cli.test_kill"),
    ]
)


def run(
    shell: Shell,
    command: tuple[object, ...],
    limit: int | None = None,
    report: Path | None = None,
    names: tuple[str, ...] = DURABLE,
) -> int:
    """Run a command without MLflow in a child, counting the calls of those names.

    Of each call that was made, `report` has a line: its last argument.

    Returns:
        The exit code, negative for a signal, as `subprocess` has it.
    """
    child = children.Process(target=_counted, args=(shell, command, limit, report, names))
    child.start()
    return waited(child)


def calls_in(report: Path) -> int:
    return len(report.read_text().splitlines())


def waited(child: ForkServerProcess) -> int:
    child.join(120)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("the command did not end in two minutes")
    return child.exitcode


def _counted(
    shell: Shell,
    command: tuple[object, ...],
    limit: int | None,
    report: Path | None,
    names: tuple[str, ...],
) -> None:
    """Kill this process at the n-th durable write."""
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if limit is not None and calls > limit:
                os.kill(os.getpid(), signal.SIGKILL)
            if report is not None:
                with report.open("a") as lines:
                    lines.write(f"{args[-1]}\n")
            return real(*args, **kwargs)

        return call

    # The image in MLflow is most of the time of a small registration.
    setattr(MlflowProjection, "repair", lambda *_, **__: 0)  # noqa: B010
    for name in names:
        setattr(os, name, wrap(getattr(os, name)))
    sys.exit(shell(*command, code=None).code)


def _interruptible(shell: Shell, command: tuple[object, ...], said: Path, started: Event) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started.set()
    done = shell(*command, code=None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself has ended
    said.write_text(done.err)
    sys.exit(done.code)


def kill_points(calls: int, every: bool) -> range:
    """The calls at which to kill: all, or about eight of them."""
    return range(0, calls, 1 if every else max(1, calls // 8))


every_one = pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
some_or_all = pytest.mark.parametrize("every", [False, every_one], ids=["some", "all"])


@pytest.fixture
def command(world: World, tmp_path: Path) -> tuple[object, ...]:
    """A registration without data: every write, and no evaluation."""
    task = write_yaml(tmp_path / "task.yaml", {"task": "colour"})
    return ("register", "demo", "--task", task, "--model", world.model("colour"))


@some_or_all
@pytest.mark.usefixtures("without_mlflow")
def test_a_registration_can_be_killed_at_every_write(
    world: World, new_home: NewHome, tmp_path: Path, command: tuple[object, ...], every: bool
) -> None:
    start = new_home("start")
    start("init", world.line(tmp_path / "line.yaml", retention=None))
    report = tmp_path / "calls"

    def fresh(name: str) -> Shell:
        shutil.copytree(start.home, tmp_path / name)
        return Shell(tmp_path / name)

    undisturbed = fresh("undisturbed")
    assert run(undisturbed, command, report=report) == 0
    calls = calls_in(report)
    assert calls > 20
    seen = set()
    for limit in kill_points(calls, every):
        shell = fresh(f"killed-{limit}")
        assert run(shell, command, limit) == -signal.SIGKILL
        kinds = shell.kinds()
        assert kinds == ALL[: len(kinds)]
        seen.add(len(kinds))
        shell("status")
        assert shell(*command).code == 0
        assert shell.kinds() == ALL
        assert shell.patch_bytes() == undisturbed.patch_bytes()
        assert shell.json("remerge", "demo")["action"] == "unchanged"
        shutil.rmtree(shell.home)
    assert seen >= ({1, 2, 3, 4, 5} if every else {1, 2, 4})


@pytest.mark.usefixtures("without_mlflow")
def test_an_onboarding_can_be_killed_at_every_write_about_its_statistics(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    kept = {"mode": "dataless", "density": 1, "shots": 4}
    given = {"method": {"name": "fisher-merging"}, "localize": kept, "retention": None}
    start, report = new_home("start"), tmp_path / "calls"
    start("init", world.line(tmp_path / "line.yaml", **given))
    file = with_splits(world, tmp_path / "task", splits={"train": slice(0, 12)})
    command = ("register", "demo", "--task", file, "--model", world.model("colour"))

    def fresh(name: str) -> Shell:
        shutil.copytree(start.home, tmp_path / name)
        return Shell(tmp_path / name)

    undisturbed = fresh("undisturbed")
    assert run(undisturbed, command, report=report, names=("link",)) == 0
    # Every object is published by a link: the statistic, its key, and the act that names it.
    made = report.read_text().splitlines()
    places = {name: [n for n, path in enumerate(made) if name in path] for name in MADE}
    (mask,), (fisher,) = places["keys/mask/"], places["keys/fisher/"]
    act = min(n for n in places["/audit/"] if n > fisher)
    assert mask < fisher < act
    for limit in (fisher, act):
        shell = fresh(f"killed-{limit}")
        assert run(shell, command, limit, names=("link",)) == -signal.SIGKILL
        assert shell.kinds() == ALL[:2]
        assert shell(*command).code == 0
        assert shell.kinds() == ALL
        assert shell.patch_bytes() == undisturbed.patch_bytes()
        (one,) = (shell.home / "store" / "keys" / "fisher").iterdir()
        assert one.name == Path(made[fisher]).name
        shutil.rmtree(shell.home)


@pytest.mark.usefixtures("without_mlflow")
def test_init_can_be_killed_at_every_write(world: World, tmp_path: Path) -> None:
    command, report = ("init", world.line(tmp_path / "line.yaml")), tmp_path / "calls"
    assert run(Shell(tmp_path / "undisturbed"), command, report=report) == 0
    for limit in range(calls_in(report)):
        shell = Shell(tmp_path / f"killed-{limit}")
        assert run(shell, command, limit) == -signal.SIGKILL
        shell("status")
        shell(*command)
        assert shell.kinds() == ["configured"]


def states(shell: Shell) -> dict[str, dict[int, str]]:
    tasks = shell.state().tasks.items()
    return {name: {n: v.state for n, v in task.versions.items()} for name, task in tasks}


@some_or_all
@pytest.mark.slow
@pytest.mark.usefixtures("without_mlflow")
def test_a_gated_remerge_can_be_killed_at_every_write(
    world: World, new_home: NewHome, tmp_path: Path, every: bool
) -> None:
    """One that ends with a rejected version, a promoted one and a held member."""
    line = tmp_path / "line.yaml"
    start = new_home("start")
    start("init", world.line(line, gates={"min_retention": 0.25}))
    start.add(world, "colour")
    for task in ("wreck", "number"):
        start.add(world, task, "--no-remerge")
    report = tmp_path / "calls"
    command = ("remerge", "demo")
    # Every act ends by replacing the head.
    names = DURABLE if every else ("replace",)

    undisturbed = Shell(tmp_path / "undisturbed")
    shutil.copytree(start.home, undisturbed.home)
    assert run(undisturbed, command) == 5
    # With all evaluations in the store, what is left are the acts.
    for folder in ("blobs", "keys"):
        place = undisturbed.home / "store" / folder
        shutil.copytree(place, start.home / "store" / folder, dirs_exist_ok=True)
    shell = Shell(tmp_path / "killed")
    shutil.copytree(start.home, shell.home)
    assert run(shell, command, None, report, names) == 5
    calls = calls_in(report)
    for limit in range(calls):
        shutil.rmtree(shell.home)
        shutil.copytree(start.home, shell.home)
        assert run(shell, command, limit, None, names) == -signal.SIGKILL
        shell(*command, code=None)
        assert shell.kinds() == undisturbed.kinds(), f"killed at {limit} of {calls}"
        assert shell.patch_bytes() == undisturbed.patch_bytes()
        assert states(shell) == states(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_registration_can_be_interrupted_at_random_times(
    world: World, new_home: NewHome, tmp_path: Path, sent: signal.Signals
) -> None:
    """With evaluation and MLflow, repeated in the same home until it finishes."""
    undisturbed, shell = new_home("undisturbed"), new_home("home")
    undisturbed("init", world.line(tmp_path / "line.yaml"))
    started = time.monotonic()
    undisturbed.add(world, "colour")
    seconds = time.monotonic() - started
    shell("init", tmp_path / "line.yaml")
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    command = ("register", "demo", *files)
    draw = random.Random(2)
    said = tmp_path / "said"

    def started_child() -> ForkServerProcess:
        started = children.Event()
        child = children.Process(target=_interruptible, args=(shell, command, said, started))
        child.start()
        assert started.wait(60)
        return child

    for _ in range(6):
        said.write_text("")
        child = started_child()
        time.sleep(draw.uniform(0.02, 0.8) * seconds)
        if child.exitcode is None:
            os.kill(child.pid or 0, sent)
        code = waited(child)
        assert code in (0, -signal.SIGKILL if sent == signal.SIGKILL else 130)
        if code == 130:
            assert "interrupted" in said.read_text()
        kinds = shell.kinds()
        assert kinds == ALL[: len(kinds)]
    assert waited(started_child()) == 0
    assert shell.kinds() == ALL
    assert shell.patch_bytes() == undisturbed.patch_bytes()
    shell("remerge", "demo")
    pictures = [image(client_of(one)) for one in (shell, undisturbed)]
    for one in pictures:
        assert {status for _, status, _, _ in one["runs"]} == {"FINISHED"}
    counts = [{key: len(value) for key, value in one.items()} for one in pictures]
    assert counts[0] == counts[1], "nothing is doubled, nothing is missing"


def test_an_interrupt_exits_with_130_and_without_a_traceback(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """Send Ctrl-C to a process, as a terminal does."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    process = shell.start("register", "demo", *files)
    keys = shell.home / "store" / "audit"
    deadline = time.monotonic() + 120
    while len(list(keys.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "interrupted" in told
    assert "Traceback" not in told
    found = shell.add(world, "colour")
    assert found["state"] == "ready"
    assert shell.kinds() == ALL


DROPS = {
    "a destructor": """
class Doomed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def drop():
    Doomed()
""",
    "a library": """
def drop():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
""",
}


@pytest.mark.parametrize("where", DROPS)
def test_an_interrupt_that_is_dropped_is_sent_again(shell: Shell, where: str) -> None:
    """Python ignores every exception within a destructor, and would continue the command."""
    script = f"""
import signal, sys, time
import restitch.cli.main
{DROPS[where]}
def work(**_):
    drop()
    time.sleep(30)
    print("went on")
restitch.cli.main.command = lambda: work
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    restitch.cli.main.main()
except SystemExit as end:
    print(end.code)
"""
    done = shell.python(script)
    assert done.out.strip() == "130"
    assert "interrupted" in done.err
    assert "Traceback" not in done.err


def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt(shell: Shell) -> None:
    """Pydantic does so with one that comes while it writes a model."""
    script = """
import signal
import restitch.cli.main
def work(**_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("cannot be written") from error
restitch.cli.main.command = lambda: work
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    restitch.cli.main.main()
except SystemExit as end:
    print(end.code)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = shell.python(script)
    assert done.out.split() == ["130", "True"]
    assert "interrupted" in done.err
    assert "Traceback" not in done.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("without_mlflow")
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_a_killed_export_leaves_no_half_model(
    three: Three, tmp_path: Path, options: tuple[str, ...]
) -> None:
    report, out = tmp_path / "calls", tmp_path / "place" / "out"
    command = ("export", "demo", "1", out, *options)

    def start() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if options:
            three.shell("export", "demo", "3", out)

    start()
    allowed = [contents(out)] if options else []
    assert run(three.shell, command, report=report) == 0
    calls = calls_in(report)
    allowed.append(contents(out))
    for limit in range(calls):
        start()
        run(three.shell, command, limit)
        found = [contents(folder) for folder in out.parent.iterdir()]
        if out.exists():
            assert contents(out) in allowed
        elif options:
            assert allowed[0] in found, "the old model is still there"
        three.shell("export", "demo", "1", out, "--overwrite")
        assert contents(out) == allowed[-1]


@some_or_all
@pytest.mark.usefixtures("without_mlflow")
def test_a_killed_follower_leaves_a_folder_that_is_complete(
    three: Three, tmp_path: Path, every: bool
) -> None:
    """The first look, an update, and an update that removes the version before the last one."""
    report, folder, said = tmp_path / "calls", tmp_path / "served", tmp_path / "said"
    names = (*DURABLE, "symlink", "mkdir", "open")
    shell = Shell(tmp_path / "home")
    shutil.copytree(three.shell.home, shell.home)
    command = ("follow", "demo", folder, "--once", "--exec", f"echo $RESTITCH_VERSION >> {said}")
    allowed: list[dict[str, bytes]] = []

    def served() -> dict[str, bytes]:
        found = contents(folder / "current")
        return {name: data for name, data in found.items() if name != ".follow.json"}

    for version in (1, 2, 3):
        if shell.state().champion != version:
            shell("rollback", "demo", version, "--reason", "a test")
        shell("export", "demo", version, tmp_path / f"{version}")
        allowed.append(contents(tmp_path / f"{version}"))
        before = tmp_path / f"before-{version}"
        if folder.exists():
            shutil.copytree(folder, before, symlinks=True)
        if not every and version < 3:
            shell(*command)
            continue
        report.unlink(missing_ok=True)
        assert run(shell, command, report=report, names=names) == 0
        for limit in kill_points(calls_in(report), every):
            shutil.rmtree(folder)
            if before.exists():
                shutil.copytree(before, folder, symlinks=True)
            said.write_text("")
            assert run(shell, command, limit, names=names) == -signal.SIGKILL
            if before.exists() or (folder / "current").exists():
                assert served() in allowed[-2:]
            shell(*command)
            assert served() == allowed[-1]
            assert said.read_text().split()[-1:] == [str(version)], "it ran at least once"
            last = {str(number) for number in (version - 1, version) if number}
            assert {path.name for path in (folder / "versions").iterdir()} == last
            hidden = {path.name for path in folder.rglob(".*")}
            assert hidden == {".lock", ".follow.json"}
