"""Prefect's log lines in a terminal."""

import pytest

from tests.shell import Shell

SCRIPT = """
import sys
from restitch.cli.main import main
sys.argv = ["restitch", *sys.argv[1:], "status"]
try:
    main()
except SystemExit:
    pass
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
setup_logging()
get_logger("runs").warning("a line of Prefect")
"""


@pytest.mark.parametrize(
    ("options", "variable", "shown"),
    [
        ((), None, False),
        (("--log", "info"), None, True),
        (("--log", "error"), None, False),
        ((), "warning", True),
    ],
)
def test_log_lines_appear_only_on_request(
    shell: Shell, options: tuple[str, ...], variable: str | None, shown: bool
) -> None:
    variables = {} if variable is None else {"RESTITCH_LOG": variable}
    done = Shell(shell.home, variables).python(SCRIPT, *options)
    assert ("a line of Prefect" in done.err) is shown


def test_an_unknown_level_is_refused(shell: Shell) -> None:
    assert "critical" in shell("--log", "critical", "status", code=2).err
