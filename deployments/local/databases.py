"""The databases of a stack's two servers: SQLite in the home by default, or PostgreSQL.

    PREFECT_SERVER_DATABASE_CONNECTION_URL   Prefect's (or ..._API_..., its older name)
    MLFLOW_BACKEND_STORE_URI                 MLflow's

The addresses are kept with the home's secrets, so that a later `up` without these variables
starts the same servers, not empty ones. Both databases are tried once before a server starts:
the server itself would answer a wrong password with a page of traceback in its log.
"""

from collections.abc import Mapping
from importlib.util import find_spec

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import Home
from restitch.registry.redaction import without_credentials
from restitch.registry.stack import Databases

PREFECT_VARIABLES = (
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
)
MLFLOW_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
VARIABLES = (*PREFECT_VARIABLES, MLFLOW_VARIABLE)

_TIMEOUT_SECONDS = 10


def databases(home: Home, environment: Mapping[str, str]) -> Databases:
    """The databases of a home's servers; they are remembered, and known to answer.

    Raises:
        BadInput: an address is not one of PostgreSQL, or its driver is not installed.
        Unavailable: a database does not answer, or refuses.
    """
    known = Databases.read(home.root)
    given = next((name for name in PREFECT_VARIABLES if environment.get(name)), None)
    prefect = environment[given] if given is not None else known.prefect
    mlflow = environment.get(MLFLOW_VARIABLE) or known.mlflow
    if prefect is not None:
        _check(prefect, given or PREFECT_VARIABLES[0], "postgresql+asyncpg")
    if mlflow is not None:
        _check(mlflow, MLFLOW_VARIABLE, "postgresql")
    used = Databases(prefect=prefect, mlflow=mlflow)
    if used != known:
        used.write(home.root)
    return used


def _check(address: str, variable: str, driver: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    shown, expected = without_credentials(address), f"{driver}://user:password@host:port/database"
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise BadInput(f"{variable} is not a database address", expected=expected) from None
    fits = url.get_backend_name() == "postgresql" and url.drivername.startswith(driver)
    if not fits or not url.host or not url.database:
        raise BadInput(
            f"{variable} is not an address that this server can use",
            expected=expected,
            found=shown,
            hint="unset the variable to use SQLite in RESTITCH_HOME",
        )
    if find_spec("psycopg2") is None:
        raise BadInput(
            f"{variable} needs the driver psycopg2, which is not installed",
            hint="pip install 'restitch[team]'",
        )
    plain = url.set(drivername="postgresql+psycopg2", query={})
    try:
        engine = create_engine(plain, connect_args={"connect_timeout": _TIMEOUT_SECONDS})
        engine.connect().close()
        engine.dispose()
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip()
        raise Unavailable(
            f"the database {url.host}:{url.port or 5432}/{url.database} cannot be used "
            f"as {url.username}",
            found=without_credentials(cause).splitlines()[0],
            hint=f"check {variable}, and that the database accepts connections from this host",
        ) from None
