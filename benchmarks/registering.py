"""The cost of a registration as a line grows: the tenth model against the second.

    python -m benchmarks.registering [--models 10] [--repeats 3] [--json FILE]

Ten finetuned models on the playground's base are registered one after the other through the
function behind `restitch register`, in fresh homes: reading, digest, validation, localizing,
stitching, the audit trail and MLflow. The tasks have no data, so there is no evaluation. The
models are the playground's own with their differences rolled by some places, which keeps their
distribution and gives each a different mask.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from playground.make import World, make_world
from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register
from restitch.registry.home import Home, prepare_environment


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the seconds of each registration and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registering")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="demo", choices=("demo", "small"))
    parser.add_argument("--world", type=Path, default=Path(".demo/world"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    world = make_world(options.world, options.size)
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        models = make_models(world, Path(folder), options.models)
        runs = [measure(world, models, Path(folder) / f"run{n}") for n in range(options.repeats)]
    seconds = [median(run[position] for run in runs) for position in range(options.models)]
    ratio = seconds[-1] / seconds[1]
    out = Console(width=100)
    for position, value in enumerate(seconds):
        out.print(f"model {position + 1:>3}: {value:.3f} s")
    out.print(f"model {options.models} over model 2: {ratio:.2f} (goal: at most 1.2)")
    if options.json is not None:
        options.json.write_text(json.dumps({"seconds": seconds, "ratio": ratio}, indent=2))


def make_models(world: World, folder: Path, count: int, first: int = 0) -> list[Path]:
    """Write finetuned models with the rolled differences of the playground's own.

    Args:
        world: the world with the original models.
        folder: the folder to write to.
        count: the number of models.
        first: the number of the first model; different numbers give different models.
    """
    base = load_file(world.base / "model.safetensors")
    originals = [world.model(task) for task in world.tasks]
    models = []
    for number in range(first, first + count):
        original = originals[number % len(originals)]
        tuned = load_file(original / "model.safetensors")
        target = folder / f"model{number}"
        shutil.copytree(original, target)
        save_file(
            {name: _rolled(base[name], value, number) for name, value in tuned.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
        models.append(target)
    return models


def _rolled(base: torch.Tensor, tuned: torch.Tensor, places: int) -> torch.Tensor:
    if not tuned.is_floating_point():
        return tuned
    return (base + torch.roll((tuned - base).flatten(), places).reshape(base.shape)).contiguous()


def measure(world: World, models: list[Path], home: Path) -> list[float]:
    """Seconds of each registration in a fresh home."""
    os.environ["RESTITCH_HOME"] = str(home)
    prepare_environment(Home.from_environment())
    home.mkdir()
    line = yaml.safe_load(world.line.read_text(encoding="utf-8"))
    values = {"line": "growth", "base": str(world.base), "family": "clip"}
    values |= {"method": line["method"], "localize": line["localize"]}
    file = home / "line.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    init_line(file)
    seconds = []
    for number, model in enumerate(models):
        task = home / f"task{number}.yaml"
        task.write_text(f"task: task{number}\n", encoding="utf-8")
        started = time.perf_counter()
        register("growth", task, str(model))
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
