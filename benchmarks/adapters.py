"""Adapters: the cost of registering them, and their merges by peft and by ours.

    python -m benchmarks.adapters --data DIR [--work FOLDER] [--markdown FILE]

DIR has the form that `benchmarks.llm` describes. Its adapters are registered on three lines (masks,
whole task vectors, subspaces), and so are the same models as whole checkpoints. Each line runs in
processes of its own: one reads, validates and localizes the models, and one runs `register` on
them, without rows, so that nothing is evaluated. Memory is the peak of anonymous pages.

The second table has the merges of the adapters by peft's `add_weighted_adapter` and by ours, on
the same rows. Coefficients are tuned on validation rows, never on test rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from blake3 import blake3
from rich.console import Console

from benchmarks.llm import FAMILY, write_task_files
from benchmarks.memory import watched
from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register
from restitch.merging.files.delta import open_delta
from restitch.merging.files.edits import Edits, edited
from restitch.merging.methods.registry import get_method
from restitch.merging.rules.stitch import DeltaMember
from restitch.modeling.families.family import get_family
from restitch.registry.home import Home, prepare_environment
from restitch.registry.specs.files import load_task
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import Base, describe_model, open_base, open_sparse
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.task_data import resolve_task
from restitch.tasks.localize import localize
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace
from restitch.tasks.validate import validate

MASKS, WHOLE, SUBSPACES = "masks of 20 %", "whole task vectors", "subspaces"
LINES: Mapping[str, Mapping[str, Any]] = {
    MASKS: {"method": "localize-and-stitch", "localize": {"mode": "dataless", "density": 0.2}},
    WHOLE: {"method": "task-arithmetic", "localize": {"mode": "dataless", "density": 1.0}},
    SUBSPACES: {"method": "tsv-m", "localize": {"mode": "subspace"}},
}
KINDS = ("adapters", "whole models")
COEFFICIENTS = (0.3, 0.5, 0.7, 1.0)
# The ways of `add_weighted_adapter`, with our defaults.
PEFT: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.2},
    "cat": {},
    "svd": {},
}
OURS = (
    (SUBSPACES, "task-arithmetic", COEFFICIENTS),
    (SUBSPACES, "ties", COEFFICIENTS),
    (SUBSPACES, "tsv-m", (1.0,)),
    (SUBSPACES, "tsv-m", COEFFICIENTS),
    (MASKS, "localize-and-stitch", (1.0,)),
)


@dataclass(frozen=True)
class Cost:
    """The registration of all models of one kind on one line.

    Attributes:
        localized: the median seconds to read, validate and localize a model.
        registered: the median seconds of `register` without rows, with merge, report and MLflow.
        peak: of anonymous memory while models are localized, in bytes.
        stored: the bytes of all deltas.
        given: the bytes of all models' weights.
        masks: the digests of the deltas' contents.
        merged: the digest of the merged weights.
    """

    localized: float
    registered: float
    peak: int
    stored: int
    given: int
    masks: tuple[str, ...]
    merged: str


@dataclass(frozen=True)
class Merge:
    """A way of merging: by name, with the coefficients to try.

    Attributes:
        wear: puts the merge with a coefficient on a loaded base, within a block.
        seconds: of merging, if it is not done by `wear`.
    """

    name: str
    coefficients: Sequence[float]
    wear: Callable[[float], AbstractContextManager[Any]]
    seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print both tables."""
    options = _parser().parse_args(arguments)
    if options.step:
        print(json.dumps(STEPS[options.step](options.kind, options.line, options.work)))
        return
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        run(options, options.work.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        run(options, Path(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters")
    parser.add_argument("--data", type=Path, help="folder of tasks")
    parser.add_argument("--rows", type=int, default=40, help="test rows of each task")
    parser.add_argument("--tune-rows", type=int, default=12, help="validation rows of each task")
    parser.add_argument("--parts", default="costs,merges", help="tables to make")
    parser.add_argument("--work", type=Path, help="keep checkpoints and homes here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--line", choices=sorted(LINES), help=argparse.SUPPRESS)
    return parser


def run(options: argparse.Namespace, work: Path) -> None:
    """Make the checkpoints and print the tables."""
    if not (work / "checkpoints").exists():
        script = options.data.absolute() / "make_checkpoints.py"
        made = str(work / "checkpoints")
        subprocess.run([sys.executable, str(script), made, "--whole"], check=True)
    parts = []
    if "costs" in options.parts.split(","):
        parts.append(cost_table({n: {k: cost(k, n, work) for k in KINDS} for n in LINES}))
    if "merges" in options.parts.split(","):
        parts.append(merge_table(options, work))
    text = "\n\n".join(parts) + "\n"
    Console(width=200).print(text, markup=False)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


def models(work: Path, kind: str) -> dict[str, Path]:
    """The folders of the adapters, or of the same models as whole checkpoints, by task."""
    folders = sorted(path.parent for path in work.glob("checkpoints/*/adapter_config.json"))
    suffix = "" if kind == KINDS[0] else "-whole"
    return {folder.name: folder.with_name(folder.name + suffix) for folder in folders}


def cost(kind: str, line: str, work: Path) -> Cost:
    """Register all models of a kind on a line, in processes of their own."""
    found: dict[str, Any] = {}
    # As the command sets it; torch reads it at import.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.adapters", "--step", step, "--kind", kind]
        with tempfile.TemporaryFile(dir=work) as out:
            process = subprocess.Popen(
                [*command, "--line", line, "--work", str(work)],
                env=environment,
                stdout=out,
                stderr=subprocess.DEVNULL,
            )
            peak = watched(process)
            out.seek(0)
            lines = out.read().decode().splitlines()
        if process.returncode:
            raise SystemExit(f"{kind} on a line of {line}: {step} failed")
        found |= json.loads(lines[-1])
        if step == "localize":
            found["peak"] = peak
    return Cost(**(found | {"masks": tuple(found["masks"])}))


def _new_line(work: Path, name: str, home: Path) -> LineRef:
    """A line on the base, in a home of its own."""
    os.environ["RESTITCH_HOME"] = str(home)
    prepare_environment(Home.from_environment())
    home.mkdir(exist_ok=True)
    values = {"line": "adapters", "base": str(work / "checkpoints" / "base"), "family": FAMILY}
    file = home / "line.yaml"
    file.write_text(yaml.safe_dump({**values, **LINES[name]}), encoding="utf-8")
    init_line(file)
    return _line()


def _line() -> LineRef:
    line_state = workspace().ledger("adapters").state()
    return LineRef(line_state.spec, line_state.base)


def _task_file(home: Path, task: str) -> Path:
    file = home / f"{task}.yaml"
    file.write_text(f"task: {task}\n", encoding="utf-8")
    return file


def localized(kind: str, name: str, work: Path) -> dict[str, Any]:
    """Read, validate and localize the models of a kind."""
    with tempfile.TemporaryDirectory(dir=work, prefix="home-") as home:
        line, space = _new_line(work, name, Path(home)), workspace()
        seconds, deltas, given = [], [], 0
        for task, folder in models(work, kind).items():
            spec = load_task(_task_file(Path(home), task))
            began = time.perf_counter()
            model = describe_model(str(folder), get_family(FAMILY), space, line=line)
            validate(line, spec, model)
            deltas.append(localize(line, spec, model))
            seconds.append(time.perf_counter() - began)
            given += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {
            "localized": median(seconds),
            "stored": sum(delta.size for delta in deltas),
            "given": given,
            "masks": [delta.mask for delta in deltas],
        }


def registered(kind: str, name: str, work: Path) -> dict[str, Any]:
    """Register the models of a kind; the first registration loads libraries and does not count."""
    with tempfile.TemporaryDirectory(dir=work, prefix="home-") as home:
        line = _new_line(work, name, Path(home))
        seconds = []
        for task, folder in models(work, kind).items():
            began = time.perf_counter()
            register("adapters", _task_file(Path(home), task), str(folder))
            seconds.append(time.perf_counter() - began)
        base = open_base(line, workspace())
        return {"registered": median(seconds[1:]), "merged": _digest(base, _champion(base))}


STEPS = {"localize": localized, "register": registered}


def _champion(base: Base) -> Edits:
    ledger = workspace().ledger("adapters")
    champion = ledger.state().champion
    assert champion is not None
    return open_sparse(ledger.merged(champion).patch, workspace(), base.checkpoint)


def _digest(base: Base, edits: Edits) -> str:
    """The digest of the merged tensors."""
    found = blake3()
    for name in edits.names:
        flat = edited(base.checkpoint, edits, name).reshape(-1)
        found.update(name.encode() + flat.contiguous().view(torch.uint8).numpy().tobytes())
    return str(found.hexdigest())


def cost_table(costs: Mapping[str, Mapping[str, Cost]]) -> str:
    """The costs of registering adapters, with those of whole models in parentheses."""
    seconds = ("localized, s", "share", "registered, s", "share")
    header = ("line", "stored", "of the weights", *seconds, "memory, MB", "masks", "merged weights")
    lines = [_row(header), _row(["---"] * len(header))]
    for name, kinds in costs.items():
        ours, theirs = (kinds[kind] for kind in KINDS)
        lines.append(
            _row(
                [
                    name,
                    f"{ours.stored / 1e6:.1f} MB ({theirs.stored / 1e6:.1f})",
                    f"{ours.stored / ours.given:.2f} ({theirs.stored / theirs.given:.2f})",
                    f"{ours.localized:.2f} ({theirs.localized:.2f})",
                    f"{ours.localized / theirs.localized:.2f}",
                    f"{ours.registered:.2f} ({theirs.registered:.2f})",
                    f"{ours.registered / theirs.registered:.2f}",
                    f"{ours.peak / 1e6:.0f} ({theirs.peak / 1e6:.0f})",
                    "same" if ours.masks == theirs.masks else "other",
                    "same" if ours.merged == theirs.merged else "other",
                ]
            )
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Bench:
    """The base in memory, and the adapters that are merged onto it.

    Attributes:
        chosen: exams by task on validation rows; `tests` on test rows.
    """

    work: Path
    line: LineRef
    base: Base
    live: LiveBase
    adapters: Mapping[str, Path]
    chosen: Mapping[str, Exam]
    tests: Mapping[str, Exam]

    @classmethod
    def of(cls, options: argparse.Namespace, work: Path, home: Path) -> "Bench":
        """Load the base and the rows."""
        line = _new_line(work, SUBSPACES, home)
        world, base, adapters = write_task_files(options, work), open_base(line, workspace()), {}
        chosen, tests = {}, {}
        for task, folder in models(work, KINDS[0]).items():
            adapters[task] = folder
            spec = resolve_task(load_task(world.tasks[task]), base.family)
            tests[task] = Exam(base, spec, None, workspace())
            few = options.tune_rows
            chosen[task] = Exam(base, spec, None, workspace(), validation=few)
        return cls(work, line, base, live_base(base, "merge"), adapters, chosen, tests)

    def wearing(self, folder: Path) -> AbstractContextManager[Any]:
        """The base with an adapter on it, within a block."""
        ref = describe_model(str(folder), self.base.family, workspace(), line=self.line)
        return self.live.wearing(WeightsRef("finetuned", ref.weights, ref.uri), workspace())

    def members(self, line: str) -> list[DeltaMember]:
        """What a line keeps of the adapters."""
        values = self.line.spec.model_dump() | {"localize": LINES[line]["localize"]}
        ref, space = LineRef(LineSpec.model_validate(values), self.line.base), workspace()
        found = []
        for task, folder in self.adapters.items():
            model = describe_model(str(folder), self.base.family, space, line=self.line)
            delta = localize(ref, TaskSpec(task=task), model)
            opened = open_delta(space.objects.blob_path(delta.blob), self.base.checkpoint)
            found.append(DeltaMember(task, opened))
        return found


def merge_table(options: argparse.Namespace, work: Path) -> str:
    """The merges of the adapters by peft and by ours, on the same rows."""
    with tempfile.TemporaryDirectory(dir=work, prefix="home-") as home:
        bench = Bench.of(options, work, Path(home))
        header = ("merged by", "coefficient", *bench.adapters, "mean", "merging, s")
        lines = [_row(header), _row(["---"] * len(header))]
        alone = {}
        for task, folder in bench.adapters.items():
            with bench.wearing(folder):
                alone[task] = bench.tests[task].take().worth
        lines.append(_values("not merged: the base", "", _taken(bench.tests)))
        lines.append(_values("not merged: each task's adapter", "", alone))
        for merge in (*of_peft(bench, Path(home)), *of_ours(bench)):
            lines.append(_measured(bench, merge))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def _measured(bench: Bench, merge: Merge) -> str:
    """A row: the coefficient that is best on validation rows, measured on test rows."""
    best = merge.coefficients[0]
    if len(merge.coefficients) > 1:
        found = {}
        for coefficient in merge.coefficients:
            with merge.wear(coefficient):
                found[coefficient] = fmean(_taken(bench.chosen).values())
        best = max(found, key=lambda coefficient: found[coefficient])
    began = time.perf_counter()
    with merge.wear(best):
        seconds = time.perf_counter() - began if merge.seconds is None else merge.seconds
        values = _taken(bench.tests)
    shown = f"{best:g}" if len(merge.coefficients) > 1 else "1, the default"
    return _values(merge.name, shown, values, seconds)


def _taken(exams: Mapping[str, Exam]) -> dict[str, float]:
    return {task: exam.take().worth for task, exam in exams.items()}


def _values(
    name: str, coefficient: str, values: Mapping[str, float], seconds: float | None = None
) -> str:
    shown = [f"{value:.3f}" for value in (*values.values(), fmean(values.values()))]
    return _row([name, coefficient, *shown, "" if seconds is None else f"{seconds:.1f}"])


def of_peft(bench: Bench, folder: Path) -> Iterator[Merge]:
    """The merges by peft's `add_weighted_adapter`.

    With one coefficient c for all adapters each of them is c times the merge with 1, so that one is
    made, and c goes into its scaling.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(bench.base.folder, dtype="float32")
    for task, adapter in bench.adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=task)
        else:
            model = PeftModel.from_pretrained(model, adapter, adapter_name=task)
    for kind, settings in PEFT.items():
        name = kind.replace("_", "-")
        began = time.perf_counter()
        ones = [1.0] * len(bench.adapters)
        model.add_weighted_adapter(
            list(bench.adapters), ones, name, combination_type=kind, **settings
        )
        seconds = time.perf_counter() - began
        model.save_pretrained(folder, selected_adapters=[name])
        model.delete_adapter(name)
        wear = partial(_scaled, bench, folder / name)
        yield Merge(f"peft, `{kind}`", COEFFICIENTS, wear, seconds)


@contextmanager
def _scaled(bench: Bench, adapter: Path, coefficient: float) -> Iterator[None]:
    """The base with a multiple of an adapter on it."""
    with tempfile.TemporaryDirectory(dir=adapter.parent) as folder:
        scaled = Path(folder) / "adapter"
        shutil.copytree(adapter, scaled)
        config = json.loads((scaled / "adapter_config.json").read_bytes())
        config["lora_alpha"] *= coefficient
        (scaled / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        with bench.wearing(scaled):
            yield


def of_ours(bench: Bench) -> Iterator[Merge]:
    """The merges by methods of restitch."""
    for line, method, coefficients in OURS:
        members = bench.members(line)

        def wear(
            alpha: float, members: list[DeltaMember] = members, method: str = method
        ) -> AbstractContextManager[Any]:
            given = {} if method == "localize-and-stitch" else {"alpha": alpha}
            return bench.live.edited(get_method(method)(bench.base.checkpoint, members, **given))

        yield Merge(f"`{method}`, {line}", coefficients, wear)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
