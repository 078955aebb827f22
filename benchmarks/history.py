"""Response times of the audit commands on a line with a thousand merged versions.

    python -m benchmarks.history [--versions 1000] [--members 20] [--json FILE]

The line is simulated: the ledger writes acts and records as a remerge would, with results and a
paired evaluation for every member, but without weights. Then `history`, `history --as-of`,
`history --versions`, `show` and `why` run as a user runs them, each in a separate process, and the
seconds of the whole process are printed; `status` shows the fixed cost of any command.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.recipe import Recipe, RecipeBase, RecipeMember, RecipeMethod
from restitch.modeling.evaluation import Evaluation
from restitch.modeling.row_values import Bits
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import MemberFacts, ModelRef, ModelVersion
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import (
    DataUsed,
    MergedMember,
    MergedRecord,
    Retention,
    TaskResult,
)
from restitch.registry.record import Interval
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.metric import METRICS
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.console import working

LINE = "long"
ROWS = 1000
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate the line, run the commands and print the times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history")
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        home = Home(Path(folder) / "home")
        home.create()
        ledger = simulated(ObjectStore(home.open_store()), options.versions, options.members)
        middle = ledger.merged(options.versions // 2).created_at
        commands = {
            "status": ("status", LINE),
            "history": ("history", LINE),
            "history --as-of": ("history", LINE, "--as-of", middle),
            "history --event": ("history", LINE, "--event", "promoted"),
            "history --versions": ("history", LINE, "--versions"),
            "show": ("show", LINE),
            "why": ("why", LINE, "task00"),
        }
        seconds = {
            name: [timed(home.root, words) for _ in range(options.repeats)]
            for name, words in commands.items()
        }
    out = Console(width=100)
    out.print(
        f"{options.versions} merged versions, {options.members} members, {options.repeats} runs"
    )
    for name, values in seconds.items():
        out.print(f"{name:20} {median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
    if options.json is not None:
        options.json.write_text(json.dumps(seconds, indent=2))


def timed(home: Path, words: tuple[str, ...]) -> float:
    """Seconds of a command in a separate process, with `--json`."""
    environment = {**os.environ, "RESTITCH_HOME": str(home)}
    command = [sys.executable, "-m", "restitch.cli.main", *words, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    seconds = time.perf_counter() - started
    json.loads(done.stdout)
    return seconds


def simulated(objects: ObjectStore, versions: int, members: int) -> Ledger:
    """A line with a new merged version every quarter of an hour, each of them promoted."""
    clock = [BEGAN]
    ledger = Ledger(objects, LINE, now=lambda: clock[0])
    spec = LineSpec(line=LINE, base="/base", family="clip", method=MethodSpec(name="average"))
    base = ModelRef(uri="/base", weights=_digest("base"), config=_digest("config"))
    ledger.create(spec, base, "benchmark", "line long")
    models = [_model(number) for number in range(members)]
    draw = random.Random(0)
    with working(f"simulating {versions} versions") as progress:
        for number, model in enumerate(models):
            _register(ledger, f"task{number:02}", model)
        for version in range(1, versions + 1):
            clock[0] += timedelta(minutes=15)
            _merge(ledger, models, version, clock[0], draw)
            progress(version, versions)
    return ledger


def _register(ledger: Ledger, task: str, model: ModelVersion) -> None:
    def change(line_state: LineState) -> LineState:
        return line_state.with_task(TaskSpec(task=task)).with_version(task, model)

    ledger.act("registered", "benchmark", f"{task} from {model.model.uri}", change)


def _merge(
    ledger: Ledger, models: list[ModelVersion], version: int, at: datetime, draw: random.Random
) -> None:
    record = _record(ledger.objects, models, version, at, draw)
    ledger.objects.put_blob(record.to_bytes())
    digests = {"recipe": record.recipe_digest, "patch": record.patch}
    reason = f"version {version}: no gates"
    ledger.act("merged", "benchmark", reason, lambda h: h.with_merged(record.digest), digests)
    ledger.act("promoted", "benchmark", reason, lambda h: h.promoted(version), digests)


def _record(
    objects: ObjectStore,
    models: list[ModelVersion],
    version: int,
    at: datetime,
    draw: random.Random,
) -> MergedRecord:
    recipe = Recipe(
        base=RecipeBase(_digest("base"), _digest("config")),
        family="clip",
        method=RecipeMethod("average", 1, {"round": version}),
        members=tuple(
            RecipeMember(f"task{n:02}", m.model.weights, str(m.mask), str(m.delta))
            for n, m in enumerate(models)
        ),
        code=1,
    )
    results = {}
    for number in range(len(models)):
        correct = draw.randbytes(ROWS // 8)
        value = sum(byte.bit_count() for byte in correct) / ROWS
        # Only the rows of the first task, which `why` reads, differ from version to version.
        right = np.unpackbits(np.frombuffer(correct, np.uint8)).astype(np.bool_) & (number == 0)
        evaluation = Evaluation.of(Bits(METRICS["accuracy"], right))
        blob = objects.put_json(evaluation.to_json())
        results[f"task{number:02}"] = TaskResult(
            split="test",
            base=0.4,
            finetuned=0.95,
            grafted=0.9,
            merged=value,
            normalized=value / 0.95,
            interval=Interval(low=value - 0.03, high=value + 0.03),
            count=ROWS,
            evaluations={"merged": blob},
            data=DataUsed(path="/data", split="test", digest=_digest(f"data {number}")),
        )
    return MergedRecord(
        line=LINE,
        version=version,
        recipe=recipe.to_json(),
        recipe_digest=recipe.digest(),
        patch=digest_json(["patch", version]),
        patch_bytes=10**7,
        kept=2 * 10**6,
        members={
            f"task{n:02}": MergedMember(
                version=1,
                uri=m.model.uri,
                weights=m.model.weights,
                config=m.model.config,
                mask=str(m.mask),
                delta=str(m.delta),
                facts=MemberFacts(density=0.01, kept=10**5, delta_bytes=5 * 10**5),
            )
            for n, m in enumerate(models)
        },
        results=results,
        retention=Retention(task="general", value=0.6, base=0.63, ratio=0.6 / 0.63),
        created_at=at.isoformat(timespec="microseconds"),
        made_by={"actor": "benchmark"},
        timings={"stitch": 1.0, "evaluate": 60.0},
        software={"restitch": "0.1.0"},
    )


def _model(number: int) -> ModelVersion:
    name = f"model {number}"
    ref = ModelRef(uri=f"/models/{number}", weights=_digest(name), config=_digest("config"))
    digests = {"mask": _digest(f"mask {number}"), "delta": _digest(f"delta {number}")}
    return ModelVersion(model=ref, state="ready", registered_at=BEGAN.isoformat(), **digests)


def _digest(name: str) -> str:
    return digest_bytes(name.encode())


if __name__ == "__main__":
    main()
