import contextlib
import os
import sqlite3

import pytest

from registry.home import Home
from tests.servers import s3_server

_ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "the-key-id",
    "AWS_SECRET_ACCESS_KEY": "the-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of the developer's own, and no question to the network for a machine's role.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}

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


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory):
    """An S3 server for all tests."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3_account(s3_url, monkeypatch):
    """Address and credentials of the server in the environment; yields them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    account = {**_ACCOUNT, "AWS_ENDPOINT_URL": s3_url}
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    return account


@pytest.fixture
def s3_client(s3_account):
    """A client of its own, to look at the server."""
    import boto3

    return boto3.session.Session().client("s3")


@pytest.fixture
def s3_bucket(s3_client):
    """The name of the one bucket, in which each test has its own prefix."""
    s3_client.create_bucket(Bucket="bucket")
    return "bucket"
