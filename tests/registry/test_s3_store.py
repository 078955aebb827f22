import pytest

from registry.s3_store import S3Store
from tests.registry.store_contract import StoreContract
from tests.servers import s3_server

ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "the-key-id",
    "AWS_SECRET_ACCESS_KEY": "the-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def account(server, monkeypatch):
    for name, value in {**ACCOUNT, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client(account):
    import boto3

    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def prefix(tmp_path):
    """A place of its own for each test in the one bucket."""
    return tmp_path.name.replace("[", "-").replace("]", "-")


@pytest.fixture
def store(client, prefix, tmp_path):
    return S3Store("bucket", prefix, tmp_path / "cache")


class TestS3Store(StoreContract):
    lives_up_to = 0.6

    @pytest.fixture
    def store(self, client, prefix, tmp_path):
        return S3Store("bucket", prefix, tmp_path / "cache")

    @pytest.fixture
    def opener(self, prefix, tmp_path):
        module = "__import__('registry.s3_store').s3_store"
        return f"{module}.S3Store('bucket', {prefix!r}, Path({str(tmp_path / 'cache')!r}))"
