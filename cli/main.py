"""The `restitch` command: parse, call one function, print, and exit with the code of its kind.

Exit codes: 0 done, 2 usage, 3 bad file or spec, 4 quarantined, 5 gate failed or held, 6 store
or server away, 7 damage found, 130 interrupted. With `--json` standard output is one JSON
document and nothing else. Heavy libraries are imported by the functions that need them, so
`status`, `history` and `show` answer at once.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import restitch.cli.commands.audit  # whose commands belong to the same command
import restitch.cli.commands.experts
import restitch.cli.commands.research  # likewise, as do the next
import restitch.cli.commands.storage
import restitch.cli.commands.study
import restitch.cli.commands.upkeep  # noqa: F401
from restitch.cli.app import Json, Line, Version, app, show_result
from restitch.cli.render import lines as render
from restitch.cli.reporter import TerminalReporter
from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.tasks.runtime.console import reporting_to, say

INTERRUPTED = 130


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="YAML file of the line.")], as_json: Json = False
) -> None:
    """Make a line, or update it, from a YAML file."""
    from restitch.deployments.server.deploy import keep_schedules
    from restitch.flows.lines.init_line import init_line

    outcome = init_line(file)
    keep_schedules()
    show_result(outcome.as_dict(), as_json, render.init)


@app.command()
def register(
    line: Line,
    task: Annotated[Path, typer.Option("--task", help="YAML file of the task.")],
    model: Annotated[
        str, typer.Option("--model", help="Folder, s3://bucket/folder, hub id or MLflow URI.")
    ],
    remerge: Annotated[bool, typer.Option(help="Merge it now, too.")] = True,
    replace_task: Annotated[
        bool, typer.Option("--replace-task", help="Accept another task file for this name.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Keep a copy of the model's files in the store.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="With workers, return when it is merged or cannot be.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait at most; exit code 6 after them.")
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Do the work in this process though there are workers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Register a finetuned model.

    Where workers are set up they take over and this returns at once, or with --wait when the
    model is in the champion or cannot be. Without workers the work is done here.
    """
    from restitch.flows.register import register as run

    outcome = run(
        line,
        task,
        model,
        merge=remerge,
        replace_task=replace_task,
        copy=copy,
        here=here,
        wait=wait,
        timeout=timeout,
    )
    show_result(outcome.as_dict(), as_json, render.registered)
    raise typer.Exit(outcome.exit_code)


@app.command()
def task(
    line: Line,
    file: Annotated[Path, typer.Option("--task", help="YAML file of the task.")],
    replace_task: Annotated[
        bool, typer.Option("--replace-task", help="Accept another task file for this name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Declare a task without a model, for models that are registered in MLflow alone."""
    from restitch.flows.lines.declare_task import declare_task

    outcome = declare_task(line, file, replace_task=replace_task)
    show_result(outcome.as_dict(), as_json, render.declared)


@app.command()
def remerge(
    line: Line,
    force: Annotated[
        bool, typer.Option(help="Stitch and evaluate anew although nothing changed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the merged model up to date; does nothing when nothing changed."""
    from restitch.flows.remerge import remerge as run

    outcome = run(line, force)
    show_result(outcome.as_dict(), as_json, render.remerged)
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(
    line: Annotated[str | None, typer.Argument(help="Name of the line; all without.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show members, their states, champion and candidate."""
    from restitch.cli.views import status as view

    if watch:
        from restitch.cli.commands.watch import follow

        follow(lambda: view(line), as_json)
    else:
        show_result(view(line), as_json, render.status)


@app.command()
def up(
    workers: Annotated[
        int | None, typer.Option(min=0, help="How many workers; as before, at first one.")
    ] = None,
    pool: Annotated[str, typer.Option(help="The work pool that they serve.")] = "gpu",
    as_json: Json = False,
) -> None:
    """Start servers, workers and all that connects them on this machine; mend what died."""
    from restitch.deployments.local.stack import up as run

    home = Home.from_environment()
    outcome = run(home, workers, pool, say)
    show_result(outcome.as_dict(), as_json, render.up)


@app.command()
def down(as_json: Json = False) -> None:
    """Stop what `up` started; the state stays."""
    from restitch.deployments.local.stack import down as run

    show_result({"stopped": list(run(Home.from_environment()))}, as_json, render.down)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, servers, workers, triggers, store and device, and say how to mend each."""
    from restitch.deployments.local.doctor import examine, exit_code

    checks = examine()
    show_result({"checks": [check.as_dict() for check in checks]}, as_json, render.doctor)
    raise typer.Exit(exit_code(checks))


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="The work pool for onboarding.")] = "gpu",
    remerge_pool: Annotated[
        str | None, typer.Option(help="The work pool for remerging; the same by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make pools, deployments, triggers and schedules on the Prefect server of a team."""
    from restitch.deployments.server.deploy import deploy as run

    show_result(run(pool, remerge_pool).as_dict(), as_json, render.deployed)


@app.command()
def export(
    line: Line,
    version: Version,
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file, as 5GB or 500MB; default: like the base.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Write the specialist for this task; see `experts`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a merged version, or its specialist for one task, as a Hugging Face folder."""
    from restitch.flows.export import export_version

    outcome = export_version(
        line, version, out, overwrite=overwrite, shard_size=shard_size, task=task
    )
    show_result(outcome.as_dict(), as_json, render.exported)


@app.command()
def evaluate(line: Line, version: Version = "champion", as_json: Json = False) -> None:
    """Evaluate a merged version on every task and on the general benchmark."""
    from restitch.flows.evaluate import evaluate_version

    show_result(evaluate_version(line, version).as_dict(), as_json, render.evaluated)


@app.command()
def webhook(
    host: Annotated[
        str, typer.Option(help="Where to listen; by default this machine alone can reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 4280,
    register_as: Annotated[
        str | None,
        typer.Option(
            "--register",
            metavar="URL",
            help="Receive nothing; tell MLflow to send to a receiver at this address.",
        ),
    ] = None,
) -> None:
    """Receive MLflow's webhooks and hand new models to Prefect as events.

    Listens on loopback unless told otherwise. The secret that it shares with MLflow is read
    from RESTITCH_WEBHOOK_SECRET. `POST /webhook` takes deliveries, `GET /health` answers.
    """
    from restitch.deployments.webhook import SECRET_VARIABLE, register_webhook, serve
    from restitch.tasks.runtime.engine import engine_url

    secret = os.environ.get(SECRET_VARIABLE, "")
    if register_as is not None:
        done = register_webhook(Home.from_environment().mlflow_uri, register_as, secret)
        typer.echo(f"webhook of MLflow to {register_as}: {done}")
        return
    prefect = engine_url()
    if prefect is None:
        raise Unavailable(
            "there is no Prefect server to hand events to",
            hint="set PREFECT_API_URL, or start one with `restitch up`",
        )
    serve(
        host,
        port,
        secret=secret,
        prefect_api_url=prefect,
        started=lambda address: typer.echo(f"receiving at {address}"),
    )


def _quieten() -> None:
    """Keep MLflow from printing tracebacks of what is told in one message here."""
    logging.getLogger("mlflow.store.db.utils").addFilter(lambda _: False)


def _fail(error: RestitchError) -> int:
    Console(stderr=True, highlight=False).print(
        f"error: {error}", style="red", markup=False, soft_wrap=True
    )
    return error.exit_code


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raise an interrupt again that Python has dropped because it came within a `__del__`."""
    usual = sys.unraisablehook
    # Not raised at once: within the hook it would be dropped a second time.
    again: list[threading.Timer] = []

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            usual(dropped)
            return
        main_thread = threading.main_thread().ident or 0
        # To that very thread, so that it ends what it waits for.
        again.append(threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)))
        again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for timer in again:
            timer.cancel()


def _interrupted() -> NoReturn:
    Console(stderr=True).print("interrupted: run the same command again to go on")
    sys.exit(INTERRUPTED)


def main() -> None:
    """Run the command; a user's mistake is one message and an exit code, never a traceback."""
    try:
        home = Home.from_environment()
        # Steps, engines and child processes find the same place whatever their directory is.
        os.environ["RESTITCH_HOME"] = str(home.root)
        prepare_environment(home)
        _quieten()
        with _interrupts_kept(), reporting_to(TerminalReporter(quiet="--json" in sys.argv)):
            app(standalone_mode=True)
    except SystemExit as end:  # typer turns Ctrl-C into this code without a word
        if end.code == INTERRUPTED:
            _interrupted()
        raise
    except RestitchError as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        _interrupted()
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(
            _fail(
                Unavailable(
                    f"{error.strerror or error}{place}",
                    hint="check permissions and free space, then run the same command again",
                )
            )
        )


if __name__ == "__main__":
    main()
