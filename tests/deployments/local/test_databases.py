"""Which databases `restitch up` gives its servers, and what it says of those that it cannot use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from restitch.deployments.local.databases import databases
from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.home import Home
from restitch.registry.stack import Databases
from tests.servers import free_port, postgres_programs, postgres_server

PREFECT = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
MLFLOW = "MLFLOW_BACKEND_STORE_URI"
PASSWORD = "the-password-of-it"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Host and port of a server with nothing but the database `postgres`."""
    if not postgres_programs():  # CI installs it, and fails where this was left out
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    with postgres_server(PASSWORD) as found:
        yield found


def url(address: str, *, password: str = PASSWORD, driver: str = "", name: str = "postgres") -> str:
    return f"postgresql{driver}://postgres:{password}@{address}/{name}"


def test_by_default_both_databases_are_files_in_the_home(tmp_path: Path) -> None:
    assert databases(Home(tmp_path), {}) == Databases(prefect=None, mlflow=None)
    assert list(tmp_path.iterdir()) == []


def test_given_addresses_are_remembered(tmp_path: Path, address: str) -> None:
    given = {PREFECT: url(address, driver="+asyncpg"), MLFLOW: url(address)}
    found = databases(Home(tmp_path), given)
    assert found.model_dump() == {"prefect": given[PREFECT], "mlflow": given[MLFLOW]}
    assert databases(Home(tmp_path), {}) == found
    assert Home.from_environment({"RESTITCH_HOME": str(tmp_path)}).mlflow_uri == given[MLFLOW]
    file = tmp_path / "secrets" / "databases.json"
    assert (file.stat().st_mode & 0o077, file.parent.stat().st_mode & 0o077) == (0, 0)


def test_the_older_name_of_prefects_setting_works(tmp_path: Path, address: str) -> None:
    older = {"PREFECT_API_DATABASE_CONNECTION_URL": url(address, driver="+asyncpg")}
    assert databases(Home(tmp_path), older).prefect == url(address, driver="+asyncpg")


@pytest.mark.parametrize("variable", [PREFECT, MLFLOW])
def test_a_wrong_password_is_reported_without_the_password(
    tmp_path: Path, address: str, variable: str
) -> None:
    driver = "+asyncpg" if variable == PREFECT else ""
    with pytest.raises(Unavailable) as caught:
        databases(Home(tmp_path), {variable: url(address, password="guessed-it", driver=driver)})
    message = caught.value.message()
    assert f"{address}/postgres cannot be used as postgres" in message
    assert "password authentication failed" in message
    assert variable in message
    assert "guessed-it" not in message
    assert list(tmp_path.iterdir()) == [], "what cannot be used is not remembered"


def test_an_absent_database_and_an_absent_server_are_reported(tmp_path: Path, address: str) -> None:
    with pytest.raises(Unavailable, match='database "absent" does not exist'):
        databases(Home(tmp_path), {MLFLOW: url(address, name="absent")})
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match="Connection refused"):
        databases(Home(tmp_path), {MLFLOW: url(nowhere)})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (PREFECT, "postgresql://u:hidden@h/d"),
        (PREFECT, "sqlite+aiosqlite:////tmp/prefect.db"),
        (MLFLOW, "mysql://u:hidden@h/d"),
        (MLFLOW, "postgresql://u:hidden@h"),
        (MLFLOW, "/some/folder"),
        (MLFLOW, "postgresql://u:hidden@h:port/d"),
    ],
)
def test_an_address_of_another_form_is_refused(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(BadInput) as caught:
        databases(Home(tmp_path), {variable: value})
    message = caught.value.message()
    assert variable in message
    assert "://user:password@host:port/database" in message
    assert "hidden" not in message


def test_a_broken_file_of_addresses_is_refused(tmp_path: Path) -> None:
    Databases(mlflow="postgresql://u:p@h/d").write(tmp_path)
    (tmp_path / "secrets" / "databases.json").write_text("{")
    with pytest.raises(Damage, match=r"databases\.json"):
        databases(Home(tmp_path), {})


def test_a_home_that_is_not_a_folder_remembers_nothing(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert Databases.read(tmp_path / "home") == Databases()


def test_an_unreadable_file_of_addresses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Databases(mlflow="postgresql://u:p@h/d").write(tmp_path)

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(Unavailable, match="the user who ran `restitch up`"):
        Databases.read(tmp_path)
