"""The demo: workers merge several finetuned models into one, driven by events.

    make demo            (or: python -m playground.demo)
    make demo KEEP=1     leave the servers up and print their addresses

It makes the playground's world (cached for later runs), starts servers and workers, registers the
world's models, and shows every act of the audit trail as it happens, with a table of the merged
model's results after each promotion. The world, a home and the exported champion are in `.demo/`.
A run starts with an empty home, unless the stack of an earlier run is still up: then it makes a
new line on that stack.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from playground.make import World, make_world
from restitch.cli.render import audit as render_audit
from restitch.cli.render import lines as render
from restitch.cli.render import models as render_models
from restitch.cli.render import operations as render_operations
from restitch.cli.reporter import TerminalReporter
from restitch.deployments.local.stack import down, up
from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.stack import StackFile
from restitch.tasks.runtime.console import reporting_to, say, working

STATE = Path(".demo")
WORKERS = 2
PATIENCE_SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; a failure is one message and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m playground.demo")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the demo's files")
    parser.add_argument("--size", choices=("demo", "small"), default="demo")
    parser.add_argument("--keep", action="store_true", help="leave the stack up at the end")
    options = parser.parse_args(arguments)
    state = options.state.absolute()
    os.environ["RESTITCH_HOME"] = str(state / "home")
    prepare_environment(Home.from_environment())
    try:
        with reporting_to(TerminalReporter()):
            run(state, options.size, options.keep)
    except RestitchError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


def run(state: Path, size: str, keep: bool) -> None:
    """Run all steps, from the world to the exported champion."""
    out = Console(highlight=False)
    started = time.perf_counter()
    out.rule("1. a base and its finetuned models")
    with working("making the world, once") as progress:
        world = make_world(state / "world", size, progress=progress)
    out.print(f"{len(world.tasks)} tasks and a general benchmark in {world.root}", soft_wrap=True)
    out.rule("2. servers and workers")
    fresh_home(state)
    home = Home.from_environment()
    try:
        render_operations.up(up(home, WORKERS, say=say).as_dict(), out)
        line = start_line(world, state, out)
        register_all(world, line, out)
        finish(state, line, out)
    finally:
        if not keep:
            with working("stopping the stack"):
                down(home)
    out.print(f"this run took {time.perf_counter() - started:.0f} seconds")
    say_where_to_look(state, keep, out)


def fresh_home(state: Path) -> None:
    """Start with an empty home, unless a stack of an earlier run is up in it."""
    if StackFile.read(state / "home").prefect_api_url is None:
        shutil.rmtree(state / "home", ignore_errors=True)


def start_line(world: World, state: Path, out: Console) -> str:
    """Make a line from the world's file, with a new name."""
    from restitch.deployments.server.deploy import keep_schedules
    from restitch.flows.lines.init_line import init_line
    from restitch.registry.ledger.ledger import lines
    from restitch.tasks.runtime.workspace import workspace

    values = yaml.safe_load(world.line.read_text())
    del values["localize"]  # the demo shows the default of a line
    taken = sum(1 for _ in lines(workspace().objects))
    if taken:
        values["line"] = f"{values['line']}-{taken + 1}"
    for key in ("base", "retention"):
        values[key] = str(world.line.parent / values[key])
    file = state / "line.yaml"
    file.write_text(yaml.safe_dump(values))
    out.rule("3. a line")
    made = init_line(file)
    keep_schedules(made.line)
    render.init(made.as_dict(), out)
    return made.line


def register_all(world: World, line: str, out: Console) -> None:
    """Register the models, each of which is an event, and show the acts that follow."""
    from restitch.flows.register import register
    from restitch.tasks.runtime.workspace import workspace

    ledger = workspace().ledger(line)
    watch = Watch(ledger, out)
    out.rule("4. register the models; the workers take over")
    for task in world.tasks:
        register(line, world.task_file(task), str(world.model(task)))
        watch.look()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not watch.holds(world.tasks):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"the champion of {line} does not hold all models",
                expected=f"{', '.join(world.tasks)} within {PATIENCE_SECONDS:.0f} seconds",
                hint="run `restitch doctor` to see what is missing",
            )
        time.sleep(0.3)
        watch.look()


class Watch:
    """Shows each act of a line once, and the table of each champion."""

    def __init__(self, ledger: Ledger, out: Console) -> None:
        self.ledger = ledger
        self.out = out
        self.seen = 0

    def look(self) -> None:
        """Show the acts since the last call."""
        for entry in self.ledger.entries(newest_first=False):
            if entry.sequence <= self.seen:
                continue
            self.seen = entry.sequence
            time_of_day = entry.time[11:19]
            self.out.print(
                f"{time_of_day}  {entry.kind}: {entry.reason}", markup=False, soft_wrap=True
            )
            if entry.kind == "promoted":
                version = entry.after["/champion"]
                assert isinstance(version, int)
                render.results(self.ledger.merged(version).to_json(), self.out)

    def holds(self, tasks: Sequence[str]) -> bool:
        """True if the champion holds exactly the tasks."""
        champion = self.ledger.state().champion
        return champion is not None and set(self.ledger.merged(champion).members) == set(tasks)


def finish(state: Path, line: str, out: Console) -> None:
    """Show the line's history and export the champion."""
    from restitch.flows.audit.queries import versions
    from restitch.flows.export import export_version

    out.rule("5. the line")
    render_audit.versions(versions(line), out)
    exported = export_version(line, "champion", state / "champion", overwrite=True)
    render_models.exported(exported.as_dict(), out)


def say_where_to_look(state: Path, keep: bool, out: Console) -> None:
    """Print the addresses or commands to continue with."""
    binaries = Path(os.path.relpath(Path(sys.executable).parent))
    command = f"RESTITCH_HOME={os.path.relpath(state / 'home')} {binaries / 'restitch'}"
    if keep:
        stack = StackFile.read(state / "home")
        out.print("\nthe runs, their logs and artifacts, in Prefect:")
        out.print(f"  {str(stack.prefect_api_url).removesuffix('/api')}")
        out.print("the versions, their metrics and the audit trail, in MLflow:")
        out.print(f"  {stack.mlflow_uri}")
        out.print("continue by hand, and stop the stack at the end:")
        out.print(f"  {command} status\n  {command} down", soft_wrap=True)
        return
    database = f"sqlite:///{os.path.relpath(state / 'home' / 'mlflow.db')}"
    out.print("\nlook at the versions, their metrics and the audit trail in MLflow:")
    out.print(f"  {binaries / 'mlflow'} ui --backend-store-uri {database}", soft_wrap=True)
    out.print("continue by hand, or leave the servers up with `make demo KEEP=1`:")
    out.print(f"  {command} status", soft_wrap=True)


if __name__ == "__main__":
    main()
