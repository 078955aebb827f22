import contextlib
import os
import sqlite3

import pytest

from registry.home import Home

# Before anything imports MLflow or the hub's client.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory):
    """An empty MLflow database: the migration of a new one takes seconds."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from registry.catalog import connect

    # MLflow's databases need not survive a power failure here; the store's files do sync.
    @event.listens_for(Engine, "connect")
    def _do_not_wait_for_the_disk(connection, _record):
        with contextlib.suppress(sqlite3.DatabaseError):
            connection.execute("PRAGMA synchronous=OFF")

    home = Home(tmp_path_factory.mktemp("template") / "home")
    home.create()
    connect(home)
    yield home.root / "mlflow.db"
    event.remove(Engine, "connect", _do_not_wait_for_the_disk)
