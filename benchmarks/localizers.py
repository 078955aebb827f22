"""All localizers on the same real models: accuracy and cost by density, alone and merged.

    python -m benchmarks.localizers --data DIR --work DIR --part frontier [--seeds 0,1,2]

DIR is the folder of `benchmarks.text`. Each part writes its measurements at once to its own JSON
file in the work folder; running a part again continues where it stopped:

- `frontier`: grafted accuracy on test rows by localizer, density and seed.
- `official`: the authors' code and ours at the density that theirs reaches, timed in one process.
- `overhead`: processor time over that of the forward and backward passes alone, on one task.
- `merged`: accuracy by density, mask and rule for shared coordinates, on validation and test rows.
- `storage`: bytes per kept weight by density and encoding.
- `int8`: the loss of accuracy with values in 8 bits, on the masks of `frontier`.
- `tables`: print all measurements.

Nothing is chosen by test rows.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch import Tensor

from benchmarks.localizers_tables import tables
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.files.mask import Mask
from restitch.merging.files.quantized import quantized
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.distilled import DistilledSettings, localize_distilled
from restitch.merging.localize.fisher import FisherSettings, localize_fisher
from restitch.merging.localize.random import random_scores
from restitch.merging.localize.trained import TrainedSettings, localize_trained
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.bitwise import gather
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import Scores, top_k
from restitch.merging.rules.stitch import DeltaMember
from restitch.modeling.data.task_data import TaskData
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import Batch, get_family
from restitch.modeling.weights import apply_edits, restore
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import HeadSpec

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
MERGED = (0.05, 0.1, 0.2)
RULES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("mean", "localize-and-stitch", {"overlap": "mean"}),
    ("sum", "localize-and-stitch", {"overlap": "sum"}),
    ("elect", "localize-and-stitch", {"overlap": "elect"}),
    ("weighted", "localize-and-stitch", {"overlap": "weighted"}),
    ("weighted-stitch 0.25", "weighted-stitch", {"growth": 0.25}),
    ("weighted-stitch 0.5", "weighted-stitch", {"growth": 0.5}),
    ("weighted-stitch 0.75", "weighted-stitch", {"growth": 0.75}),
)
SHOTS = 64
EPOCHS = 10


class Measurements:
    """Measurements in a file, by key; each is taken only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: Sequence[object]) -> bool:
        return " | ".join(map(str, key)) in self.values

    def get(self, key: Sequence[object], measure: Callable[[], Any]) -> Any:
        """The measurement of a key, taken now if it is missing."""
        name = " | ".join(map(str, key))
        if name not in self.values:
            self.values[name] = measure()
            self.path.write_text(json.dumps(self.values, indent=1))
            print(name, self.values[name], flush=True)
        return self.values[name]


@dataclass(frozen=True)
class Ranked:
    """A ranking with its importance factors and its cost."""

    scores: Scores
    factors: Mapping[str, Tensor]
    seconds: float


class Task:
    """One finetuned model with its rows and its head, on the shared loaded model."""

    def __init__(self, name: str, data: Path, checkpoints: Path, world: "World") -> None:
        described = json.loads((data / name / "task.json").read_text(encoding="utf-8"))
        labels = tuple(described["labels"])
        self.name = name
        self.world = world
        self.finetuned = Checkpoint.open(checkpoints / name)
        self.vector = TaskVector(world.base, self.finetuned, world.names)
        spec = HeadSpec(labels=labels, scale=described["scale"], max_length=described["max_length"])
        self.head = world.family.build_head(world.model, world.folder, spec)
        self.preprocess = world.family.preprocessor(world.folder, described["max_length"])
        rows = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
        files = DataSpec.model_validate({"path": str(data / name), **rows})
        self.data = TaskData(files, labels, "text")

    def calibration(self, seed: int) -> tuple[int, Callable[[Sequence[int]], Batch]]:
        """The number of calibration rows, and a function that makes their batches."""
        rows = self.data.calibration(SHOTS, seed)
        return len(rows), lambda chosen: self.preprocess([rows[index] for index in chosen])

    def logits(self, batch: Batch) -> Tensor:
        """The scores of the classes."""
        return self.world.family.logits(self.world.model, batch, self.head)

    def loss(self, batch: Batch) -> Tensor:
        """The loss on labels."""
        return self.world.family.loss(self.world.model, batch, self.head)

    def value(self, split: str) -> float:
        """The accuracy of the model's current weights."""
        rows = self.data.rows(split)
        return evaluate(self.world.family, self.world.model, self.head, rows, self.preprocess).value

    def grafted(self, mask: Mask, split: str = "test") -> float:
        """The accuracy of the base with a mask's finetuned values."""
        path = self.world.work / f"graft-{self.name}"
        self.write(path, mask, {})
        return self.world.wearing(SparseFile.open(path), lambda: self.value(split))

    def write(self, path: Path, mask: Mask, factors: Mapping[str, Tensor]) -> int:
        """Write the delta of a mask, and return its size."""

        def kept() -> Iterator[SparseTensor]:
            for name in mask.names:
                coordinates = mask.coordinates(name)
                values = gather(self.finetuned.tensor(name).reshape(-1), coordinates.numpy())
                shape = self.finetuned.info(name).shape
                yield SparseTensor(name, shape, coordinates, values, factors.get(name))

        return write_sparse(path, kept(), kind="delta", metadata={}).bytes

    def rank(self, mode: str, seed: int) -> Ranked:
        """A ranking by one of the localizers."""
        started = time.perf_counter()
        if mode == "dataless":
            return Ranked(self.vector, {}, 0.0)
        if mode == "random":
            return Ranked(random_scores(self.vector, seed), {}, 0.0)
        rows, batch = self.calibration(seed)
        live = self.world.live
        if mode == "fisher":
            settings = FisherSettings(seed=seed)
            fisher = localize_fisher(live, self.vector, rows, batch, self.logits, settings)
            scores: Scores = fisher[0]
            sensitivities = fisher[1]
        else:
            own = DistilledSettings(0.0375, 0.3, seed=seed, fisher=FisherSettings(seed=seed))
            distilled = localize_distilled(live, self.vector, rows, batch, self.logits, own)
            scores, sensitivities = distilled.scores, distilled.sensitivities
        factors = sensitivities.to_factors(self.vector.names)
        return Ranked(scores, factors, time.perf_counter() - started)


class World:
    """The base, loaded once, and the tasks."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        checkpoints = work / "checkpoints"
        if not checkpoints.exists():
            script = data / "make_checkpoints.py"
            subprocess.run([sys.executable, str(script), str(checkpoints)], check=True)
        self.folder = checkpoints / "base"
        self.family = get_family("text-encoder")
        self.model = self.family.load(self.folder)
        self.live = self.family.parameters(self.model)
        self.base = Checkpoint.open(self.folder)
        self.names = select_tensors(self.base.floating, self.family.localizable, (), ())
        names = sorted(path.parent.name for path in data.glob("*/delta.safetensors"))
        self.tasks = {name: Task(name, data, checkpoints, self) for name in names}

    def wearing(self, edits: Any, measure: Callable[[], float]) -> float:
        """Measure with edits applied."""
        apply_edits(self.live, self.base, edits)
        try:
            return measure()
        finally:
            restore(self.live, self.base, edits.names)

    def finetuned(self, task: Task, split: str) -> float:
        """The accuracy of the finetuned model."""
        return task.grafted(top_k(task.vector, task.vector.coordinates), split)


def frontier(
    world: World,
    kept: Measurements,
    seeds: Sequence[int],
    modes: Sequence[str],
    densities: Sequence[float],
) -> None:
    """Grafted accuracy by localizer, density and seed; the deltas stay in the work folder."""
    for seed, task, mode in product(seeds, world.tasks.values(), modes):
        kept.get((task.name, "finetuned"), partial(world.finetuned, task, "test"))
        missing = [d for d in densities if (task.name, mode, d, seed) not in kept]
        if not missing or (mode in ("random", "dataless") and seed != seeds[0]):
            continue
        ranked = task.rank(mode, seed)
        kept.get((task.name, mode, "seconds", seed), partial(float, ranked.seconds))
        for density in missing:
            mask = top_k(ranked.scores, kept_count(density, task.vector.coordinates))
            if density in MERGED:
                task.write(_delta(world, task, mode, density, seed), mask, ranked.factors)
            kept.get((task.name, mode, density, seed), partial(task.grafted, mask))


def merged(
    world: World,
    kept: Measurements,
    seeds: Sequence[int],
    modes: Sequence[str],
    densities: Sequence[float],
    splits: Sequence[str],
    rules: Sequence[str],
) -> None:
    """Normalized accuracy by density, mask and rule; the deltas are those of `frontier`."""
    for seed, split, mode, density in product(seeds, splits, modes, densities):
        files = {
            name: _delta(world, task, mode, density, 0 if mode in ("random", "dataless") else seed)
            for name, task in world.tasks.items()
        }
        if not all(path.exists() for path in files.values()):
            continue
        members = [DeltaMember(name, SparseFile.open(path)) for name, path in files.items()]
        chosen = [rule for rule in RULES if rule[0] in rules]
        for (rule, method, settings), task in product(chosen, world.tasks.values()):
            finetuned = kept.get(
                (task.name, "finetuned", split), partial(world.finetuned, task, split)
            )
            edits = get_method(method)(world.base, members, **settings)
            accuracy = partial(world.wearing, edits, partial(task.value, split))
            kept.get(
                (split, mode, density, rule, seed, task.name),
                partial(_over, accuracy, finetuned),
            )


def _over(accuracy: Callable[[], float], finetuned: float) -> float:
    return accuracy() / finetuned


def official(world: World, kept: Measurements, seed: int) -> None:
    """Grafted accuracy and seconds of the authors' code, and of ours at its density."""
    for task in world.tasks.values():
        theirs = kept.get((task.name, "official"), partial(_theirs, task, seed))
        for mode in ("dataless", "fisher", "distilled"):
            kept.get((task.name, mode), partial(_ours, task, mode, theirs["kept"], seed))


def _theirs(task: Task, seed: int) -> dict[str, float]:
    rows, batch = task.calibration(seed)
    settings = TrainedSettings.of("official", epochs=EPOCHS, seed=seed)
    started = time.perf_counter()
    live, vector = task.world.live, task.vector
    mask = localize_trained(live, vector, rows, batch, task.loss, settings).mask
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "kept": mask.total, "grafted": task.grafted(mask)}


def _ours(task: Task, mode: str, kept: int, seed: int) -> dict[str, float]:
    rows, batch = task.calibration(seed)
    live, vector = task.world.live, task.vector
    fisher = FisherSettings(seed=seed)
    started = time.perf_counter()
    scores: Scores = vector
    if mode == "fisher":
        scores, _ = localize_fisher(live, vector, rows, batch, task.logits, fisher)
    elif mode == "distilled":
        density = kept / vector.coordinates
        settings = DistilledSettings(density, density, epochs=1, seed=seed, fisher=fisher)
        scores = localize_distilled(live, vector, rows, batch, task.logits, settings).scores
    mask = top_k(scores, kept)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "grafted": task.grafted(mask)}


def overhead(world: World, kept: Measurements, seed: int) -> None:
    """Each localizer's processor time over that of its passes, twice, to show the noise."""
    task = world.tasks[min(world.tasks)]
    rows, batch = task.calibration(seed)
    live, vector = world.live, task.vector
    theirs = TrainedSettings.of("official", epochs=3, seed=seed)
    fisher = FisherSettings(seed=seed, most_rows=rows)
    distilled = DistilledSettings(0.1, 0.1, epochs=3, seed=seed, fisher=fisher)

    def passes(size: int) -> float:
        return _processor(lambda: _passes(task, rows, batch, size))

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, rows, 32):
                task.logits(batch(range(start, min(start + 32, rows))))

    def of(run: Callable[[], object], pure: float) -> float:
        return _processor(run) / pure

    for again in range(2):
        small, large = passes(fisher.batch_size), passes(distilled.batch_size)
        refined = small + _processor(forward) + distilled.epochs * large
        official = theirs.epochs * passes(theirs.batch_size)
        run = partial(localize_trained, live, vector, rows, batch, task.loss, theirs)
        kept.get(("official", again), partial(of, run, official))
        run_fisher = partial(localize_fisher, live, vector, rows, batch, task.logits, fisher)
        kept.get(("fisher", again), partial(of, run_fisher, small))
        refine = partial(localize_distilled, live, vector, rows, batch, task.logits, distilled)
        kept.get(("distilled", again), partial(of, refine, refined))


def _processor(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _passes(task: Task, rows: int, batch: Callable[[Sequence[int]], Batch], size: int) -> None:
    """Only the forward and backward passes over the rows, once."""
    live = [task.world.live[name] for name in task.world.names]
    for tensor in live:
        tensor.requires_grad_(True)
    for start in range(0, rows, size):
        loss = task.loss(batch(range(start, min(start + size, rows))))
        torch.autograd.backward(loss)
        for tensor in live:
            tensor.grad = None
    for tensor in live:
        tensor.requires_grad_(False)


def int8(world: World, kept: Measurements, mode: str, densities: Sequence[float]) -> None:
    """Grafted and merged accuracy, and bytes, with exact values and with values in 8 bits."""
    for density, values in product(densities, ("exact", "int8")):
        members = []
        for task in world.tasks.values():
            exact = SparseFile.open(_delta(world, task, mode, density, 0))
            file = exact if values == "exact" else _in_8_bits(world, exact)
            size = file.path.stat().st_size / file.total
            kept.get((density, values, task.name, "bytes"), partial(float, size))
            grafted = partial(world.wearing, file, partial(task.value, "test"))
            kept.get((density, values, task.name, "grafted"), grafted)
            members.append(DeltaMember(task.name, file))
        edits = get_method("weighted-stitch")(world.base, members)
        for task in world.tasks.values():
            merged = partial(world.wearing, edits, partial(task.value, "test"))
            kept.get((density, values, task.name, "merged"), merged)


def _in_8_bits(world: World, exact: SparseFile) -> SparseFile:
    """Write the same delta with values in 8 bits to the same folder."""

    def tensors() -> Iterator[SparseTensor]:
        for name in exact.names:
            shape, coordinates = exact.info(name).shape, exact.coordinates(name)
            before = world.base.tensor(name).view(-1)
            stored = quantized(coordinates, exact.values(name), before, shape)
            factors = exact.factors(name)
            known = None if factors is None else torch.cat(factors)
            yield SparseTensor(name, shape, coordinates, stored, known)

    path = exact.path.with_suffix(".int8")
    write_sparse(path, tensors(), kind="delta", metadata={})
    return SparseFile.open(path, world.base)


def storage(world: World, kept: Measurements) -> None:
    """Bytes per kept weight of one task's deltas, with masks of the `fisher` localizer."""
    task = world.tasks[min(world.tasks)]
    ranked = task.rank("fisher", 0)
    for density in (0.001, 0.01, 0.05, 0.1, 0.2, 0.4):
        kept.get((density,), partial(_sizes, task, ranked, density))


def _sizes(task: Task, ranked: Ranked, density: float) -> dict[str, float]:
    path, coordinates = task.world.work / "storage", task.vector.coordinates
    mask = top_k(ranked.scores, kept_count(density, coordinates))
    sizes = {
        "with_factors": task.write(path, mask, ranked.factors),
        "delta": task.write(path, mask, {}),
        "int8": _in_8_bits(task.world, SparseFile.open(path)).path.stat().st_size,
        "delta_zstd": _through_zstd([path.read_bytes()]),
        "masked_zstd": _through_zstd(_masked(task, mask)),
        "csr": 8 * mask.total,
        "bitmap": 4 * mask.total + coordinates / 8,
    }
    return {name: size / mask.total for name, size in sizes.items()}


def _masked(task: Task, mask: Mask) -> Iterator[bytes]:
    """The masked task vector as whole tensors: differences inside of the mask, else zeros."""
    for name in task.world.names:
        whole = torch.zeros(task.vector.numel(name))
        if name in mask.names:
            coordinates = mask.coordinates(name)
            finetuned, base = (c.tensor(name).view(-1) for c in (task.finetuned, task.world.base))
            whole[coordinates] = finetuned[coordinates] - base[coordinates]
        yield whole.numpy().tobytes()


def _through_zstd(parts: Iterable[bytes]) -> int:
    """Bytes of all parts, each compressed at level 9."""
    codec = pyarrow.Codec("zstd", compression_level=9)
    return sum(len(codec.compress(part, asbytes=True)) for part in parts)


def _delta(world: World, task: Task, mode: str, density: float, seed: int) -> Path:
    return world.work / f"{task.name}-{mode}-{density}-{seed}.delta"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part, or print all measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.localizers")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--part",
        required=True,
        choices=("frontier", "official", "overhead", "merged", "storage", "int8", "tables"),
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--modes", default="random,dataless,fisher,distilled")
    parser.add_argument("--densities", help="the densities to measure (default: all)")
    parser.add_argument("--splits", default="validation,test", help="the splits of merged")
    rules = ",".join(name for name, *_ in RULES)
    parser.add_argument("--rules", default=rules, help="the rules of merged")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.part == "tables":
        print(tables(options.work))
        return
    kept = Measurements(options.work / f"{options.part}.json")
    world = World(options.data.absolute(), options.work.absolute())
    seeds = [int(seed) for seed in options.seeds.split(",")]
    modes = options.modes.split(",")
    densities: tuple[float, ...] = DENSITIES if options.part == "frontier" else MERGED
    if options.densities:
        densities = tuple(float(one) for one in options.densities.split(","))
    if options.part == "frontier":
        frontier(world, kept, seeds, modes, densities)
    elif options.part == "merged":
        splits, chosen = options.splits.split(","), options.rules.split(",")
        merged(world, kept, seeds, modes, densities, splits, chosen)
    elif options.part == "int8":
        int8(world, kept, "distilled", densities)
    elif options.part == "overhead":
        overhead(world, kept, seeds[0])
    elif options.part == "official":
        official(world, kept, seeds[0])
    else:
        storage(world, kept)


if __name__ == "__main__":
    main()
