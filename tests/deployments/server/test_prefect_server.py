"""A Prefect server on SQLite waits seconds for a lock, whatever Prefect asks for."""

from pathlib import Path

from tests.shell import Shell

# As Prefect does it: an asynchronous engine whose connections get a minute of patience.
SCRIPT = """
import asyncio, json, sys
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from restitch.deployments.server.prefect_server import BUSY_MILLISECONDS

async def patience(url):
    engine = create_async_engine(url)
    event.listen(
        engine.sync_engine,
        "connect",
        lambda connection, _: connection.cursor().execute("PRAGMA busy_timeout = 60000"),
    )
    found = []
    for _ in range(2):  # the second time with the same connection, from the pool
        async with engine.connect() as connection:
            found.append((await connection.execute(text("PRAGMA busy_timeout"))).scalar())
            await connection.execute(text("PRAGMA busy_timeout = 60000"))
    await engine.dispose()
    return found

print(json.dumps([BUSY_MILLISECONDS, *asyncio.run(patience(sys.argv[1]))]))
"""


def test_every_use_of_a_connection_has_the_short_timeout(tmp_path: Path) -> None:
    found = Shell(tmp_path).python(SCRIPT, f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    short, *patience = found.json
    assert patience == [short, short]
    assert short < 10_000
