import os

import pytest

from registry.home import Home

# Before anything imports MLflow or the hub's client.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory):
    """An empty MLflow database: the migration of a new one takes seconds."""
    from registry.catalog import connect

    home = Home(tmp_path_factory.mktemp("template") / "home")
    home.create()
    connect(home)
    return home.root / "mlflow.db"
