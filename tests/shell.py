"""Run the command as a user does: in this process, which is fast, or in a process of its own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from restitch.registry.home import Home
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry
from restitch.registry.store.base import NotInStore, Store
from restitch.registry.store.objects import ObjectStore
from tests.worlds import World

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that `--json` printed."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """The command with a home.

    Attributes:
        home: the value of `RESTITCH_HOME`.
        environment: more environment variables.
    """

    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: object, code: int | None = 0) -> Done:
        """Run a command in this process and compare its exit code; None takes any."""
        from restitch.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with (
            patch.dict(os.environ, self._variables()),
            patch.object(sys, "argv", ["restitch", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            exit_code = _exit_code(main)
        return _checked(Done(exit_code, out.getvalue(), err.getvalue()), args, code)

    def json(self, *args: object, code: int | None = 0) -> Any:
        """Run a command with `--json` and read what it prints."""
        return self(*args, "--json", code=code).json

    def add(self, world: World, task: str, *options: object, model: str = "", code: int = 0) -> Any:
        """Register a model of the world, by default the one with the task's name."""
        files = ("--task", world.task(task), "--model", world.model(model or task))
        return self.json("register", "demo", *files, *options, code=code)

    def start(
        self, *args: object, environment: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command in a process of its own, in the environment of the tests or another."""
        surrounding = os.environ if environment is None else environment
        return subprocess.Popen(
            [sys.executable, "-m", "restitch.cli.main", *map(str, args)],
            env={**surrounding, "PYTHONPATH": str(ROOT), **self._variables()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests in the background ignore Ctrl-C, and child processes inherit that.
            preexec_fn=_accept_ctrl_c,
            **options,
        )

    def process(self, *args: object, code: int | None = 0, **options: Any) -> Done:
        """Run a command in a process of its own and compare its exit code."""
        with self.start(*args, **options) as process:
            out, err = process.communicate(timeout=240)
        return _checked(Done(process.returncode, out, err), args, code)

    def python(
        self,
        script: str,
        *args: object,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Done:
        """Run a script in a process of its own, with the home in its environment."""
        surrounding = os.environ if environment is None else environment
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            env={**surrounding, "PYTHONPATH": str(ROOT), **self._variables()},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Set the environment of this home, for direct calls of flows and tasks."""
        with patch.dict(os.environ, self._variables()):
            yield

    def ledger(self, line: str = "demo") -> Ledger:
        """The ledger of a line."""
        return Ledger(ObjectStore(self._store()), line)

    def state(self, line: str = "demo") -> LineState:
        """The state of a line."""
        return self.ledger(line).state()

    def head_bytes(self, line: str = "demo") -> bytes | None:
        """The bytes of the line's state in the store; None without a line."""
        try:
            return self._store().read(f"lines/{line}/head.json")
        except NotInStore:
            return None

    def check_settled(self) -> None:
        """Check that another remerge changes nothing in the line `demo`."""
        before = self.head_bytes()
        self.json("remerge", "demo", code=None)
        assert self.head_bytes() == before

    def acts(self, line: str = "demo") -> list[Entry]:
        """All acts, oldest first."""
        return list(self.ledger(line).entries(newest_first=False))

    def kinds(self, line: str = "demo") -> list[str]:
        """The kinds of all acts, oldest first."""
        return [entry.kind for entry in self.acts(line)]

    def patch_bytes(self, version: int | None = None, line: str = "demo") -> bytes:
        """The patch of a merged version, by default the champion's."""
        ledger = self.ledger(line)
        version = version if version is not None else ledger.state().champion
        assert version is not None, "there is no champion"
        return ledger.objects.read_blob(ledger.merged(version).patch)

    def _store(self) -> Store:
        return Home.from_environment(self._variables()).open_store()

    def _variables(self) -> dict[str, str]:
        return {"RESTITCH_HOME": str(self.home), **self.environment}


def _exit_code(main: Any) -> int:
    try:
        main()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    return 0


def _accept_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _checked(done: Done, args: tuple[object, ...], code: int | None) -> Done:
    output = f"restitch {' '.join(map(str, args))}\n{done.out}\n{done.err}"
    assert code is None or done.code == code, f"exit code {done.code}, not {code}: {output}"
    assert "Traceback" not in done.err, output
    return done
