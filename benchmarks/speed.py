"""Speed and memory of localizing, stitching and exporting, as ratios in one run.

`python -m benchmarks.speed [--params 1.1e9] [--json FILE] [--folder DIR]` makes a
Llama-shaped bf16 checkpoint and three finetuned ones in a temporary folder (about ten
bytes per parameter) and measures, in this process and with warm caches:

- stitching and exporting three members at 5 % against `cp -r` of the base,
- the dataless mask of one model against reading both and |difference| in torch,
- storing the whole delta of one model against reading both and writing its bytes once,
- the private memory of each (dirty private pages, from /proc/self/smaps_rollup, in a
  separate process, because sampling slows the work down),
- the bytes per kept weight of sparse deltas.

Times are medians of alternating runs, so that a busy moment affects all of them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.export import export_weights
from restitch.merging.files.mask import Mask
from restitch.merging.files.sparse import (
    SparseFile,
    SparseInfo,
    SparseTensor,
    write_sparse,
    write_whole,
)
from restitch.merging.localize.dataless import localize_dataless
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.rules.stitch import DeltaMember, stitch, write_patch
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 2048, 5632, 256, 32000
TASKS = ("one", "two", "three")
DENSITY = 0.05

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Figure:
    """One measurement: its name, its value, and the limit that it must not exceed."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    goal: float | None = None


def llama_shapes(params: float) -> Shapes:
    """The tensors of a Llama with the number of layers that comes nearest to `params` weights."""
    layer: Shapes = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KV, HIDDEN),
        "self_attn.v_proj.weight": (KV, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layers = max(1, round((params - count(shapes)) / count(layer)))
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def minilm_shapes() -> Shapes:
    """The localizable tensors of a MiniLM with six layers."""
    shapes: Shapes = {}
    for index in range(6):
        front = f"encoder.layer.{index}."
        for name, shape in (
            ("attention.self.query", (384, 384)),
            ("attention.self.key", (384, 384)),
            ("attention.self.value", (384, 384)),
            ("attention.output.dense", (384, 384)),
            ("intermediate.dense", (1536, 384)),
            ("output.dense", (384, 1536)),
        ):
            shapes |= {f"{front}{name}.weight": shape, f"{front}{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{front}{name}.weight": (384,), f"{front}{name}.bias": (384,)}
    return shapes


def count(shapes: Shapes) -> int:
    """The number of weights of all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def make_models(folder: Path, shapes: Shapes, tasks: tuple[str, ...], dtype: torch.dtype) -> None:
    """Write `base` and one finetuned folder per task: weights of 0.02, changes of 0.0005."""
    for index, task in enumerate(("base", *tasks)):
        make_model(folder / task, shapes, index, dtype)


def make_model(folder: Path, shapes: Shapes, index: int, dtype: torch.dtype) -> None:
    """Write the base, which has the index 0, or a finetuned model of it."""
    weights = torch.Generator().manual_seed(0)
    changes = torch.Generator().manual_seed(index)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=weights).mul_(0.02)
        if index:
            value = value.to(dtype).float()
            value += torch.randn(shape, generator=changes).mul_(0.0005)
        tensors[name] = value.to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def open_vector(folder: Path, task: str) -> TaskVector:
    """The task vector of a task over all of its tensors."""
    base, finetuned = Checkpoint.open(folder / "base"), Checkpoint.open(folder / task)
    return TaskVector(base, finetuned, base.floating)


def write_delta(path: Path, vector: TaskVector, mask: Mask) -> SparseInfo:
    """Write the sparse delta of a finetuned model under a mask."""

    def kept() -> Iterator[SparseTensor]:
        for name in mask.names:
            coordinates = mask.coordinates(name)
            values = vector.finetuned.tensor(name).view(-1)[coordinates]
            yield SparseTensor(name, vector.finetuned.info(name).shape, coordinates, values)

    return write_sparse(path, kept(), kind="delta", metadata={})


def difference(folder: Path, task: str = "one") -> None:
    """The reference of localizing: read both models and compute |difference|."""
    files = (folder / name / "model.safetensors" for name in ("base", task))
    with safe_open(next(files), "pt") as base, safe_open(next(files), "pt") as finetuned:
        for name in base.keys():  # noqa: SIM118 - not a mapping
            (finetuned.get_tensor(name).float() - base.get_tensor(name).float()).abs_()


def mask(folder: Path, task: str = "one") -> None:
    """The dataless mask with all of its coordinates."""
    result = localize_dataless(open_vector(folder, task), DENSITY, scratch=folder)
    for name in result.names:
        result.coordinates(name)


def read_and_write(folder: Path, task: str = "one") -> None:
    """The reference of a whole delta: read both models, and write one of them durably."""
    (folder / "out").mkdir()
    block = memoryview(bytearray(1 << 22))
    with (folder / "out" / "written").open("wb", buffering=0) as out:
        for name in ("base", task):
            with (folder / name / "model.safetensors").open("rb", buffering=0) as file:
                while size := file.readinto(block):
                    if name == task:
                        out.write(block[:size])
        os.fsync(out.fileno())


def whole(folder: Path, task: str = "one") -> None:
    """Localize with density 1, and store the delta as registering does."""
    vector = open_vector(folder, task)
    kept = localize_dataless(vector, 1.0)
    kept.digest()
    file = folder / "out" / "delta"
    file.parent.mkdir()
    info = write_whole(file, vector.finetuned, kept.names, kind="delta", metadata={})
    store = ObjectStore(FolderStore(folder / "out" / "store"))
    store.put_blob(file, move=True, digest=info.digest)


def copy(folder: Path) -> None:
    """The reference of exporting: `cp -r` of the base."""
    subprocess.run(["cp", "-r", str(folder / "base"), str(folder / "out")], check=True)


def export(folder: Path) -> None:
    """Stitch the members and export the merged model."""
    members = [DeltaMember(task, SparseFile.open(folder / f"{task}.delta")) for task in TASKS]
    base = Checkpoint.open(folder / "base")
    (folder / "out").mkdir()
    export_weights(base, stitch(base, members), folder / "out")


def patch(folder: Path) -> None:
    """Stitch the members and write the patch."""
    members = [DeltaMember(task, SparseFile.open(folder / f"{task}.delta")) for task in TASKS]
    base = Checkpoint.open(folder / "base")
    (folder / "out").mkdir()
    write_patch(folder / "out" / "patch", base, stitch(base, members), {}, packed=True)


def timed(action: Callable[[Path], None], folder: Path) -> float:
    """Seconds of an action, after removing the previous output and flushing the disk."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    action(folder)
    return time.perf_counter() - start


def interleaved(
    actions: Mapping[str, Callable[[Path], None]], folder: Path, runs: int
) -> dict[str, float]:
    """Median seconds of each action, alternating, so that a busy moment affects all of them."""
    for action in actions.values():
        timed(action, folder)  # warms the caches
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            times[name].append(timed(action, folder))
    return {name: statistics.median(values) for name, values in times.items()}


def private_bytes() -> int:
    """Dirty private memory of this process now."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Private_Dirty")


def peak_added(action: Callable[[Path], None], folder: Path) -> int:
    """The peak of the private memory that an action adds, sampled every few milliseconds."""
    before, peak, stop = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.003):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action(folder)
    finally:
        stop.set()
        watcher.join()
    return max(0, peak - before)


def peak_memory(action: Callable[[Path], None], folder: Path) -> int:
    """The private memory of an action in a fresh process, without its imports."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    # Memory that an earlier action freed, but the allocator kept, would hide this action's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_added, action, folder).result()


def measure(folder: Path, params: float, runs: int, console: Console) -> list[Figure]:
    """Make the models and measure everything."""
    shapes = llama_shapes(params)
    console.print(f"making 4 models of {count(shapes) / 1e9:.2f} B weights")
    make_models(folder, shapes, TASKS, torch.bfloat16)
    os.sync()
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 2

    console.print("localizing")
    times = interleaved({"difference": difference, "mask": mask}, folder, runs)
    times |= interleaved({"read and write": read_and_write, "whole": whole}, folder, runs)
    mask_memory = peak_memory(mask, folder)
    written = []
    for task in TASKS:
        vector = open_vector(folder, task)
        kept = localize_dataless(vector, DENSITY, scratch=folder)
        written.append(write_delta(folder / f"{task}.delta", vector, kept))

    console.print("stitching and exporting")
    times |= interleaved({"copy": copy, "export": export, "patch": patch}, folder, runs)
    export_memory = peak_memory(export, folder)
    patch_memory = peak_memory(patch, folder)

    (folder / "small").mkdir()
    make_models(folder / "small", minilm_shapes(), ("one",), torch.float32)
    vector = open_vector(folder / "small", "one")
    small = write_delta(folder / "small" / "delta", vector, localize_dataless(vector, 0.01))
    memory_limit = (0.6e9 + largest) / 1e9
    return [
        Figure("weights", count(shapes) / 1e9, "B"),
        Figure("cp -r of the base", times["copy"], "s"),
        Figure("stitch + export, 3 members at 5 %", times["export"], "s"),
        Figure("stitch + export / cp -r", times["export"] / times["copy"], "x", 4, 2),
        Figure("private memory of stitch + export", export_memory / 1e9, "GB", memory_limit),
        Figure("stitch + patch / cp -r", times["patch"] / times["copy"], "x"),
        Figure("private memory of stitch + patch", patch_memory / 1e9, "GB", memory_limit),
        Figure("|difference| in torch", times["difference"], "s"),
        Figure("dataless mask at 5 %", times["mask"], "s"),
        Figure("mask / |difference|", times["mask"] / times["difference"], "x", 1.6, 1.3),
        Figure("private memory of the mask", mask_memory / 1e9, "GB", memory_limit),
        Figure("reading both models and writing one", times["read and write"], "s"),
        Figure("whole delta", times["whole"], "s"),
        Figure(
            "whole delta / reading and writing", times["whole"] / times["read and write"], "x", 1.3
        ),
        Figure("bf16 delta at 5 %", written[0].bytes / written[0].kept, "B/weight"),
        Figure("fp32 delta at 1 %, MiniLM", small.bytes / small.kept, "B/weight", 5.2),
    ]


def show(figures: list[Figure], console: Console) -> None:
    """Print the figures as a table."""
    table = Table("", "measured", "at most", "goal")
    for figure in figures:
        cells = [
            "" if value is None else f"{value:.3g} {figure.unit}"
            for value in (figure.value, figure.limit, figure.goal)
        ]
        met = figure.limit is None or figure.value <= figure.limit
        table.add_row(figure.name, *cells, style=None if met else "red")
    console.print(table)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=float, default=1.1e9, help="number of weights")
    parser.add_argument("--runs", type=int, default=3, help="number of runs for each median")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="restitch-speed-") as name:
        figures = measure(Path(name), arguments.params, arguments.runs, console)
    show(figures, console)
    if arguments.json:
        text = json.dumps([asdict(figure) for figure in figures], indent=2)
        arguments.json.write_text(text + "\n")
    if any(figure.limit is not None and figure.value > figure.limit for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
