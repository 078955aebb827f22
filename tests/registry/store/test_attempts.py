"""Attempts are counted on every host, and dead ones are distinguished from running ones."""

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from restitch.merging.errors import BadInput
from restitch.registry.store.attempts import GIVEN_UP_AFTER, Attempt, Attempts, process_began
from restitch.registry.store.folder import FolderStore
from tests.shell import ROOT

# Dies in an attempt as a worker does that is killed.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from restitch.registry.store.attempts import Attempts
from restitch.registry.store.folder import FolderStore

with Attempts(FolderStore(Path(sys.argv[1])), "work").attempt():
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(FolderStore(tmp_path / "store"), "work")


def killed(tmp_path: Path) -> int:
    """Make an attempt in a process that is killed in it; its id."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(signal.SIGKILL.value)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout)


def test_an_attempt_at_work_is_unfinished_and_alive(attempts: Attempts) -> None:
    with attempts.attempt("run") as attempt:
        (found,) = attempts.unfinished()
        assert (found.number, found.run, found.is_here) == (1, "run", True)
        assert found.facts == {**attempt.facts, "failed": False}
        assert found.is_alive()
    assert attempts.unfinished() == []
    assert attempts.count == 1


def test_an_explained_error_ends_an_attempt(attempts: Attempts) -> None:
    with pytest.raises(BadInput), attempts.attempt():
        raise BadInput("the file is broken")
    assert attempts.unfinished() == []


def test_a_process_that_is_asked_to_stop_ends_its_attempt(attempts: Attempts) -> None:
    with pytest.raises(KeyboardInterrupt), attempts.attempt():
        raise KeyboardInterrupt
    assert attempts.unfinished() == []


def test_an_unexpected_error_counts_as_a_death(attempts: Attempts) -> None:
    with pytest.raises(ZeroDivisionError), attempts.attempt():
        _ = 1 // 0
    (found,) = attempts.unfinished()
    assert not found.is_alive(), "though this process lives"
    failed = attempts.store.read(f"{attempts.prefix}/0001.failed")
    assert "ZeroDivisionError" in json.loads(failed)["error"]


def test_a_killed_process_leaves_an_attempt_that_died(attempts: Attempts, tmp_path: Path) -> None:
    pid = killed(tmp_path)
    (found,) = attempts.unfinished()
    assert found.facts["pid"] == pid
    assert not found.is_alive()
    assert str(pid) in str(found)
    with attempts.attempt() as second:
        assert second.number == 2
        assert [one.is_alive() for one in attempts.unfinished()] == [False, True]


def test_a_reused_process_id_is_recognized(attempts: Attempts) -> None:
    with attempts.attempt() as attempt:
        before = Attempt(2, {**attempt.facts, "process_began": attempt.facts["process_began"] - 60})
        assert attempt.is_alive()
        assert not before.is_alive()


@pytest.mark.parametrize(("ended", "alive"), [(True, False), (False, True)])
def test_the_engine_tells_whether_a_run_on_another_host_has_ended(ended: bool, alive: bool) -> None:
    asked: list[str] = []

    def run_ended(run: str) -> bool:
        asked.append(run)
        return ended

    assert elsewhere(run="the-run").is_alive(run_ended) is alive
    assert asked == ["the-run"]


def test_an_attempt_on_an_unknown_host_counts_as_dead_after_a_day() -> None:
    assert elsewhere().is_alive()
    assert not elsewhere(age=GIVEN_UP_AFTER + timedelta(minutes=1)).is_alive()


def elsewhere(run: str | None = None, age: timedelta = timedelta(0)) -> Attempt:
    # The number is this process's, which must not matter.
    facts = {
        "host": "another-host",
        "pid": os.getpid(),
        "process_began": process_began(os.getpid()),
        "time": (datetime.now(UTC) - age).isoformat(),
        "run": run,
    }
    return Attempt(1, facts)


def test_attempts_that_begin_together_have_different_numbers(attempts: Attempts) -> None:
    together = threading.Barrier(8)
    numbers: list[int] = []

    def work() -> None:
        with attempts.attempt() as attempt:
            numbers.append(attempt.number)
            together.wait(60)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers) == list(range(1, 9))
    assert (attempts.count, attempts.unfinished()) == (8, [])


def test_other_work_has_its_own_attempts(attempts: Attempts) -> None:
    with attempts.attempt():
        other = Attempts(attempts.store, "work", 2)
        assert (other.count, other.unfinished()) == (0, [])


def test_a_process_that_is_gone_has_no_start_time() -> None:
    assert process_began(os.getpid()) == psutil.Process().create_time()
    child = psutil.Popen(["true"])
    while child.status() != psutil.STATUS_ZOMBIE:
        pass
    assert process_began(child.pid) is None, "one that nobody has waited for is gone too"
    child.wait()
    assert process_began(child.pid) is None
