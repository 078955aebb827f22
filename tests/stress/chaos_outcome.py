"""The outcome of `chaos`: its kills, and everything that was lost, doubled or wrong.

Lost: a model that was not registered and localized, or an act or version that MLflow lacks.
Doubled: anything that exists twice. Wrong: bytes that differ from a run without kills.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from restitch.merging.errors import Damage
from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger

# The folder of each task's model, and the file of the task.
Models = Mapping[str, tuple[Path, Path]]


@dataclass
class Kill:
    """One kill -9.

    Attributes:
        process: the kind of process.
        phase: the flow or the command that it was running, and the moment.
        round: the number of the round.
        at: the time on the clock of this process.
        recovered: seconds until the champion held all registered models, for the last kill of a
            round; None for the others.
    """

    process: str
    phase: str
    round: int
    at: float
    recovered: float | None = None


@dataclass
class Outcome:
    """The findings at the end; `lost`, `doubled` and `wrong` must be empty."""

    kills: list[Kill] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    models: int = 0
    versions: int = 0
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """True if nothing was lost, doubled or wrong."""
        return not (self.lost or self.doubled or self.wrong)


def examine(
    outcome: Outcome, ledger: Ledger, folder: Path, registered: Sequence[str], models: Models
) -> None:
    """Compare a line with one in which nothing was killed.

    Args:
        outcome: receives the findings.
        ledger: the line.
        folder: the folder of the run with the line's file; another home is made in it.
        registered: the tasks in the order of registration.
        models: the models by task.
    """
    _look_for_doubles(outcome, ledger, registered)
    _look_in_mlflow(outcome, ledger, registered)
    champion = ledger.state().champion
    assert champion is not None
    if ledger.merged(champion).patch != _undisturbed(ledger.line, folder, registered, models):
        outcome.wrong.append(f"champion {champion}")
    for name in ledger.objects.store.list("blobs"):
        try:
            ledger.objects.read_blob(name.rpartition("/")[2])
        except Damage as error:
            outcome.wrong.append(f"{name}: {error}")


def _look_for_doubles(outcome: Outcome, ledger: Ledger, registered: Sequence[str]) -> None:
    entries = list(ledger.entries(newest_first=False))
    for kind in ("registered", "localized"):
        counts = Counter(e.reason.split()[0] for e in entries if e.kind == kind)
        for task in registered:
            if counts[task] != 1:
                where = outcome.doubled if counts[task] > 1 else outcome.lost
                where.append(f"{task} was {kind} {counts[task]} times")
    recipes = Counter((record.recipe_digest, tuple(record.members)) for record in ledger.history())
    outcome.doubled += [f"recipe {r[:12]}" for (r, _), n in recipes.items() if n > 1]


def _look_in_mlflow(outcome: Outcome, ledger: Ledger, registered: Sequence[str]) -> None:
    """Check that MLflow shows every act, model and version once."""
    from restitch.registry.mlflow.connection import connect

    line = ledger.line
    client = connect(Home.from_environment())
    line_state = ledger.state()
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    acts = list(ledger.entries())
    expected = {line: len(line_state.versions), f"{line}.audit": len(acts)}
    expected[f"{line}.models"] = len(registered)
    for name, count in expected.items():
        runs = client.search_runs([experiments[name]], max_results=5000)
        unfinished = [run for run in runs if run.info.status != "FINISHED"]
        if len(runs) != count or unfinished:
            where = outcome.doubled if len(runs) > count else outcome.lost
            where.append(
                f"MLflow {name}: {len(runs)} runs of {count}, {len(unfinished)} unfinished"
            )
    versions = client.search_model_versions(f"name = '{line}'", max_results=5000)
    if len(versions) != len(line_state.versions):
        outcome.doubled.append(f"MLflow has {len(versions)} versions of {line}")


def _undisturbed(line: str, folder: Path, registered: Sequence[str], models: Models) -> str:
    """The patch of a home with the same models, in which nothing was killed."""
    script = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from restitch.registry.mlflow.sync import MlflowProjection\n"
        "MlflowProjection.repair = lambda *_, **__: 0\n"
        "from restitch.flows.lines.init_line import init_line\n"
        "from restitch.flows.register import register\n"
        "from restitch.flows.remerge import remerge\n"
        "import restitch.flows.remerge\n"
        "restitch.flows.remerge.adopt = lambda _: ()\n"
        "init_line(Path(sys.argv[1]))\n"
        "for model, file in json.loads(sys.argv[2]):\n"
        f"    register('{line}', Path(file), model, merge=False)\n"
        f"print(remerge('{line}').record.patch)\n"
    )
    files = [list(map(str, models[task])) for task in registered]
    home = folder / "undisturbed"
    # Without the engine that steps of this process have used.
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "line.yaml"), json.dumps(files)],
        env={**environment, "RESTITCH_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(home)
    return done.stdout.split()[-1]


def show(outcome: Outcome, out: Console) -> None:
    """Print the table of kills, and everything that was lost, doubled or wrong."""
    table = Table(box=None, pad_edge=False)
    for column in ("process", "phase", "kills"):
        table.add_column(column, justify="right" if column == "kills" else "left")
    counts = Counter((kill.process, kill.phase) for kill in outcome.kills)
    for (process, phase), count in sorted(counts.items()):
        table.add_row(process, phase, str(count))
    out.print(table)
    within = sum(k.phase.startswith(("onboard", "remerge")) for k in outcome.kills)
    recovered = [k.recovered for k in outcome.kills if k.recovered is not None]
    out.print(
        f"{len(outcome.kills)} kills, {within} inside onboard or remerge"
        f" ({within / max(len(outcome.kills), 1):.0%}); {outcome.models} models,"
        f" {outcome.versions} merged versions, {outcome.seconds:.0f} s"
    )
    out.print(
        f"lost {len(outcome.lost)}, doubled {len(outcome.doubled)}, wrong {len(outcome.wrong)};"
        f" longest time to recover {max(recovered, default=0):.0f} s"
    )
    for text in (*outcome.lost, *outcome.doubled, *outcome.wrong):
        out.print(f"  {text}")
