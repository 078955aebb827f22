"""The delays of a line whose work is done by workers, and the cost of many registrations at once.

    python -m benchmarks.unattended [--registrations 9] [--at-once 20] [--workers 3] [--json FILE]

On a separate stack:

- from `register` to user code on the worker: from the act `registered` to the start of the run
  that onboards the model, with an idle worker; and the time of the whole command;
- from `register` to the new champion, on the playground;
- a remerge with nothing to do: its own time, and the time of a run with the imports and the start
  of the engine;
- many registrations at once: the time until one champion holds all, and the number of merges.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console

from benchmarks.registering import make_models
from playground.make import World, make_world
from restitch.deployments.local import stack
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.stack import StackFile
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.prefect_api import PrefectApi

PATIENCE_SECONDS = 900.0


@dataclass
class Figures:
    """The measurements, in seconds.

    Attributes:
        to_user_code: from the act to the start of the run, of each registration.
        command: the register command alone, of each registration.
        to_champion: from the start of the command to the champion that holds the model, of each
            model of the playground.
        idle_remerge: each remerge with nothing to do, alone.
        idle_process: the same as a run, with imports and the start of the engine.
        at_once: the number of registrations at once.
        merges: the number of merged versions for them.
        all_merged: from the first of them to the champion that holds all.
    """

    to_user_code: list[float]
    command: list[float]
    to_champion: list[float]
    idle_remerge: list[float]
    idle_process: list[float]
    at_once: int
    merges: int
    all_merged: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unattended")
    parser.add_argument("--registrations", type=int, default=9)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--world", type=Path, default=Path(".demo/world"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    world = make_world(options.world.absolute(), "demo")
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        figures = measure(
            world, Path(folder), options.registrations, options.at_once, options.workers
        )
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(figures), indent=2))
    out = Console(width=100)
    out.print(f"register to user code on the worker: {_spread(figures.to_user_code)}")
    out.print(f"the register command itself: {_spread(figures.command)}")
    out.print(f"register to new champion, playground: {_spread(figures.to_champion)}")
    out.print(f"remerge with nothing to do, own time: {_spread(figures.idle_remerge)}")
    out.print(f"the same as a run, with imports and engine: {_spread(figures.idle_process)}")
    out.print(
        f"{figures.at_once} registrations at once, {options.workers} workers: one champion with"
        f" all, {figures.merges} merges, {figures.all_merged:.0f} s"
    )


def measure(world: World, folder: Path, count: int, at_once: int, workers: int) -> Figures:
    """Measure everything on one stack, first with one worker and at the end with several."""
    os.environ["RESTITCH_HOME"] = str(folder / "home")
    home = Home.from_environment()
    prepare_environment(home)
    try:
        stack.up(home, 1, say=_silent)
        bench = Bench(home, folder)
        to_champion = bench.playground(world)
        models = make_models(world, folder / "models", count + at_once)
        bench.init("single", world)
        single = [bench.register("single", model) for model in models[:count]]
        idle = [bench.idle_remerge("single") for _ in range(5)]
        own, process = zip(*idle, strict=True)
        stack.up(home, workers, say=_silent)
        bench.init("many", world)
        merges, seconds = bench.register_at_once("many", models[count:])
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        stack.down(home)
    return Figures(
        to_user_code=[one for one, _ in single],
        command=[two for _, two in single],
        to_champion=to_champion,
        idle_remerge=list(own),
        idle_process=list(process),
        at_once=at_once,
        merges=merges,
        all_merged=seconds,
    )


class Bench:
    """Registers with the command, and reads the times from the store and from Prefect."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.home = home
        self.folder = folder
        (folder / "models").mkdir()
        url = StackFile.read(home.root).prefect_api_url
        assert url is not None
        self.api = PrefectApi(url)

    def init(self, line: str, world: World) -> None:
        """Create a line on the playground's base, without a benchmark."""
        values = {
            "line": line,
            "base": str(world.base),
            "family": "clip",
            "method": "localize-and-stitch",
            "localize": {"mode": "dataless", "density": 0.05},
        }
        file = self.folder / f"{line}.yaml"
        file.write_text(yaml.safe_dump(values))
        self._command("init", str(file)).wait()

    def playground(self, world: World) -> list[float]:
        """Seconds from the command to the champion, for each model of the playground."""
        self._command("init", str(world.line)).wait()
        line = yaml.safe_load(world.line.read_text())["line"]
        seconds = []
        for task in world.tasks:
            began = time.monotonic()
            self._command(
                *("register", line, "--wait", "--task", str(world.task_file(task))),
                *("--model", str(world.model(task))),
            ).wait()
            seconds.append(time.monotonic() - began)
        return seconds

    def register(self, line: str, model: Path) -> tuple[float, float]:
        """Seconds from the act to user code, and of the command; waits until it is merged."""
        began = time.monotonic()
        process, task = self._register(line, model)
        process.wait()
        command = time.monotonic() - began
        self._wait_for(line, {task})
        registered = self._ledger(line).state().tasks[task].versions[1].registered_at
        runs = self.api.runs("onboard", "restitch", "COMPLETED")
        own = [
            run
            for run in runs
            if run["parameters"]["line"] == line and run["parameters"]["task"] == task
        ]
        started = min(datetime.fromisoformat(run["start_time"]) for run in own)
        return (started - datetime.fromisoformat(registered)).total_seconds(), command

    def register_at_once(self, line: str, models: list[Path]) -> tuple[int, float]:
        """The number of merges, and seconds until the champion holds all models."""
        began = time.monotonic()
        started = [self._register(line, model) for model in models]
        for process, _ in started:
            process.wait()
        self._wait_for(line, {task for _, task in started})
        return len(self._ledger(line).state().versions), time.monotonic() - began

    def idle_remerge(self, line: str) -> tuple[float, float]:
        """Seconds of a remerge with nothing to do, and of a whole run of it."""
        script = (
            "import time; from restitch.flows.remerge import remerge; import sys\n"
            "import mlflow\n"
            f"remerge.body({line!r})\n"  # the first one of a process connects
            "began = time.perf_counter()\n"
            f"assert remerge.body({line!r}).action == 'unchanged'\n"
            "print(time.perf_counter() - began)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        deployment = self.api.deployment("remerge/restitch")
        assert deployment is not None
        run = self.api.create_run(deployment["id"], {"line": line}, f"idle-{time.time_ns()}")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = self.api.run(run["id"])
            if found is not None and found["state_type"] == "COMPLETED":
                break
            time.sleep(0.2)
        assert found is not None
        whole = datetime.fromisoformat(found["end_time"]) - datetime.fromisoformat(found["created"])
        return float(done.stdout.split()[-1]), whole.total_seconds()

    def _register(self, line: str, model: Path) -> "tuple[subprocess.Popen[bytes], str]":
        task = model.name
        file = self.folder / f"{task}.yaml"
        file.write_text(yaml.safe_dump({"task": task}))
        command = ("register", line, "--task", str(file), "--model", str(model))
        return self._command(*command), task

    def _wait_for(self, line: str, tasks: set[str]) -> None:
        ledger = self._ledger(line)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            champion = ledger.state().champion
            if champion is not None and tasks <= set(ledger.merged(champion).members):
                return
            time.sleep(0.1)
        raise RuntimeError(f"the champion of {line} does not hold {tasks}")

    def _ledger(self, line: str) -> Ledger:
        return Ledger(ObjectStore(self.home.open_store()), line)

    def _command(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "commands.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "restitch.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _silent(_: str) -> None:
    """Ignore the stack's messages."""


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"median {median(values):.2f} s ({low:.2f} to {high:.2f}, n={len(values)})"


if __name__ == "__main__":
    main()
