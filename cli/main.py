"""The `restitch` command: parse, call one function, print, and exit with the code of its kind.

Exit codes: 0 done, 2 usage, 3 bad file or spec, 4 quarantined, 5 gate failed or held, 6 store
or server away, 7 damage found, 130 interrupted. With `--json` standard output is one JSON
document and nothing else. Functions import the heavy libraries that they need, after the
arguments were checked: help, mistakes, `status`, `history` and `show` never wait for torch.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from restitch import __version__
from restitch.cli.app import app
from restitch.cli.commands import audit, lines, models, operations, removal, research, storage
from restitch.cli.reporter import TerminalReporter
from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.home import Home, prepare_environment
from restitch.tasks.runtime.console import reporting_to

if TYPE_CHECKING:
    from typer._click import Command

INTERRUPTED = 130
_OBJECTS_PER_COLLECTION = 10_000

# `restitch --help` shows the panels and commands in this order.
PANELS = {
    "Get started": (lines.init, models.register, lines.status, models.merge),
    "Every day": (
        *(lines.task, lines.remerge, audit.show, audit.history),
        *(models.evaluate, models.export, models.follow, models.retire, models.restore),
        *(removal.forget, removal.drop),
    ),
    "Audit": (
        *(audit.diff, audit.why, audit.report, audit.verify),
        *(audit.rollback, audit.promote, audit.pin, audit.unpin),
    ),
    "Compare and study": (research.compare, research.experts, research.analyze),
    "Operate": (
        *(operations.up, operations.down, operations.doctor),
        *(audit.pause, audit.resume),
        *(operations.deploy, operations.assist, operations.webhook, storage.gc, lines.schema),
    ),
}
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(research.study, rich_help_panel="Compare and study")
app.add_typer(storage.store, rich_help_panel="Operate")

FIRST_STEPS = """\
restitch keeps one merged model of many finetuned models. The first three steps:

  restitch init line.yaml                                     make a line on a base model
  restitch register LINE --task task.yaml --model FOLDER      add a finetuned model
  restitch status                                             see what was merged

All commands: restitch --help"""


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"restitch {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    log: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(
            envvar="RESTITCH_LOG",
            metavar="LEVEL",
            help="Show Prefect's log lines: debug, info, warning or error.",
        ),
    ] = None,
) -> None:
    """One merged model, kept current."""
    # Only the terminal: the pages of Prefect show all lines in any case.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = (log or "critical").upper()
    if log == "debug":
        os.environ["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    if context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS)


def _fail(error: RestitchError) -> NoReturn:
    console = Console(stderr=True, highlight=False)
    console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    sys.exit(error.exit_code)


# Set when the user interrupted: a library may turn the interrupt into an error of its own.
_interrupted = threading.Event()
_SEEN_WITHIN = 0.3  # seconds until an interrupt that nobody handles counts as dropped


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Remember an interrupt of this block, and send it again as long as it is dropped.

    Python drops what is raised within a `__del__`, and pydantic what is raised while it serializes.
    Does nothing where somebody else handles or ignores interrupts.
    """
    _interrupted.clear()
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = sys.unraisablehook
    timers: list[threading.Timer] = []

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            usual(dropped)

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        timers.append(threading.Timer(_SEEN_WITHIN, _interrupt_again))
        timers[-1].daemon = True
        timers[-1].start()
        signal.default_int_handler(number, frame)

    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = usual
        for timer in timers:
            timer.cancel()


def _interrupt_again() -> None:
    """Interrupt the main thread, unless it handles an interrupt or an error that followed it."""
    main_thread = threading.main_thread().ident or 0
    found: Any = sys._current_exceptions().get(main_thread)
    # Before Python 3.12 it comes with its type and its traceback.
    error: BaseException | None = found[1] if isinstance(found, tuple) else found
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        signal.pthread_kill(main_thread, signal.SIGINT)


@cache
def command() -> "Command":
    """The whole command line, which takes a while to build from its functions."""
    return typer.main.get_command(app)


def _collect_garbage_rarely() -> None:
    """Spare the objects of imported libraries, which stay, from being searched for garbage."""
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    atexit.register(gc.freeze)  # the end of the process frees them all


def main() -> None:
    """Run the command; a user's mistake is one message and an exit code, never a traceback."""
    _collect_garbage_rarely()
    try:
        home = Home.from_environment()
        # Steps, engines and child processes need the same home in any working directory.
        os.environ["RESTITCH_HOME"] = str(home.root)
        prepare_environment(home)
        # Without MLflow's tracebacks of database errors, which end here in one message.
        logging.getLogger("mlflow.store.db.utils").addFilter(lambda _: False)
        reporter = TerminalReporter(quiet="--json" in sys.argv)
        with _interrupts_kept(), reporting_to(reporter):
            command()(prog_name="restitch")
    except (SystemExit, KeyboardInterrupt) as end:
        # Typer turns Ctrl-C into this code without a message.
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        _end_interrupted()
    except Exception as error:
        if _interrupted.is_set():
            _end_interrupted()
        _explain(error)


def _end_interrupted() -> NoReturn:
    Console(stderr=True).print("interrupted: run the same command again to continue")
    sys.exit(INTERRUPTED)


def _explain(error: Exception) -> NoReturn:
    """End with the message and the code of an error; one that nobody explained stays as it is."""
    if isinstance(error, RestitchError):
        _fail(error)
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        hint = "check permissions and free space, then run the same command again"
        _fail(Unavailable(f"{error.strerror or error}{place}", hint=hint))
    raise error


if __name__ == "__main__":
    main()
