"""The demo: some finetuned models become one, step by step.

    make demo        (or: python -m playground.demo)

It makes the playground's world (cached afterwards), registers its models one by one with the
functions behind the command line, and prints after each what the merged model can do. State
lies in `.demo/`: the world, a home with store and MLflow, and the exported champion. Every run
starts with an empty home, so that it tells the whole story.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cli import render
from cli.reporter import TerminalReporter
from merging.errors import RestitchError
from playground.make import World, make_world
from registry.home import Home, prepare_environment
from tasks.reporting import reporting_to, working

STATE = Path(".demo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; a failure is one message and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m playground.demo")
    parser.add_argument("--state", type=Path, default=STATE, help="where everything is kept")
    parser.add_argument("--size", choices=("demo", "small"), default="demo")
    options = parser.parse_args(arguments)
    state = options.state.absolute()
    os.environ["RESTITCH_HOME"] = str(state / "home")
    prepare_environment(Home.from_environment())
    try:
        with reporting_to(TerminalReporter()):
            run(state, options.size)
    except RestitchError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


def run(state: Path, size: str) -> None:
    """The story from the world to the exported champion."""
    out = Console(highlight=False)
    started = time.perf_counter()
    out.rule("1. a base and its finetuned models")
    with working("making the world, once") as progress:
        world = make_world(state / "world", size, progress=progress)
    out.print(f"{len(world.tasks)} tasks and a general benchmark in {world.root}", soft_wrap=True)
    shutil.rmtree(state / "home", ignore_errors=True)
    line = start_line(world, out)
    for number, task in enumerate(world.tasks, start=2):
        out.rule(f"{number}. register {task}")
        register_model(world, line, task, out)
    finish(state, line, out)
    out.print(f"this run took {time.perf_counter() - started:.0f} seconds")
    say_where_to_look(state, out)


def start_line(world: World, out: Console) -> str:
    """Make the line from the world's file."""
    from flows.line import init_line

    made = init_line(world.line)
    render.init(made.as_dict(), out)
    return made.line


def register_model(world: World, line: str, task: str, out: Console) -> None:
    """Register one model, and show what that localized and what the merged model can do now."""
    from flows.register import register
    from tasks.workspace import workspace

    ledger = workspace().ledger(line)
    before = sum(entry.kind == "localized" for entry in ledger.entries())
    outcome = register(line, world.task_file(task), str(world.model(task)))
    new = [entry.reason for entry in ledger.entries() if entry.kind == "localized"]
    render.registered(outcome.as_dict(), out)
    out.print(
        f"  localized in this registration: {len(new) - before} model ({new[0]});"
        f" {before} came from the store",
        soft_wrap=True,
    )


def finish(state: Path, line: str, out: Console) -> None:
    """Show the line's history and export the champion."""
    from cli.views import history
    from flows.export import export_version

    out.rule("the line")
    render.history(history(line), out)
    exported = export_version(line, "champion", state / "champion", overwrite=True)
    render.exported(exported.as_dict(), out)


def say_where_to_look(state: Path, out: Console) -> None:
    """The commands with which to go on."""
    python = Path(sys.executable)
    where = os.path.relpath(python.parent / "mlflow")
    database = os.path.relpath(state / "home" / "mlflow.db")
    out.print("\nlook at the versions, their metrics and the audit trail in MLflow:")
    out.print(f"  {where} ui --backend-store-uri sqlite:///{database}", soft_wrap=True)
    out.print("go on by hand:")
    command = os.path.relpath(python.parent / "restitch")
    out.print(f"  RESTITCH_HOME={os.path.relpath(state / 'home')} {command} status", soft_wrap=True)


if __name__ == "__main__":
    main()
