"""A line with a history, and an audit of it: every answer is compared with what was done.

    python -m playground.audited [--state .demo/audited] [--world DIR]

Models join, one replaces another, one fails a gate and is promoted by hand, a version is rolled
back, models are retired and restored, and a broken one is quarantined. Then all audit commands
run, and each answer is compared with what this script did and when. The home remains, so you can
look at it with `restitch` and MLflow.
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import restitch.cli.main  # noqa: F401  the commands
from playground.make import World, make_world
from restitch.cli.app import app
from restitch.merging.errors import RestitchError
from restitch.registry.home import Home, prepare_environment

LINE = "audited"
GATES = {"min_retention": 0.9, "max_task_drop": 0.2, "warn": ["max_task_drop"]}


@dataclass(frozen=True)
class Step:
    """One step of the history, and the expected state after it.

    Attributes:
        done: the step in words.
        kinds: the acts that it adds to the trail, in order.
        champion: the version in use after it.
        members: the members of the champion.
        at: the time of its end.
    """

    done: str
    kinds: tuple[str, ...]
    champion: int | None
    members: dict[str, int]
    at: datetime


@dataclass
class Check:
    """One answer and the expected one."""

    question: str
    answer: Any
    expected: Any

    @property
    def right(self) -> bool:
        """True if they are equal."""
        return bool(self.answer == self.expected)


@dataclass
class Life:
    """The steps of the line's history, as this script records them."""

    world: World
    folder: Path
    steps: list[Step] = field(default_factory=list)

    def do(
        self,
        done: str,
        *words: object,
        kinds: tuple[str, ...],
        champion: int | None,
        members: dict[str, int],
        code: int = 0,
    ) -> None:
        """Run a command and record its expected effect."""
        actual, _ = command(*words)
        if actual != code:
            raise SystemExit(f"{done}: exit code {actual}, expected {code}")
        self.steps.append(Step(done, kinds, champion, members, datetime.now(UTC)))
        time.sleep(0.002)  # so that no act has the same time as the previous step

    def register(self, task: str, model: Path) -> tuple[object, ...]:
        """The arguments that register a model for one of the world's tasks or a copy of one."""
        return ("register", LINE, "--task", self.folder / f"{task}.yaml", "--model", model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the history, audit it and compare; exit code 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(prog="python -m playground.audited")
    parser.add_argument("--state", type=Path, default=Path(".demo/audited"))
    parser.add_argument("--world", type=Path, help="folder of the world; created if missing")
    options = parser.parse_args(arguments)
    state = options.state.absolute()
    world = make_world(options.world or state.parent / "world", "demo")
    checks = run(world, state)
    out = Console(width=130, highlight=False)
    table = Table("question", "answer", "", box=None)
    for check in checks:
        mark = "as expected" if check.right else f"WRONG: {_short(check.expected)}"
        table.add_row(check.question, _short(check.answer), mark)
    out.print(table)
    out.print(f"{sum(c.right for c in checks)} of {len(checks)} answers as expected")
    out.print(f"look around with: RESTITCH_HOME={state / 'home'} restitch history {LINE}")
    sys.exit(0 if all(check.right for check in checks) else 1)


def run(world: World, state: Path) -> list[Check]:
    """Make the history in a fresh home below `state`, and audit it."""
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    os.environ["RESTITCH_HOME"] = str(state / "home")
    prepare_environment(Home.from_environment())
    life = live(world, state)
    return [*ask_trail(life), *ask_versions(life), *ask_proofs(life, state)]


def live(world: World, folder: Path) -> Life:
    """Run all steps of the history."""
    life = Life(world, folder)
    first, second, third = _files(world, folder)
    joined = ("registered", "localized", "merged", "promoted")
    start = ("init", folder / "line.yaml")
    life.do("make the line", *start, kinds=("configured",), champion=None, members={})
    one = {first: 1}
    two = {**one, second: 1}
    three = {**two, third: 1}
    newer = {**three, first: 2}
    for number, (task, members) in enumerate(((first, one), (second, two), (third, three)), 1):
        life.do(
            f"{task} joins",
            *life.register(task, world.model(task)),
            kinds=joined,
            champion=number,
            members=members,
        )
    life.do(
        f"a newer model of {first}",
        *life.register(first, folder / "newer"),
        kinds=joined,
        champion=4,
        members=newer,
    )
    life.do(
        "a model that wrecks the rest fails the gate",
        *life.register("wreck", folder / "wreck"),
        # It is no better than the base either; here the gate must decide.
        *("--accept-no-gain", "--reason", "to see the gate fail"),
        kinds=("registered", "localized", "merged", "rejected", "held"),
        champion=4,
        members=newer,
        code=5,
    )
    life.do(
        "it is promoted past the gate by hand",
        *("promote", LINE, 5, "--reason", "a customer insists"),
        kinds=("promoted",),
        champion=5,
        members={**newer, "wreck": 1},
    )
    life.do(
        "which is rolled back",
        *("rollback", LINE, 4, "--reason", "it forgot the rest"),
        kinds=("rolled-back",),
        champion=4,
        members=newer,
    )
    life.do(
        "the wreck is retired",
        *("retire", LINE, "wreck", "--reason", "it wrecks the rest"),
        kinds=("retired",),
        champion=4,
        members=newer,
    )
    life.do(
        "promotion is automatic again",
        *("unpin", LINE, "--reason", "the wreck is gone"),
        kinds=("unpinned",),
        champion=4,
        members=newer,
    )
    rest = {task: version for task, version in newer.items() if task != second}
    life.do(
        f"{second} is retired",
        *("retire", LINE, second, "--reason", "its data was withdrawn"),
        kinds=("retired", "merged", "promoted"),
        champion=6,
        members=rest,
    )
    life.do(
        f"{second} is restored",
        *("restore", LINE, second, "--reason", "its data may be used"),
        kinds=("restored", "merged", "promoted"),
        champion=7,
        members=newer,
    )
    life.do(
        "a broken model is quarantined",
        *life.register("broken", folder / "broken"),
        kinds=("registered", "quarantined"),
        champion=7,
        members=newer,
        code=4,
    )
    life.do(
        "the line is pinned",
        *("pin", LINE, "--reason", "a release"),
        kinds=("pinned",),
        champion=7,
        members=newer,
    )
    return life


def ask_trail(life: Life) -> list[Check]:
    """Compare `history` and `--as-of` with the steps."""
    kinds = [kind for step in life.steps for kind in step.kinds]
    acts = answer("history", LINE)["acts"]
    checks = [
        Check("history: the acts, oldest first", [a["kind"] for a in acts][::-1], kinds),
        Check(
            "history --event retired: the reasons",
            [a["reason"] for a in answer("history", LINE, "--event", "retired")["acts"]][::-1],
            ["wreck: it wrecks the rest", f"{_second(life)}: its data was withdrawn"],
        ),
        Check(
            "history --task wreck",
            [a["kind"] for a in answer("history", LINE, "--task", "wreck")["acts"]][::-1],
            ["registered", "localized", "held", "promoted", "retired"],
        ),
        Check(
            "history --since --until: the rollback alone",
            [a["kind"] for a in _between(life, "which is rolled back")],
            ["rolled-back"],
        ),
    ]
    for step in life.steps:
        found = answer("history", LINE, "--as-of", step.at.isoformat())["champion"]
        members = {t: m["version"] for t, m in found["members"].items()} if found else {}
        checks.append(
            Check(
                f"history --as-of, after: {step.done}",
                (None if found is None else found["version"], members),
                (step.champion, step.members),
            )
        )
    used = answer("history", LINE, "--as-of", _at(life, "which is rolled back"))["champion"]
    checks.append(
        Check(
            "... who put it there, and why",
            (used["act"], used["why"]),
            ("rolled-back", "version 4 in place of 5, pinned: it forgot the rest"),
        )
    )
    return checks


def ask_versions(life: Life) -> list[Check]:
    """Compare `show`, `diff` and `why` with the steps."""
    first, second, third = life.world.tasks[:3]
    versions = answer("history", LINE, "--versions")["versions"]
    failed = answer("show", LINE, 5)
    newer = answer("diff", LINE, 3, 4)
    steps = answer("why", LINE, first)["versions"]
    blocked = [g["gate"] for g in failed["gates"] if not g["passed"] and g["action"] == "block"]
    kept = failed["retention"]
    return [
        Check(
            "history --versions: members of each",
            [set(v["members"]) for v in versions][::-1],
            [
                {first},
                {first, second},
                *[{first, second, third}] * 2,
                {first, second, third, "wreck"},
                {first, third},
                {first, second, third},
            ],
        ),
        Check("show 5: the gate that failed", blocked, ["min_retention"]),
        Check(
            "show 5: retention is outside of the gate's limit",
            kept["ratio"] < GATES["min_retention"],
            True,
        ),
        Check("diff 3 4: replaced", newer["members"]["replaced"], {first: [1, 2]}),
        Check("diff 4 7: no weight differs", answer("diff", LINE, 4, 7)["weights"]["differ"], 0),
        Check("diff 4 6: left", answer("diff", LINE, 4, 6)["members"]["left"], {second: 1}),
        Check(
            f"why {first}: the model in each version",
            [step["model"] for step in steps],
            [1, 1, 1, 2, 2, 2, 2],
        ),
        Check(
            "why wreck: the versions that held it",
            [s["version"] for s in answer("why", LINE, "wreck")["versions"] if s["model"]],
            [5],
        ),
        Check(
            "7 has the same bytes as 4, which never contained the wreck",
            answer("show", LINE, 7)["patch"] == answer("show", LINE, 4)["patch"],
            True,
        ),
    ]


def ask_proofs(life: Life, folder: Path) -> list[Check]:
    """Check `verify`, and compare the report with `show`."""
    whole = answer("verify", LINE)
    code, text = command("verify", LINE, "--without", "wreck", "--json")
    claim = json.loads(text)["claim"]
    command("report", LINE, 7, folder / "report")
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    shown = answer("show", LINE, 7)
    everything = list(range(1, 8))
    return [
        Check("verify: intact", whole["intact"], True),
        Check("verify: versions rebuilt", whole["rebuilt"], everything),
        Check("verify --without wreck: in, exit code", (claim["present_in"], code), ([5], 5)),
        Check(
            "verify --without wreck: proved absent",
            claim["absent_from"],
            [n for n in everything if n != 5],
        ),
        Check(
            "report 7: every merged accuracy of show is on it",
            all(f'data-value="{r["merged"]!r}"' in page for r in shown["results"].values()),
            True,
        ),
    ]


def answer(*words: object) -> Any:
    """The JSON output of a command."""
    code, text = command(*words, "--json")
    if code:
        raise SystemExit(f"restitch {' '.join(map(str, words))}: exit code {code}")
    return json.loads(text)


def command(*words: object) -> tuple[int, str]:
    """Exit code and output of a command, run in this process."""
    out = io.StringIO()
    run: Callable[..., Any] = app
    try:
        with redirect_stdout(out):
            run(["--help"] if not words else list(map(str, words)), standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0), out.getvalue()
    except RestitchError as error:
        print(error, file=sys.stderr)
        return error.exit_code, out.getvalue()
    return 0, out.getvalue()


def _files(world: World, folder: Path) -> tuple[str, str, str]:
    """Write the line's file, the tasks' files and the models that the world does not have."""
    line = yaml.safe_load(world.line.read_text(encoding="utf-8"))
    values = {**line, "line": LINE, "base": str(world.base), "gates": GATES}
    values["retention"] = str(world.root / "general.yaml")
    (folder / "line.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    first, second, third = world.tasks[:3]
    copies = {"wreck": first, "broken": first}
    for task in (first, second, third, *copies):
        found = world.root / "tasks" / f"{copies.get(task, task)}.yaml"
        spec = yaml.safe_load(found.read_text(encoding="utf-8"))
        spec["task"] = task
        spec["data"]["path"] = str((found.parent / spec["data"]["path"]).resolve())
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    _model(world, first, folder / "newer", lambda base, tuned: base + 0.9 * (tuned - base))
    generator = torch.Generator().manual_seed(0)
    _model(
        world,
        first,
        folder / "wreck",
        lambda base, tuned: (
            base + 3 * base.std(correction=0) * torch.randn(base.shape, generator=generator)
        ),
    )
    _model(world, first, folder / "broken", lambda base, tuned: tuned * float("nan"))
    return first, second, third


def _model(
    world: World,
    task: str,
    target: Path,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Write a copy of a finetuned model with changed weights."""
    shutil.copytree(world.model(task), target)
    base = load_file(world.base / "model.safetensors")
    tuned = load_file(target / "model.safetensors")
    weights = {
        name: change(base[name], value).to(value.dtype).contiguous()
        if value.is_floating_point() and not torch.equal(value, base[name])
        else value
        for name, value in tuned.items()
    }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _second(life: Life) -> str:
    return life.world.tasks[1]


def _at(life: Life, done: str) -> str:
    return next(step.at for step in life.steps if step.done == done).isoformat()


def _between(life: Life, done: str) -> Any:
    position = next(n for n, step in enumerate(life.steps) if step.done == done)
    span = (life.steps[position - 1].at.isoformat(), life.steps[position].at.isoformat())
    return answer("history", LINE, "--since", span[0], "--until", span[1])["acts"]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":
    main()
