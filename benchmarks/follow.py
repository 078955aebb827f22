"""Following a line: bytes fetched and seconds of an update, relative to a model and its load.

`python -m benchmarks.follow [--params 1.1e9 | --checkpoints DIR] [--json FILE] [--folder DIR]`
makes a line of three members at density 10 %, of a Llama-shaped bf16 base with random changes, or
of the folders `base` and three others in DIR. It measures, as medians of alternating runs in this
process:

- the bytes of the patch of the third version, which an update fetches, against those of the model,
- `Follower.refresh` from the second version to the third, all of it and the part in which readers
  wait, against a new `Follower` of the third version. Its base is already verified;

It checks that the refreshed model has the same bits as the new one. With --params it needs about
seven bytes per weight of disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from rich.console import Console

from benchmarks.memory import byte_tokenizer, llama_config
from benchmarks.speed import Figure, llama_shapes, make_model, show
from restitch.serving.follower import Follower

LINE = "followed"
TASKS = ("one", "two", "three")
DENSITY = 0.1
# Goals of the update: bytes fetched over those of the model, and seconds over those of a load.
BYTES, SECONDS = 0.25, 0.1


def restitch(*arguments: object) -> None:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "restitch.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)


def make_line(folder: Path, base: Path) -> None:
    """Make the line, without data: nothing is evaluated."""
    line = {
        "line": LINE,
        "base": str(base),
        "family": "causal-lm",
        "method": "localize-and-stitch",
        "localize": {"mode": "dataless", "density": DENSITY},
    }
    (folder / "line.yaml").write_text(yaml.safe_dump(line), encoding="utf-8")
    restitch("init", folder / "line.yaml")


def register(folder: Path, task: str, model: Path) -> None:
    """Register a model, which makes a version."""
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump({"task": task}), encoding="utf-8")
    restitch("register", LINE, "--task", file, "--model", model)


def make_random_line(folder: Path, params: float) -> None:
    """Make a line of random models, which exist one at a time."""
    shapes = llama_shapes(params)
    config = llama_config(shapes)
    for number in range(len(TASKS) + 1):
        made = folder / ("base" if not number else TASKS[number - 1])
        make_model(made, shapes, number, torch.bfloat16)
        config.save_pretrained(made)
        byte_tokenizer().save_pretrained(made)
        if not number:
            make_line(folder, made)
        else:
            register(folder, made.name, made)
            shutil.rmtree(made)


def measure(runs: int) -> list[Figure]:
    """Update from the second version to the third and back, and load the third afresh."""
    follower = Follower(LINE)
    with follower.model() as model:
        size = sum(each.numel() * each.element_size() for each in model.parameters())
    updates, loads = [], []
    for _ in range(runs):
        restitch("rollback", LINE, 2, "--reason", "benchmark")
        follower.refresh()
        restitch("rollback", LINE, 3, "--reason", "benchmark")
        updates.append(follower.refresh())
        began = time.perf_counter()
        fresh = Follower(LINE)
        loads.append(time.perf_counter() - began)
        check_equal(follower, fresh)
        del fresh
    load = statistics.median(loads)
    pause = statistics.median(update.pause for update in updates)
    whole = statistics.median(update.seconds for update in updates)
    last = updates[-1]
    return [
        Figure("model", size / 1e9, "GB"),
        Figure("weights that differ from those of the version before", last.weights / 1e6, "M"),
        Figure("patch over model", last.patch_bytes / size, "x", goal=BYTES),
        Figure("load of a new Follower", load, "s"),
        Figure("update: readers wait", pause, "s"),
        Figure("update: readers wait, over the load", pause / load, "x", goal=SECONDS),
        Figure("update: all of it", whole, "s"),
        Figure("update: all of it, over the load", whole / load, "x"),
    ]


def check_equal(one: Follower, other: Follower) -> None:
    """Compare two models bit for bit."""
    with one.model() as first, other.model() as second:
        others = dict(second.named_parameters())
        for name, value in first.named_parameters():
            bits = torch.int16 if value.element_size() == 2 else torch.int32
            assert torch.equal(value.view(bits), others[name].view(bits)), name


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=float, default=1.1e9, help="number of weights")
    parser.add_argument("--checkpoints", type=Path, help="folder of `base` and three others")
    parser.add_argument("--runs", type=int, default=5, help="number of runs for each median")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="restitch-follow-") as name:
        os.environ["RESTITCH_HOME"] = str(Path(name) / "home")
        if arguments.checkpoints is None:
            make_random_line(Path(name), arguments.params)
        else:
            make_line(Path(name), arguments.checkpoints / "base")
            others = [p for p in sorted(arguments.checkpoints.iterdir()) if p.name != "base"]
            for folder in others[: len(TASKS)]:
                register(Path(name), folder.name, folder)
        figures = measure(arguments.runs)
    show(figures, Console(width=100))
    if arguments.json:
        text = json.dumps([asdict(figure) for figure in figures], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
