"""Subspaces against masks on real tasks: bytes, grafted and merged accuracy per rank.

    python -m benchmarks.subspaces --data DIR [--family clip] [--ranks 1/6,1/12] [--work DIR]

DIR has the form that `benchmarks.text` describes. Every rank, and every way to store the factors,
is a line of its own, merged by `tsv-m` with its default coefficient and with the one that is best
on validation rows (`restitch compare --tune`). Masks get the budget of the first rank in bytes.
Nothing is tuned on test rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean

from rich.console import Console

from benchmarks.text import Outcome, Setting, measure, write_task_files
from restitch.cli.reporter import TerminalReporter
from restitch.flows.research.compare import compare
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.runtime.console import reporting_to

METHOD = "tsv-m"
VALUES = ("int8", "bf16")


@dataclass(frozen=True)
class Row:
    """One line of the table: normalized means, and the coefficient that was tuned."""

    name: str
    share: float
    grafted: float
    merged: float | None
    tuned: float | None = None
    alpha: float | None = None

    def cells(self) -> list[str]:
        """The row as text."""
        values = (self.grafted, self.merged, self.tuned)
        shown = ["" if value is None else f"{value:.3f}" for value in values]
        return [
            self.name,
            f"{self.share:.1%}",
            *shown,
            "" if self.alpha is None else f"{self.alpha:g}",
        ]


HEADER = ("kept", "of the base", "grafted", "merged", "merged, tuned", "alpha")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all lines and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subspaces")
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks")
    parser.add_argument("--family", default="text-encoder", choices=("text-encoder", "clip"))
    parser.add_argument("--ranks", default="1/6,1/12,1/24,1/48", help="shares of the rank")
    parser.add_argument("--masks", default="dataless", help="modes of masks of equal bytes")
    parser.add_argument("--include", default="", help="globs of more localizable tensors")
    parser.add_argument("--no-tuning", action="store_true")
    parser.add_argument("--work", type=Path, help="keep checkpoints and home here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        run(options, options.work.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, work: Path) -> None:
    """Make the checkpoints, run every line, and print the table."""
    os.environ["RESTITCH_HOME"] = str(work / "home")
    prepare_environment(Home.from_environment())
    checkpoints = work / "checkpoints"
    if not checkpoints.exists():
        script = options.data.absolute() / "make_checkpoints.py"
        subprocess.run([sys.executable, str(script), str(checkpoints)], check=True)
    tasks, benchmark = write_task_files(options.data.absolute(), work)
    rows = []
    with reporting_to(TerminalReporter()):
        for setting in settings(options):
            found = measure(setting, options.family, work, tasks, benchmark)
            rows.append(row_of(found, tuned=setting.method == METHOD and not options.no_tuning))
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER))]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    Console(width=200).print(text, markup=False)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Whole task vectors, every subspace, and masks of the bytes of the largest one."""
    include = [glob for glob in options.include.split(",") if glob]
    whole = {"mode": "dataless", "density": 1.0, "include": include}
    yield Setting("whole task vectors", whole, METHOD)
    for text in options.ranks.split(","):
        for values in VALUES:
            rank = {"rank": float(Fraction(text)), "values": values}
            choice = {"mode": "subspace", **rank, "include": include}
            name = f"rank {text} {values}".replace("/", "-")
            yield Setting(name, choice, METHOD)
    for mode in filter(None, options.masks.split(",")):
        for density in (0.05, 0.2):
            choice = {"mode": mode, "density": density, "include": include}
            yield Setting(f"{mode} mask {density:.0%}", choice, "localize-and-stitch")


def row_of(found: Outcome, *, tuned: bool) -> Row:
    """The normalized means of a line; tuned by a comparison, if asked."""
    record = found.record
    row = Row(found.setting, found.share, _grafted(record), record.mean_normalized)
    if not tuned:
        return row
    (best,) = compare(record.line, (METHOD,), tuned=True).methods
    alpha = float(best.settings["alpha"])
    return Row(row.name, row.share, row.grafted, row.merged, best.mean_normalized, alpha)


def _grafted(record: MergedRecord) -> float:
    """The mean grafted over finetuned value of the tasks."""
    return fmean(
        result.grafted / result.finetuned
        for result in record.results.values()
        if result.grafted is not None and result.finetuned
    )


if __name__ == "__main__":
    main()
