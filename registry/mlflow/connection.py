"""The connection to a home's MLflow, and what its failures mean to a user."""

import contextlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home
from restitch.registry.redaction import first_line, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextlib.contextmanager
def mlflow_explained(home: Home, missing: str | None = None) -> Iterator[None]:
    """Turn MLflow's failures into errors that say what to do.

    `missing` is the message if MLflow answers that something does not exist.

    Raises:
        BadInput: something does not exist, and `missing` was given.
        Unavailable: MLflow cannot be used.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = first_line(error)
        absent = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
        if missing is not None and getattr(error, "error_code", None) in absent:
            raise BadInput(missing, found=first, hint="check the name and the version") from None
        # Not chained: the original may hold an address with its password.
        raise Unavailable(
            f"MLflow at {without_credentials(home.mlflow_uri)} cannot be used",
            found=first,
            hint="check MLFLOW_TRACKING_URI and that the server is running; the store is complete, "
            "and the next remerge updates MLflow",
        ) from None


def run_address(server: str, experiment: str, run: str) -> str:
    """The address of a run's page, in the view for machine learning."""
    place = f"#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"
    return f"{without_credentials(server).rstrip('/')}/{place}"


def connect(home: Home) -> "MlflowClient":
    """MLflow's client for a home; sets nothing global in the process."""
    # The first connection migrates a new database, and would log every step.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    if home.owns_mlflow:
        home.root.mkdir(parents=True, exist_ok=True)
    _check_database(home.mlflow_uri)
    return mlflow.MlflowClient(tracking_uri=home.mlflow_uri, registry_uri=home.mlflow_uri)


@lru_cache(maxsize=8)
def _check_database(uri: str) -> None:
    """Try a database that is used without a server: MLflow itself retries for an hour."""
    if not uri.startswith("postgresql"):
        return
    from sqlalchemy import create_engine

    with contextlib.suppress(ImportError):  # MLflow explains a missing driver
        engine = create_engine(uri, connect_args={"connect_timeout": 10})
        try:
            engine.connect().close()
        finally:
            engine.dispose()
