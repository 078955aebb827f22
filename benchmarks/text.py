"""Real tasks through restitch: base, finetuned, grafted and merged accuracy per setting.

    python -m benchmarks.text --data DIR [--family clip] [--markdown FILE]

DIR has a folder per task (`task.json` with labels, templates, scale, max_length; `train`,
`validation` and `test` as .jsonl or .parquet) and `make_checkpoints.py`, which writes the base
and one finetuned model per task. A folder with test rows only is the general benchmark. Every
setting is a separate line in one home, registered and merged by the functions behind
`restitch init`, `register` and `remerge`; the lines share the results of base and finetuned
models by digest. The reference is task arithmetic with its coefficient tuned on validation
rows. Nothing is tuned on test rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from restitch.cli.reporter import TerminalReporter
from restitch.flows.lines.init_line import init_line
from restitch.flows.promotion.snapshot import retention_task
from restitch.flows.register import register
from restitch.flows.remerge import remerge
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.evaluation import evaluate
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.checkpoints import Base, aligned, open_base
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.task_data import verified_data
from restitch.tasks.inputs.task_head import task_head
from restitch.tasks.runtime.console import reporting_to, working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

SPLITS = ("train", "validation", "test")
COEFFICIENTS = tuple(round(0.1 * n, 1) for n in range(1, 11))


@dataclass(frozen=True)
class Setting:
    """One line of the comparison."""

    name: str
    localize: dict[str, Any]
    method: str = "localize-and-stitch"


@dataclass(frozen=True)
class Outcome:
    """The results of one setting."""

    setting: str
    seconds: float
    record: MergedRecord
    density: dict[str, float]
    share: float  # bytes of a delta over those of the base, on average


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print its tables."""
    options = _parser().parse_args(arguments)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        run(options, options.work.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        run(options, Path(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text")
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks")
    parser.add_argument("--family", default="text-encoder", choices=("text-encoder", "clip"))
    parser.add_argument("--dataless", type=_fractions, default=(0.05, 0.1, 0.2))
    parser.add_argument("--trained", type=_fractions, default=(0.01, 0.05, 0.1, 0.2))
    parser.add_argument("--presets", default="budget", help="comma-separated")
    parser.add_argument("--fisher", type=_fractions, default=())
    parser.add_argument("--distilled", type=_fractions, default=())
    parser.add_argument("--auto", default="", help="modes that choose their density")
    parser.add_argument("--recovery", type=float, default=0.99, help="the goal of --auto")
    parser.add_argument("--shots", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--include", default="", help="globs of more localizable tensors")
    parser.add_argument("--no-reference", action="store_true", help="skip task arithmetic")
    parser.add_argument("--work", type=Path, help="keep checkpoints and home here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    return parser


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def run(options: argparse.Namespace, work: Path) -> None:
    """Make the checkpoints, run every setting and the reference, and print the tables."""
    os.environ["RESTITCH_HOME"] = str(work / "home")
    prepare_environment(Home.from_environment())
    checkpoints = work / "checkpoints"
    if not checkpoints.exists():
        script = options.data.absolute() / "make_checkpoints.py"
        subprocess.run([sys.executable, str(script), str(checkpoints)], check=True)
    tasks, benchmark = write_task_files(options.data.absolute(), work)
    with reporting_to(TerminalReporter()):
        found = [
            measure(setting, options.family, work, tasks, benchmark)
            for setting in settings(options)
        ]
        reference = None if options.no_reference else task_arithmetic(work, found[0], tasks)
        matched = [
            at_the_same_density(one, options, work, tasks)
            for one in found
            if one.setting == "trained official"
        ]
    tables = [*(per_task(one) for one in found), *matched, summary(found, reference)]
    text = "\n\n".join(tables) + "\n"
    Console(width=200).print(text, markup=False)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Dataless at each density, trained with each preset, and ours with weighted-stitch."""
    include = [glob for glob in options.include.split(",") if glob]
    for density in options.dataless:
        choice = {"mode": "dataless", "density": density, "include": include}
        yield Setting(f"dataless {density:.0%}", choice)
    for preset in options.presets.split(",") if options.trained else ():
        # The density of the other presets, of the paper and its code, is not fixed.
        densities = options.trained if preset == "budget" else options.trained[:1]
        for density in densities:
            name = f"trained {preset} {density:.0%}" if preset == "budget" else f"trained {preset}"
            choice = {"mode": "trained", "density": density, "preset": preset, "include": include}
            yield Setting(name, {**choice, "shots": options.shots, "seed": options.seed})
    own = {"shots": options.shots, "seed": options.seed, "include": include}
    for mode, densities in (("fisher", options.fisher), ("distilled", options.distilled)):
        for density in densities:
            choice = {"mode": mode, "density": density, **own}
            yield Setting(f"weighted-stitch {mode} {density:.0%}", choice, "weighted-stitch")
    for mode in filter(None, options.auto.split(",")):
        choice = {"mode": mode, "density": "auto", "recovery": options.recovery, **own}
        yield Setting(f"weighted-stitch {mode} auto", choice, "weighted-stitch")


def write_task_files(data: Path, work: Path) -> tuple[dict[str, Path], Path | None]:
    """Task files in restitch's form: one per task, and one for the general benchmark."""
    tasks: dict[str, Path] = {}
    benchmark = None
    for folder in sorted(p.parent for p in data.glob("*/task.json")):
        described = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        files = {p.stem: p.name for p in folder.iterdir() if p.stem in SPLITS}
        head = {key: described[key] for key in ("labels", "templates") if key in described}
        spec = {"task": folder.name, "data": {"path": str(folder), **files}, "head": head}
        spec |= {key: described[key] for key in ("scale", "max_length") if key in described}
        path = work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        if "train" in files:
            tasks[folder.name] = path
        else:
            benchmark = path
    return tasks, benchmark


def measure(
    setting: Setting, family: str, work: Path, tasks: dict[str, Path], benchmark: Path | None
) -> Outcome:
    """Register all tasks on a line with this setting and merge them once."""
    line = setting.name.replace(" ", "-").replace("%", "").replace(".", "_")
    values: dict[str, Any] = {
        "line": line,
        "base": str(work / "checkpoints" / "base"),
        "family": family,
        "method": setting.method,
        "localize": setting.localize,
    }
    if benchmark is not None:
        values["retention"] = str(benchmark)
    file = work / f"{line}.line.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    started = time.perf_counter()
    init_line(file)
    density = {}
    for task, spec in tasks.items():
        outcome = register(line, spec, str(work / "checkpoints" / task), merge=False)
        density[task] = outcome.onboarded.facts.density or 0.0
    merged = remerge(line)
    assert merged.version is not None
    ledger = workspace().ledger(line)
    record = ledger.merged(merged.version)
    sizes = [member.facts.delta_bytes or 0 for member in record.members.values()]
    share = sum(sizes) / len(sizes) / ledger.state().base.size
    return Outcome(setting.name, time.perf_counter() - started, record, density, share)


def at_the_same_density(
    official: Outcome, options: argparse.Namespace, work: Path, tasks: dict[str, Path]
) -> str:
    """Grafted accuracy of `official`, and of `budget` and dataless at official's densities."""
    header = ("task", "density", "official", "budget", "dataless")
    lines = [_row(header), _row(["---"] * len(header))]
    for task, density in official.density.items():
        row = [task, f"{density:.2%}", _number(official.record.results[task].grafted)]
        budget = {"mode": "trained", "shots": options.shots, "seed": options.seed}
        for name, choice in (("budget", budget), ("dataless", {"mode": "dataless"})):
            one = Setting(f"{name} as official {task}", {**choice, "density": density})
            found = measure(one, options.family, work, {task: tasks[task]}, None)
            row.append(_number(found.record.results[task].grafted))
        lines.append(_row(row))
    return "\n".join(lines)


@dataclass(frozen=True)
class Reference:
    """Task arithmetic with the best coefficient on validation rows."""

    coefficient: float
    accuracy: dict[str, float]
    normalized: float
    retention: float | None


def task_arithmetic(work: Path, found: Outcome, tasks: dict[str, Path]) -> Reference:
    """Base + coefficient x sum of task vectors, tuned over 0.1 to 1.0 on validation rows."""
    space = workspace()
    line_state = space.ledger(found.record.line).state()
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    live = live_base(base, "add task vectors")
    sums = _sum_of_task_vectors(base, [work / "checkpoints" / task for task in tasks])
    scores = {}
    with working("tuning task arithmetic") as progress:
        for done, coefficient in enumerate(COEFFICIENTS):
            _set(live, base, sums, coefficient)
            scores[coefficient] = sum(
                _accuracy(line_state, base, live, task, "validation") for task in tasks
            )
            progress(done + 1, len(COEFFICIENTS))
    best = max(scores, key=lambda c: (scores[c], -c))
    _set(live, base, sums, best)
    accuracy = {task: _accuracy(line_state, base, live, task, "test") for task in tasks}
    kept = found.record.retention
    retention = None
    if kept is not None:
        retention = _accuracy(line_state, base, live, None, "test") / kept.base
    _set(live, base, sums, 0.0)
    own = {t: r.finetuned for t, r in found.record.results.items()}
    shares = [accuracy[task] / value for task, value in own.items() if value]
    return Reference(best, accuracy, sum(shares) / len(shares), retention)


def _sum_of_task_vectors(base: Base, folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(base.checkpoint.info(name).shape) for name in base.names}
    for folder in folders:
        finetuned = aligned(base, Checkpoint.open(folder))
        for name, total in sums.items():
            total += finetuned.tensor(name).float() - base.checkpoint.tensor(name).float()
    return sums


def _set(live: LiveBase, base: Base, sums: dict[str, torch.Tensor], coefficient: float) -> None:
    with torch.no_grad():
        for name, total in sums.items():
            value = base.checkpoint.tensor(name).float() + coefficient * total
            live.parameters[name].copy_(value)


def _accuracy(
    line_state: LineState, base: Base, live: LiveBase, task: str | None, split: str
) -> float:
    space = workspace()
    spec = retention_task(line_state) if task is None else line_state.tasks[task].spec
    assert spec is not None
    own = task_head(spec, base, live, None, space)
    rows = verified_data(spec, base.family).rows(split)
    preprocess = base.family.preprocessor(base.folder, own.spec.max_length)
    return evaluate(base.family, live.model, own, rows, preprocess).value


def per_task(found: Outcome) -> str:
    """One setting's table."""
    lines = [f"**{found.setting}** ({found.seconds:.0f} s)", ""]
    header = ("task", "density", "base", "finetuned", "grafted", "merged", "95 %", "normalized")
    lines += _row(header), _row(["---"] * len(header))
    for task, result in found.record.results.items():
        interval = result.interval
        spread = "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"
        values = (result.base, result.finetuned, result.grafted, result.merged)
        row = [task, f"{found.density[task]:.2%}", *map(_number, values)]
        lines.append(_row([*row, spread, _number(result.normalized)]))
    return "\n".join(lines)


def summary(found: Sequence[Outcome], reference: Reference | None) -> str:
    """All settings side by side."""
    header = ("setting", "mean merged", "mean normalized", "retention", "delta of one model")
    lines = [_row(header), _row(["---"] * len(header))]
    for one in found:
        kept = one.record.retention
        ratio = kept.ratio if kept else None
        values = (one.record.mean_accuracy, one.record.mean_normalized, ratio)
        lines.append(_row([one.setting, *map(_number, values), f"{one.share:.1%}"]))
    if reference is not None:
        mean = sum(reference.accuracy.values()) / len(reference.accuracy)
        name = f"task arithmetic, best coefficient {reference.coefficient}"
        values = (mean, reference.normalized, reference.retention)
        lines.append(_row([name, *map(_number, values), ""]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
