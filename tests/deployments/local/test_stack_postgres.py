"""The tests of `test_stack` with Prefect and MLflow on a real PostgreSQL.

Only the first `up` gets the addresses; later commands remember them. The tests are slow: a whole
stack's work takes minutes. The services of compose.yaml run on PostgreSQL in every run of tests.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from restitch.registry.stack import Databases
from tests.deployments.conftest import Stack, running_stack
from tests.deployments.local.test_stack import *  # noqa: F403
from tests.servers import postgres_programs, postgres_server
from tests.worlds import World

pytestmark = [pytest.mark.servers, pytest.mark.slow]

PASSWORD = "password-of-the-databases"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, world: World) -> Iterator[Stack]:
    """The stack of the other tests, with other databases."""
    if not postgres_programs():  # CI installs it, and fails where this was left out
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    with postgres_server(PASSWORD) as address:
        for name in ("prefect", "mlflow"):
            _ask(f"postgresql://postgres:{PASSWORD}@{address}/postgres", f"CREATE DATABASE {name}")
        variables = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
                f"postgresql+asyncpg://postgres:{PASSWORD}@{address}/prefect"
            ),
            "MLFLOW_BACKEND_STORE_URI": f"postgresql://postgres:{PASSWORD}@{address}/mlflow",
        }
        with running_stack(tmp_path_factory.mktemp("stack"), world, **variables) as found:
            yield found


def _ask(address: str, question: str) -> list[Any]:
    engine = create_engine(address, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            answer = connection.execute(text(question))
            return list(answer) if answer.returns_rows else []
    finally:
        engine.dispose()


def test_both_servers_write_to_postgresql_and_to_no_file(stack: Stack) -> None:
    used = Databases.read(stack.shell.home)
    assert used.mlflow is not None
    (runs,) = _ask(used.mlflow, "SELECT count(*) FROM runs")
    (flows,) = _ask(used.mlflow.replace("/mlflow", "/prefect"), "SELECT count(*) FROM flow_run")
    assert min(runs[0], flows[0]) > 5
    assert not list(stack.shell.home.glob("**/*.db"))


def test_only_one_private_file_contains_the_password(stack: Stack) -> None:
    holding = [
        path
        for path in stack.shell.home.rglob("*")
        if path.is_file() and PASSWORD.encode() in path.read_bytes()
    ]
    assert holding == [stack.shell.home / "secrets" / "databases.json"]
    assert holding[0].stat().st_mode & 0o077 == 0
    for process in stack.processes():
        assert PASSWORD not in " ".join(process.cmdline())
        if "worker" in process.cmdline():
            assert PASSWORD not in str(process.environ())
