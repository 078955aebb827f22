"""`status`, `history` and `show` read the store alone: no heavy library, no server, at once."""

import json
import subprocess
import sys

import pytest

from tests.conftest import Three
from tests.shell import ROOT

HEAVY = ("mlflow", "torch", "transformers", "prefect", "datasets", "sqlalchemy", "numpy", "PIL")

PROBE = f"""
import json, sys, time
started = time.process_time()
from restitch.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code or 0
seconds = time.process_time() - started
loaded = sorted(set({HEAVY!r}) & set(sys.modules))
print(json.dumps([code, loaded, seconds]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "args", [("status",), ("history", "demo"), ("show", "demo", "--json"), ("status", "dmeo")]
)
def test_looking_imports_nothing_heavy(three: Three, args: tuple[str, ...]) -> None:
    with three.shell.inside():
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *args],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
    code, loaded, seconds = json.loads(done.stderr.splitlines()[-1])
    assert code == (3 if "dmeo" in args else 0)
    assert loaded == []
    assert seconds < 2.5


def test_looking_needs_no_mlflow(three: Three) -> None:
    shell = type(three.shell)(three.shell.home, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert shell.json("status", "demo")["lines"][0]["champion"] == 3


def test_help_names_all_commands(three: Three) -> None:
    told = three.shell("--help").out
    for command in ("init", "register", "remerge", "status", "history", "show", "export"):
        assert command in told
