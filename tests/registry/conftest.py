import os

import pytest

from restitch.registry.mlflow.sync import MlflowProjection
from tests.registry.builders import home_with_mlflow
from tests.registry.mlflow_view import small_line
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


@pytest.fixture
def home(tmp_path, empty_mlflow):
    """A home with a store and an MLflow of its own."""
    return home_with_mlflow(tmp_path / "home", empty_mlflow)


@pytest.fixture
def mlflow(home):
    """Its view in MLflow."""
    return MlflowProjection(home)


@pytest.fixture
def line(home):
    """A line of it with two merged versions."""
    return small_line(home)


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


@pytest.fixture(scope="session")
def s3_client(s3_url):
    """A client of its own, to look at the server; to make one takes a quarter of a second."""
    import boto3

    account = {
        name.lower(): _ACCOUNT[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    session = boto3.session.Session(**account, region_name=_ACCOUNT["AWS_DEFAULT_REGION"])
    return session.client("s3", endpoint_url=s3_url)


@pytest.fixture
def s3_bucket(s3_account, s3_client):
    """The name of the one bucket, in which each test has its own prefix."""
    s3_client.create_bucket(Bucket="bucket")
    return "bucket"
