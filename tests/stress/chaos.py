"""Kill processes at random moments: nothing must be lost, doubled or wrong.

    python -m tests.stress.chaos [--kills 200] [--seed 0] [--workers 2] [--json FILE]

On a separate stack (two servers, a receiver, workers) models are registered one after the other,
while `kill -9` hits runs of the flows (at armed and at random moments), workers with and without
their runs, both servers, and the commands `register` and `export`. Dead processes are started
again with `restitch up`, as a service manager would do; nothing else is repaired by hand. After
each round the champion must hold every model. At the end the merged model must have the same bytes
as in a home in which nothing was killed.

No model is killed more than twice while it is onboarded, and no remerge three times in a row:
restitch gives up after three times, which is tested elsewhere.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from benchmarks.registering import make_models
from playground.make import World, make_world
from restitch.deployments.local import stack
from restitch.merging.errors import Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.stack import StackFile
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.prefect_api import PrefectApi
from tests.stress.chaos_outcome import Kill, Outcome, examine, show

LINE = "chaos"
MOMENTS = ("mask put", "entry put", "state swapped", "mlflow")
# The kinds of 200 kills; fewer kills are chosen in these proportions.
PLAN = {
    "mask put": 13,
    "entry put": 14,
    "state swapped": 14,
    "mlflow": 14,
    "export": 12,
    "onboard": 40,
    "remerge": 37,
    "host": 8,
    "worker": 14,
    "prefect": 12,
    "mlflow server": 12,
    "register": 10,
}
KILLS_PER_ROUND = 8
PER_MODEL, PER_ROUND = 2, {"remerge": 2, "host": 1, "prefect": 1, "mlflow server": 1}
SERVICES = ("host", "worker", "prefect", "mlflow server")  # started again after a kill
SETTLES_WITHIN = 420.0
KILLED_WITHIN = 45.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it and print the table; exit code 1 if something was lost, doubled or wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--world", type=Path, default=Path(".demo/small-world"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    world = make_world(options.world.absolute(), "small")
    with tempfile.TemporaryDirectory(prefix="restitch-chaos-") as folder:
        say = Console(stderr=True, highlight=False).print
        outcome = run(world, Path(folder), options.kills, options.seed, options.workers, say)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(outcome), indent=2))
    show(outcome, Console(width=100))
    sys.exit(0 if outcome.is_clean else 1)


def run(
    world: World, folder: Path, kills: int, seed: int, workers: int, say: Callable[[str], None]
) -> Outcome:
    """Kill `kills` processes, and examine the line afterwards."""
    chaos = Chaos(world, folder, random.Random(seed), workers, say)
    began = time.monotonic()
    try:
        chaos.begin()
        chaos.kill_all(chosen_kinds(kills, chaos.draw))
        chaos.finish()
    finally:
        stack.down(chaos.home)
    chaos.outcome.seconds = time.monotonic() - began
    return chaos.outcome


def chosen_kinds(kills: int, draw: random.Random) -> list[str]:
    """The kinds of `kills` kills in the plan's proportions, in random order."""
    total = sum(PLAN.values())
    exact = {kind: kills * share / total for kind, share in PLAN.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    rest = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in rest[: kills - sum(counts.values())]:
        counts[kind] += 1
    order = [kind for kind, count in counts.items() for _ in range(count)]
    draw.shuffle(order)
    return order


class Chaos:
    """The run: a home with its stack, the models, and the kills so far."""

    def __init__(
        self,
        world: World,
        folder: Path,
        draw: random.Random,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        self.world, self.folder, self.draw, self.workers = world, folder, draw, workers
        self.say = say
        self.outcome = Outcome()
        self.signs = folder / "signs"
        self.registered: list[str] = []
        self.deaths: Counter[str] = Counter()
        self.round = 0
        for name in ("armed", "claimed", "inside"):
            (self.signs / name).mkdir(parents=True)
        (folder / "models").mkdir()
        os.environ["RESTITCH_CHAOS"] = str(self.signs)
        os.environ["RESTITCH_HOME"] = str(folder / "home")
        self.home = Home.from_environment()
        prepare_environment(self.home)
        self.ledger = Ledger(ObjectStore(self.home.open_store()), LINE)
        self.models: dict[str, tuple[Path, Path]] = {}

    def begin(self) -> None:
        """Start the stack and make the line."""
        from restitch.flows.lines.init_line import init_line

        self.restart()
        init_line(self._line_file())
        self.restart()  # with the schedule of the line

    def kill_all(self, kinds: list[str]) -> None:
        """Run rounds until all kills have happened."""
        left = list(kinds)
        while left:
            self.round += 1
            before = len(self.outcome.kills)
            for kind in self._batch(left):
                if self._kill(kind, self._new_model()):
                    left.remove(kind)
                if kind in SERVICES:
                    self.restart()
            self._settle()
            happened = self.outcome.kills[before:]
            if happened:
                happened[-1].recovered = time.monotonic() - happened[-1].at
                self.say(
                    f"round {self.round}: {len(happened)} kills; recovered in "
                    f"{happened[-1].recovered:.0f} s; {len(left)} kills left"
                )

    def finish(self) -> None:
        """Compare the line with one in which nothing was killed."""
        from restitch.tasks.publish import mirror

        self.restart()
        mirror(LINE)
        self.outcome.models = len(self.registered)
        self.outcome.versions = len(self.ledger.state().versions)
        examine(self.outcome, self.ledger, self.folder, self.registered, self.models)

    def restart(self) -> None:
        """Start dead processes, and let the workers load the flows of `chaos_entry`."""
        os.environ.pop("PREFECT_API_URL", None)
        for attempt in range(3):
            try:
                stack.up(self.home, self.workers, say=lambda _: None)
                break
            except Unavailable:
                if attempt == 2:
                    raise
        api = self._api()
        for flow in ("onboard", "remerge"):
            found = api.deployment(f"{flow}/restitch")
            assert found is not None
            entrypoint = f"tests.stress.chaos_entry.{flow}_flow"
            if found["entrypoint"] != entrypoint:
                api.set_entrypoint(found["id"], entrypoint)

    def _batch(self, left: list[str]) -> list[str]:
        """The kills of the next round: a few, with a limit for each kind."""
        chosen: list[str] = []
        for kind in left:
            if chosen.count(kind) < PER_ROUND.get(kind, KILLS_PER_ROUND):
                chosen.append(kind)
            if len(chosen) == KILLS_PER_ROUND:
                break
        return chosen

    def _kill(self, kind: str, task: str) -> bool:
        """Kill once; False if there was nothing to kill in time."""
        if kind == "register":
            return self._registering(task)
        if kind == "export":
            return self._exporting()
        # Give the workers something to do.
        if kind in (*MOMENTS, "onboard", "host"):
            self._register(task)
        else:
            self._keep_busy()
        if kind in MOMENTS:
            return self._at_moment(kind)
        if kind in ("onboard", "remerge"):
            return self._anywhere_in(kind)
        if kind == "host":
            return self._host()
        name = {"mlflow server": "mlflow", "prefect": "prefect"}.get(kind) or self.draw.choice(
            [f"worker-{n + 1}" for n in range(self.workers)]
        )
        time.sleep(self.draw.uniform(0, 3))
        process = StackFile.read(self.home.root).processes[name]
        os.kill(process.pid, signal.SIGKILL)
        self._record(kind, "serving")
        time.sleep(self.draw.uniform(0, 3))  # away for a while
        return True

    def _at_moment(self, kind: str) -> bool:
        armed = self.signs / "armed" / kind
        deadline = time.monotonic() + KILLED_WITHIN
        while time.monotonic() < deadline:
            armed.touch()
            claim = self._claimed(kind, 5.0)
            if claim is None:
                self._keep_busy()
                continue
            pid = int(claim.name.partition(".")[0])
            inside = self._inside(pid)
            if inside is not None and self._may_die(*inside):
                os.kill(pid, signal.SIGKILL)
                self._died(pid, *inside, kind)
                claim.unlink(missing_ok=True)
                return True
            claim.unlink(missing_ok=True)  # let it continue
        armed.unlink(missing_ok=True)
        claim = self._claimed(kind, 0.2)
        if claim is not None:
            claim.unlink(missing_ok=True)
        return False

    def _claimed(self, kind: str, seconds: float) -> Path | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [p for p in (self.signs / "claimed").iterdir() if p.name.endswith(f".{kind}")]
            if found:
                return found[0]
            time.sleep(0.01)
        return None

    def _anywhere_in(self, flow: str) -> bool:
        deadline = time.monotonic() + KILLED_WITHIN
        idle = time.monotonic()
        while time.monotonic() < deadline:
            for pid, doing, subject in self._all_inside():
                if doing != flow or not self._may_die(doing, subject):
                    continue
                time.sleep(self.draw.uniform(0, 2.5))
                if self._inside(pid) is not None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self._died(pid, doing, subject, "anywhere")
                        return True
            if time.monotonic() - idle > 5:
                self._keep_busy()
                idle = time.monotonic()
            time.sleep(0.02)
        return False

    def _host(self) -> bool:
        """Kill a worker together with its run, as if its host lost power."""
        deadline = time.monotonic() + KILLED_WITHIN
        while time.monotonic() < deadline:
            for pid, doing, subject in self._all_inside():
                worker = self._worker_of(pid)
                if worker is None or not self._may_die(doing, subject):
                    continue
                time.sleep(self.draw.uniform(0, 1.5))
                if self._inside(pid) is None:
                    continue
                for one in (worker, *reversed(worker.children(recursive=True))):
                    with suppress(psutil.Error):
                        one.kill()
                self._died(pid, doing, subject, "with its host", "host")
                return True
            self._keep_busy()
            time.sleep(0.05)
        return False

    def _worker_of(self, pid: int) -> psutil.Process | None:
        workers = {
            p.pid
            for name, p in StackFile.read(self.home.root).processes.items()
            if name.startswith("worker-")
        }
        with suppress(psutil.Error):
            return next((p for p in psutil.Process(pid).parents() if p.pid in workers), None)
        return None

    def _exporting(self) -> bool:
        line_state = self.ledger.state()
        if line_state.champion is None:
            return False
        out = self.folder / "export"
        arguments = ("export", LINE, str(line_state.champion), str(out), "--overwrite")
        (self.signs / "armed" / "export").touch()
        process = self._command(*arguments)
        claim = self._claimed("export", KILLED_WITHIN)
        assert claim is not None, "the export ended before its armed moment"
        process.kill()
        process.wait()
        claim.unlink()
        self._record("export", "export")
        (self.signs / "inside" / str(process.pid)).unlink(missing_ok=True)
        before = sorted(out.iterdir()) if out.exists() else []
        if before and not (out / "restitch.json").exists():
            self.outcome.wrong.append(f"half an export of version {line_state.champion}")
        if self._command(*arguments).wait() != 0:
            self.outcome.wrong.append(f"no export of version {line_state.champion} after a kill")
        record = json.loads((out / "restitch.json").read_text())
        if record["patch"] != self.ledger.merged(line_state.champion).patch:
            self.outcome.wrong.append(f"export of version {line_state.champion}")
        return True

    def _register(self, task: str) -> None:
        """Register a model from this process."""
        from restitch.flows.register import register

        model, file = self.models[task]
        register(LINE, file, str(model))
        self.registered.append(task)

    def _registering(self, task: str) -> bool:
        """Kill the command `register`, and run it again."""
        model, file = self.models[task]
        arguments = ("register", LINE, "--task", str(file), "--model", str(model))
        process = self._command(*arguments)
        time.sleep(self.draw.uniform(1, 4.5))
        killed = process.poll() is None
        if killed:
            process.kill()
            self._record("register", "register")
        process.wait()
        (self.signs / "inside" / str(process.pid)).unlink(missing_ok=True)
        if self._command(*arguments).wait() != 0:
            self.outcome.lost.append(f"{task}: register failed")
        self.registered.append(task)
        return killed

    def _command(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "commands.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.stress.chaos_entry", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _settle(self) -> None:
        """Wait until the champion holds all models, or record a loss."""
        deadline = time.monotonic() + SETTLES_WITHIN
        while time.monotonic() < deadline:
            line_state = self.ledger.state()
            record = (
                None if line_state.champion is None else self.ledger.merged(line_state.champion)
            )
            if record is not None and set(record.members) == set(self.registered):
                return
            time.sleep(0.2)
        states = {
            t: line_state.tasks[t].versions[1].state
            for t in self.registered
            if t in line_state.tasks
        }
        odd = {t: s for t, s in states.items() if s != "ready"}
        self.outcome.lost.append(f"round {self.round}: not all in the champion; {odd}")
        raise RuntimeError(f"the line did not settle: {odd}, kills {self.outcome.kills[-8:]}")

    def _keep_busy(self) -> None:
        """Request a forced remerge, unless one is running."""
        with suppress(Unavailable):
            api = self._api()
            runs = api.runs("remerge", "restitch", "SCHEDULED", "PENDING", "RUNNING")
            if all(r["state_type"] == "SCHEDULED" and not r["parameters"]["force"] for r in runs):
                found = api.deployment("remerge/restitch")
                if found is not None:
                    key = f"busy-{time.time_ns()}"
                    api.create_run(found["id"], {"line": LINE, "force": True}, key)

    def _may_die(self, doing: str, subject: str) -> bool:
        key = f"{doing} {subject}" if doing == "onboard" else f"{doing} in {self.round}"
        return self.deaths[key] < PER_MODEL

    def _died(self, pid: int, doing: str, subject: str, how: str, process: str = "run") -> None:
        key = f"{doing} {subject}" if doing == "onboard" else f"{doing} in {self.round}"
        self.deaths[key] += 1
        (self.signs / "inside" / str(pid)).unlink(missing_ok=True)
        self._record(process, f"{doing}: {how}")

    def _record(self, process: str, phase: str) -> None:
        self.outcome.kills.append(Kill(process, phase, self.round, time.monotonic()))
        self.say(f"killed {process} in {phase}")

    def _inside(self, pid: int) -> tuple[str, str] | None:
        with suppress(OSError, ValueError):
            found = json.loads((self.signs / "inside" / str(pid)).read_text())
            if psutil.pid_exists(pid):
                return found["doing"], found["subject"]
        return None

    def _all_inside(self) -> Iterator[tuple[int, str, str]]:
        for marker in list((self.signs / "inside").iterdir()):
            if marker.name.isdigit():
                found = self._inside(int(marker.name))
                if found is not None:
                    yield int(marker.name), *found

    def _api(self) -> PrefectApi:
        url = StackFile.read(self.home.root).prefect_api_url
        assert url is not None
        return PrefectApi(url, patience=90.0)

    def _line_file(self) -> Path:
        file = self.folder / "line.yaml"
        values = {
            "line": LINE,
            "base": str(self.world.base),
            "family": "clip",
            "method": "localize-and-stitch",
            "localize": {"mode": "dataless", "density": 0.05},
        }
        file.write_text(yaml.safe_dump(values))
        return file

    def _new_model(self) -> str:
        """Make a new model; the first three have data and are evaluated."""
        number = len(self.models)
        name = f"task{number:03d}"
        (model,) = make_models(self.world, self.folder / "models", 1, number)
        file = self.folder / f"{name}.yaml"
        values: dict[str, Any] = {"task": name}
        if number < len(self.world.tasks):
            known_file = self.world.task_file(self.world.tasks[number])
            known = yaml.safe_load(known_file.read_text())
            known["data"]["path"] = str((known_file.parent / known["data"]["path"]).resolve())
            values = {**known, "task": name}
        file.write_text(yaml.safe_dump(values))
        self.models[name] = (model, file)
        return name


if __name__ == "__main__":
    main()
