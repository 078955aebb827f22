"""Task arithmetic and TIES compared with mergekit: seconds and memory, alternating in one run.

`python -m benchmarks.mergekit BIN [--params 1.1e9] [--work DIR] [--json FILE]`: BIN is the `bin`
folder of a separate environment with mergekit (docs/results/mergekit.md explains how to make one),
which is only run as a program. Every merge is a separate process, `restitch merge` or
`mergekit-yaml`, measured from its start to the merged checkpoint on disk; both read the same four
checkpoints, from the page cache. Each program merges once before it is measured: then the bytecode
of its libraries is on disk, as after an ordinary installation, and restitch has kept what
transformers says about the configuration. restitch merges before and after mergekit, so that a busy
moment affects both. Private memory is the peak of `RssAnon`; resident pages of mapped files count
only in the other figure.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed import (
    HIDDEN,
    INTERMEDIATE,
    KV,
    TASKS,
    VOCABULARY,
    llama_shapes,
    make_models,
)


@dataclass(frozen=True)
class Merge:
    """One merge in the terms of restitch and of mergekit.

    Attributes:
        settings: restitch's settings.
        name: mergekit's name of the method.
        member: mergekit's parameters of each model.
        all: mergekit's parameters of the whole merge.
    """

    method: str
    settings: Mapping[str, Any]
    name: str
    member: Mapping[str, float]
    all: Mapping[str, Any]


def task_arithmetic(alpha: float) -> Merge:
    """The sum of the task vectors, times `alpha`."""
    own = {"normalize": False, "lambda": alpha}
    return Merge("task-arithmetic", {"alpha": alpha}, "task_arithmetic", {"weight": 1.0}, own)


def ties(density: float, alpha: float, trim: str = "tensor") -> Merge:
    """TIES; mergekit trims each tensor alone, and `normalize` makes its sum a mean."""
    settings = {"density": density, "alpha": alpha, "trim": trim}
    own = {"normalize": True, "lambda": alpha}
    return Merge("ties", settings, "ties", {"weight": 1.0, "density": density}, own)


MERGES = {
    "task-arithmetic": task_arithmetic(0.4),
    "ties": ties(0.2, 1.0),
    "ties, model": ties(0.2, 1.0, "model"),
}


@dataclass(frozen=True)
class Cost:
    """The cost of a process: seconds, processor seconds of all threads, and peak bytes."""

    name: str
    seconds: float
    processor: float
    private: int
    resident: int


def llama_config(
    hidden: int, intermediate: int, heads: int, kv: int, vocabulary: int, layers: int
) -> dict[str, Any]:
    """The configuration of a Llama, from which mergekit knows the tensors."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads * kv // hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def mergekit_file(folder: Path, merge: Merge, dtype: str, out_dtype: str) -> str:
    """The configuration of a merge for mergekit; JSON, which is YAML too.

    Args:
        folder: the folder of the models.
        merge: the merge.
        dtype: the type of the computation.
        out_dtype: the type of the merged model.
    """
    return json.dumps(
        {
            "merge_method": merge.name,
            "base_model": str(folder / "base"),
            "models": [
                {"model": str(folder / task), "parameters": dict(merge.member)} for task in TASKS
            ],
            "parameters": dict(merge.all),
            "dtype": dtype,
            "out_dtype": out_dtype,
        }
    )


def mergekit_command(
    program: Path, folder: Path, merge: Merge, out: Path, dtype: str, out_dtype: str
) -> list[str]:
    """Write mergekit's configuration next to `out`, and return the command."""
    file = out.with_suffix(".json")
    file.write_text(mergekit_file(folder, merge, dtype, out_dtype))
    flags = ["--lazy-unpickle", "--no-copy-tokenizer", "--quiet"]
    return [str(program / "mergekit-yaml"), str(file), str(out), *flags]


def restitch_command(folder: Path, merge: Merge, out: Path) -> list[str]:
    """The command that merges all tensors of the models with restitch."""
    command = [str(Path(sys.executable).with_name("restitch")), "merge", "--include", "*"]
    command += ["--base", str(folder / "base"), "--method", merge.method, "--out", str(out)]
    for task in TASKS:
        command += ["--model", f"{task}={folder / task}"]
    for key, value in merge.settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def measured(name: str, command: Sequence[str]) -> Cost:
    """Run a command to its end and measure it."""
    began = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        peaks = {"RssAnon": 0, "VmHWM": 0}
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                for kind, value in _memory(process.pid).items():
                    peaks[kind] = max(peaks[kind], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{name} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    used = usage.ru_utime + usage.ru_stime
    return Cost(name, seconds, used, peaks["RssAnon"], peaks["VmHWM"])


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {n: int(v.split()[0]) * 1024 for n, v in pairs if n in ("RssAnon", "VmHWM")}


def warm(files: Sequence[Path]) -> None:
    """Flush the disk, and read files so that they are in the page cache."""
    os.sync()
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.read(1 << 24):
                pass


def measure(folder: Path, program: Path, params: float, console: Console) -> list[Cost]:
    """Make missing models and measure everything."""
    shapes = llama_shapes(params)
    if not (folder / TASKS[-1]).exists():
        console.print("making 4 models")
        make_models(folder, shapes, TASKS, torch.bfloat16)
    layers = sum(name.endswith("q_proj.weight") for name in shapes)
    config = llama_config(HIDDEN, INTERMEDIATE, HIDDEN // 64, KV, VOCABULARY, layers)
    for task in ("base", *TASKS):
        (folder / task / "config.json").write_text(json.dumps(config))
    models = [folder / task / "model.safetensors" for task in ("base", *TASKS)]
    costs: list[Cost] = []

    def run(name: str, command: Sequence[str]) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        warm(models)
        costs.append(measured(name, command))
        console.print(f"{name}: {costs[-1].seconds:.1f} s")

    def ours(name: str) -> None:
        run(f"restitch, {name}", restitch_command(folder, MERGES[name], folder / "out"))

    def theirs(name: str, dtype: str) -> None:
        merge, out = MERGES[name], folder / "out"
        command = mergekit_command(program, folder, merge, out, dtype, "bfloat16")
        run(f"mergekit, {name}, {dtype}", command)

    ours("task-arithmetic")
    theirs("task-arithmetic", "bfloat16")
    costs.clear()  # they wrote bytecode
    ours("task-arithmetic")
    theirs("task-arithmetic", "bfloat16")
    ours("task-arithmetic")
    theirs("task-arithmetic", "float32")
    ours("task-arithmetic")
    ours("ties")
    ours("ties, model")
    theirs("ties", "bfloat16")
    ours("ties")
    ours("ties, model")
    shutil.rmtree(folder / "out")
    return costs


def show(costs: Sequence[Cost], console: Console) -> None:
    """Print all costs as a table, in the order of the runs."""
    table = Table("", "seconds", "processor", "private GB", "resident GB")
    for cost in costs:
        memory = (f"{size / 1e9:.2f}" for size in (cost.private, cost.resident))
        table.add_row(cost.name, f"{cost.seconds:.1f}", f"{cost.processor:.1f}", *memory)
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path, help="mergekit's bin folder")
    parser.add_argument("--params", type=float, default=1.1e9, help="number of weights")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--work", type=Path, help="folder that keeps the models for another run")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="restitch-mergekit-") as name:
        folder = arguments.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        costs = measure(folder, arguments.program, arguments.params, console)
    show(costs, console)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
