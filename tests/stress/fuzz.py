"""Fuzz every reader of somebody else's files for longer than the tests do.

`python -m tests.stress.fuzz [--engine ENGINE] [--examples N] [--seed N] [--only READER]
[--json FILE]` gives each reader N inputs, counts what became of them, and ends with 1 where
a property of the `hostile_*` modules here did not hold, with the smallest input that shows
it. An input that takes longer than half a minute counts as a hang. With `--engine atheris`
inputs are led by the code that they reach (`tests.stress.fuzz_atheris`).
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from tests.stress import hostile_files, hostile_masks, hostile_texts

HANG = 30  # seconds


@dataclass(frozen=True)
class Reader:
    """One reader: its inputs, and the check of all that must hold of each."""

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], str]


READERS = (
    Reader("checkpoint", hostile_files.checkpoints(), hostile_files.check_checkpoint),
    Reader("delta, patch", hostile_files.sparse_files(), hostile_files.check_sparse),
    Reader("specialist", hostile_masks.masks(), hostile_masks.check_mask),
    Reader("positions", hostile_files.positions(), hostile_files.check_positions),
    Reader("line file", hostile_texts.lines(), hostile_texts.check_line),
    Reader("task file", hostile_texts.tasks(), hostile_texts.check_task),
    Reader("webhook", hostile_texts.deliveries(), hostile_texts.check_delivery),
)


@dataclass(frozen=True)
class Fuzzed:
    """What became of a reader's inputs.

    Attributes:
        inputs: how many were tried.
        outcomes: how many ended in each way.
        slowest: seconds that the slowest took, reading and checking.
        found: what did not hold, with the smallest input that shows it.
    """

    reader: str
    inputs: int
    outcomes: dict[str, int]
    slowest: float
    found: str | None


class HangError(Exception):
    """A reader did not come back."""


def fuzz(reader: Reader, examples: int, begin: int) -> Fuzzed:
    """Give a reader inputs until one shows a fault, or there have been enough."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    @seed(begin)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs)
    def every(value: Any) -> None:
        nonlocal slowest
        started = time.perf_counter()
        signal.alarm(HANG)
        try:
            outcomes[reader.check(value)] += 1
        finally:
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - started)

    try:
        every()
        found = None
    except Exception as error:
        found = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    total = sum(outcomes.values())
    return Fuzzed(reader.name, total, dict(sorted(outcomes.items())), round(slowest, 3), found)


def fuzz_with_atheris(reader: Reader, examples: int, begin: int) -> Fuzzed:
    """The same with Atheris, in a process of its own; 0 is no seed for it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "tests.stress.fuzz_atheris", reader.name, str(out)]
        numbers = [f"--examples={examples}", f"--seed={begin or 1}"]
        done = subprocess.run([*command, *numbers], capture_output=True, text=True)
        told: dict[str, Any] = {"outcomes": {}, "slowest": 0.0, "found": None}
        if out.exists():
            told = json.loads(out.read_text())
    if done.returncode and told["found"] is None:
        told["found"] = done.stderr[-3000:]
    total = sum(told["outcomes"].values())
    return Fuzzed(reader.name, total, told["outcomes"], told["slowest"], told["found"])


ENGINES = {"hypothesis": fuzz, "atheris": fuzz_with_atheris}


def _hang(_signal: int, _frame: FrameType | None) -> None:
    raise HangError(f"nothing after {HANG} seconds")


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, and show what became of the inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=ENGINES, default="hypothesis")
    parser.add_argument("--examples", type=int, default=1000, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=0, help="where the inputs begin")
    parser.add_argument("--only", choices=[reader.name for reader in READERS])
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    given_ = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _hang)
    console = Console()
    done = []
    for reader in READERS:
        if given_.only in (None, reader.name):
            done.append(ENGINES[given_.engine](reader, given_.examples, given_.seed))
            console.print(f"{reader.name}: {done[-1].inputs} inputs")
    console.print(_table(done))
    for each in done:
        if each.found:
            console.print(f"{each.reader}: {each.found}", markup=False)
    if given_.json:
        given_.json.write_text(json.dumps([asdict(each) for each in done], indent=1))
    return 1 if any(each.found for each in done) else 0


def _table(done: list[Fuzzed]) -> Table:
    table = Table("reader", "inputs", "outcomes", "slowest [s]", "faults")
    for each in done:
        outcomes = ", ".join(f"{name} {count}" for name, count in each.outcomes.items())
        fault = "one" if each.found else "none"
        table.add_row(each.reader, str(each.inputs), outcomes, f"{each.slowest:.2f}", fault)
    return table


if __name__ == "__main__":
    sys.exit(main())
