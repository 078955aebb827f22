"""The environment variables that restitch reads, for the reference. A test compares them with the code."""

from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable.

    Attributes:
        name: its name.
        read_by: the processes that need it.
        meaning: its meaning, default and form.
    """

    name: str
    read_by: str
    meaning: str


VARIABLES: dict[str, tuple[Variable, ...]] = {
    "State and store": (
        Variable("RESTITCH_HOME", "all", "The folder with the state of this host, `.restitch` by default. With a store in a bucket it holds caches and scratch files only."),
        Variable("RESTITCH_STORE", "all but the webhook receiver", "The store: `s3://bucket/prefix` or a folder. Default: `RESTITCH_HOME/store`."),
        Variable("AWS_ENDPOINT_URL", "all that use the bucket", "The S3 server; boto3's own, as are `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` and `AWS_DEFAULT_REGION`."),
        Variable("RESTITCH_CACHE_SIZE", "all that use the bucket", "The size of the local cache, such as `50GB`. Unset: no limit."),
        Variable("RESTITCH_S3_ENCRYPTION", "all that write to the bucket", "`AES256` or `aws:kms`. Unset: the bucket decides."),
        Variable("RESTITCH_S3_KMS_KEY", "all that write to the bucket", "The id of the key for `aws:kms`."),
        Variable("RESTITCH_S3_STORAGE_CLASS", "all that write to the bucket", "The storage class of blobs, such as `INTELLIGENT_TIERING`. Unset: the bucket decides."),
        Variable("RESTITCH_SINGLE_WRITER", "all that write to the bucket", "`1` allows a server that ignores conditional writes. You then guarantee that only one process writes at a time."),
    ),
    "Work": (
        Variable("RESTITCH_DEVICE", "workers, and commands that work without them", "`auto`, `cpu`, `cuda` or `cuda:N`. Default: `auto`."),
        Variable("RESTITCH_ACTOR", "all", "The name in the audit trail. Default: the user of the system."),
        Variable("RESTITCH_WORK_POOL", "workers", "The work pool, recorded with what the worker makes."),
        Variable("RESTITCH_WORKER", "workers", "The name of the worker, recorded with what it makes."),
        Variable("RESTITCH_ALLOWED_ROOTS", "workers, `register`", "Folders from which models and data sets may be read, separated by `:`. Unset: all."),
        Variable("RESTITCH_ALLOWED_HOSTS", "workers, `register`", "Hosts and buckets from which they may be read, such as `huggingface.co,s3://models`. Unset: all."),
        Variable("HF_TOKEN", "workers, `register`", "The hub's own, as are `HF_ENDPOINT` and `HF_HUB_OFFLINE`."),
    ),
    "Servers": (
        Variable("PREFECT_API_URL", "all", "The Prefect server. Where it is set, flows run as Prefect flows."),
        Variable("PREFECT_API_AUTH_STRING", "all", "Credentials for that server; or `PREFECT_API_KEY`."),
        Variable("PREFECT_SERVER_DATABASE_CONNECTION_URL", "the Prefect server, `up`", "Its database. `up` remembers it; without it, SQLite."),
        Variable("MLFLOW_TRACKING_URI", "all", "The MLflow server; `MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD` and `MLFLOW_TRACKING_TOKEN` are MLflow's own."),
        Variable("MLFLOW_BACKEND_STORE_URI", "the MLflow server, `up`", "Its database. `up` remembers it; without it, SQLite."),
        Variable("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", "the MLflow server", "The Fernet key with which MLflow encrypts the secrets of webhooks."),
        Variable("RESTITCH_WEBHOOK_SECRET", "the webhook receiver, `webhook --register`", "The secret shared with MLflow, 16 characters or more."),
    ),
    "Compose": (
        Variable("RESTITCH_TAG", "`deployments/compose.yaml`", "The tag of the image."),
    ),
}
