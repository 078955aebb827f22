"""Fuzz every reader of untrusted files for longer than the tests do.

`python -m tests.stress.fuzz [--engine ENGINE] [--examples N] [--seed N] [--only READER]
[--json FILE]` gives each reader N inputs and counts the outcomes. If a property of the `hostile_*`
modules does not hold, it shows the smallest input and ends with exit code 1. An input that takes
longer than half a minute counts as a hang. With `--engine atheris` the inputs are guided by the
code that they reach (`fuzz_atheris`).
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

from tests.stress import (
    hostile_files,
    hostile_images,
    hostile_masks,
    hostile_rows,
    hostile_texts,
)

HANG = 30  # seconds


@dataclass(frozen=True)
class Reader:
    """One reader: its inputs, and the check of each."""

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
    Reader("rows", hostile_rows.tables(), hostile_rows.check_table),
    Reader("image", hostile_images.images(), hostile_images.check_image),
    Reader("webhook", hostile_texts.deliveries(), hostile_texts.check_delivery),
)


@dataclass(frozen=True)
class Fuzzed:
    """The outcomes of a reader's inputs.

    Attributes:
        inputs: the number of inputs.
        outcomes: the number of inputs with each outcome.
        slowest: seconds of the slowest input, with its check.
        found: the fault with the smallest input that shows it.
    """

    reader: str
    inputs: int
    outcomes: dict[str, int]
    slowest: float
    found: str | None


class HangError(Exception):
    """A reader did not return."""


def fuzz(reader: Reader, examples: int, begin: int) -> Fuzzed:
    """Give a reader inputs until one shows a fault or all are done."""
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
    """The same with Atheris, in a separate process; 0 is not a valid seed for it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "tests.stress.fuzz_atheris", reader.name, str(out)]
        numbers = [f"--examples={examples}", f"--seed={begin or 1}"]
        done = subprocess.run([*command, *numbers], capture_output=True, text=True)
        result: dict[str, Any] = {"outcomes": {}, "slowest": 0.0, "found": None}
        if out.exists():
            result = json.loads(out.read_text())
    if done.returncode and result["found"] is None:
        result["found"] = done.stderr[-3000:]
    total = sum(result["outcomes"].values())
    return Fuzzed(reader.name, total, result["outcomes"], result["slowest"], result["found"])


ENGINES = {"hypothesis": fuzz, "atheris": fuzz_with_atheris}


def _hang(_signal: int, _frame: FrameType | None) -> None:
    raise HangError(f"nothing after {HANG} seconds")


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, and show the outcomes of the inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=ENGINES, default="hypothesis")
    parser.add_argument("--examples", type=int, default=1000, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the inputs")
    parser.add_argument("--only", choices=[reader.name for reader in READERS])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
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
