"""A line of language models through restitch: base, finetuned, grafted and merged values.

    python -m benchmarks.llm --data DIR [--work FOLDER] [--compute bfloat16] [--markdown FILE]

DIR has a folder per task (`task.json` with the prompt, and with choices or what ends a generated
answer; `train`, `validation` and `test` as .jsonl) and `make_checkpoints.py`, which writes the base
and one whole finetuned model per task. Folders with test rows only are general benchmarks: the
first one of choices is the line's, and the merged models are measured on one of perplexity, too.

One line stitches dataless masks, another one distilled masks; the members are registered one after
another, and each registration makes a merged version. `restitch compare` then tunes the other
methods on validation rows. Nothing is tuned on test rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from restitch.cli.reporter import TerminalReporter
from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register
from restitch.flows.research.compare import compare
from restitch.modeling.families.family import get_family
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.records import TaskResult
from restitch.registry.specs.files import load_task
from restitch.tasks.evaluate import evaluate
from restitch.tasks.inputs.task_data import resolve_task
from restitch.tasks.runtime.console import reporting_to
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace

FAMILY = "causal-lm"
METHODS = "task-arithmetic,ties,tsv-m"


@dataclass(frozen=True)
class World:
    """The files of the comparison.

    Attributes:
        tasks: task files, by task.
        benchmark: the task file of the general benchmark of choices.
        texts: that of the one of perplexity.
    """

    work: Path
    tasks: Mapping[str, Path]
    benchmark: Path | None
    texts: Path | None


@dataclass(frozen=True)
class Row:
    """One way of merging, measured."""

    name: str
    results: Mapping[str, TaskResult]
    retention: float | None
    perplexity: float | None
    seconds: float


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm")
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks")
    parser.add_argument("--density", type=float, default=0.2, help="of the masks")
    parser.add_argument("--modes", default="dataless,distilled", help="localizers, comma-separated")
    parser.add_argument("--methods", default=METHODS, help="methods to tune, comma-separated")
    parser.add_argument("--shots", type=int, default=64, help="rows of each class to localize with")
    parser.add_argument("--rows", type=int, help="test rows of each task; by default all")
    parser.add_argument("--tune-rows", type=int, default=100, help="validation rows of each task")
    parser.add_argument("--compute", default="auto", help="the line's key `compute`")
    parser.add_argument("--work", type=Path, help="keep checkpoints and home here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    return parser


def run(options: argparse.Namespace, work: Path) -> None:
    """Make the checkpoints, register all members on each line, tune the methods, print tables."""
    os.environ["RESTITCH_HOME"] = str(work / "home")
    prepare_environment(Home.from_environment())
    checkpoints = work / "checkpoints"
    if not checkpoints.exists():
        script = options.data.absolute() / "make_checkpoints.py"
        subprocess.run([sys.executable, str(script), str(checkpoints), "--whole"], check=True)
    world = write_task_files(options, work)
    rows: list[Row] = []
    with reporting_to(TerminalReporter()):
        rows += [stitched(options, world, mode) for mode in options.modes.split(",")]
        if options.methods:
            rows += compared(rows[0].name, options.methods.split(","), world)
    text = "\n\n".join((by_task(rows[0]), by_method(rows))) + "\n"
    Console(width=200).print(text, markup=False)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


def write_task_files(options: argparse.Namespace, work: Path) -> World:
    """Task files in restitch's form, with few validation rows to tune on."""
    tasks: dict[str, Path] = {}
    general: dict[str, Path] = {}
    for folder in sorted(p.parent for p in options.data.absolute().glob("*/task.json")):
        described = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        files = {s: f"{s}.jsonl" for s in ("train", "test") if (folder / f"{s}.jsonl").is_file()}
        data: dict[str, Any] = {"path": str(folder), **files}
        if options.rows:
            data["sample"] = options.rows
        if "train" in files:
            # The first rows of the validation split: methods are tuned many times.
            own = work / "data" / folder.name
            own.mkdir(parents=True, exist_ok=True)
            for split in files:
                (own / files[split]).unlink(missing_ok=True)
                (own / files[split]).symlink_to(folder / files[split])
            with (folder / "validation.jsonl").open(encoding="utf-8") as lines:
                few = "".join(islice(lines, options.tune_rows))
            (own / "validation.jsonl").write_text(few, encoding="utf-8")
            data |= {"path": str(own), "validation": "validation.jsonl"}
        spec = {"task": folder.name, "data": data, **_scored(described)}
        path = work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        (tasks if "train" in files else general)[folder.name] = path
    texts = [p for p in general.values() if "perplexity" in p.read_text(encoding="utf-8")]
    choices = [p for p in general.values() if p not in texts]
    return World(work, tasks, next(iter(choices), None), next(iter(texts), None))


def _scored(described: Mapping[str, Any]) -> dict[str, Any]:
    """How a task's rows are scored, in the words of a task file."""
    if described["kind"] == "perplexity":
        return {"metric": "perplexity"}
    spec: dict[str, Any] = {"prompt": described["prompt"]}
    if described["kind"] == "generate":
        generate = {key: described[key] for key in ("max_new_tokens", "stop")}
        return {**spec, "answer": "answer", "generate": generate}
    if "choices" in described:
        return {**spec, "choices": described["choices"]}
    return {**spec, "choices_column": "choices"}


def stitched(options: argparse.Namespace, world: World, mode: str) -> Row:
    """Register all members one after another on a line with masks of this mode."""
    values: dict[str, Any] = {
        "line": mode,
        "base": str(world.work / "checkpoints" / "base"),
        "family": FAMILY,
        "method": "localize-and-stitch",
        "localize": {"mode": mode, "density": options.density, "shots": options.shots},
        "compute": options.compute,
    }
    if world.benchmark is not None:
        values["retention"] = str(world.benchmark)
    file = world.work / f"{mode}.line.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    started = time.perf_counter()
    init_line(file)
    for task, spec in world.tasks.items():
        model = world.work / "checkpoints" / f"{task}-whole"
        folder = model if model.is_dir() else model.with_name(task)
        register(mode, spec, str(folder))
    seconds = time.perf_counter() - started
    ledger = workspace().ledger(mode)
    champion = ledger.state().champion
    assert champion is not None
    record = ledger.merged(champion)
    kept = None if record.retention is None else record.retention.ratio
    perplexity = perplexity_of(mode, world, record.patch)
    return Row(mode, record.results, kept, perplexity, seconds)


def perplexity_of(line: str, world: World, patch: str) -> float | None:
    """The perplexity of the base with a patch on the general texts, over that of the base."""
    if world.texts is None:
        return None
    line_state = workspace().ledger(line).state()
    ref = LineRef(line_state.spec, line_state.base)
    spec = resolve_task(load_task(world.texts), get_family(FAMILY))
    base = evaluate(ref, spec, WeightsRef("base"))
    merged = evaluate(ref, spec, WeightsRef("merged", patch))
    return merged.value / base.value


def compared(line: str, methods: Sequence[str], world: World) -> list[Row]:
    """Other methods on the same members, tuned on validation rows."""
    found = compare(line, methods=tuple(methods), tuned=True)
    rows = []
    for one in found.methods:
        results = {task: TaskResult.model_validate(r) for task, r in one.results.items()}
        kept = (one.retention or {}).get("ratio")
        tuned = "" if one.tuned is None else f" ({one.tuned['setting']} {one.tuned['value']:g})"
        perplexity = perplexity_of(line, world, one.patch)
        rows.append(Row(f"{one.method}{tuned}", results, kept, perplexity, one.seconds or 0.0))
    return rows


def by_task(row: Row) -> str:
    """Base, finetuned, grafted and merged values with the masks of the first line."""
    header = ("task", "metric", "base", "finetuned", "grafted", "merged", "95 %", "rows")
    lines = [f"**{row.name} masks**", "", _row(header), _row(["---"] * len(header))]
    for task, result in row.results.items():
        interval = result.interval
        spread = "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"
        values = (result.base, result.finetuned, result.grafted, result.merged)
        cells = [task, result.metric, *map(_number, values), spread, str(result.count)]
        lines.append(_row(cells))
    return "\n".join(lines)


def by_method(rows: Sequence[Row]) -> str:
    """All ways of merging side by side."""
    tasks = list(rows[0].results)
    header = ("merged by", *tasks, "mean", "normalized", "retention", "perplexity", "seconds")
    lines = [_row(header), _row(["---"] * len(header))]
    for one in rows:
        merged = [one.results[task].merged for task in tasks]
        shares = [r.normalized for r in one.results.values() if r.normalized is not None]
        mean = sum(value or 0.0 for value in merged) / len(merged)
        normalized = sum(shares) / len(shares) if shares else None
        values = (*merged, mean, normalized, one.retention, one.perplexity)
        lines.append(_row([one.name, *map(_number, values), f"{one.seconds:.0f}"]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
