"""A Prefect server on SQLite takes writes in turn, and waits seconds for a lock and no more."""

from pathlib import Path

import pytest

from tests.deployments.server.prefect_load import connected, loaded, made
from tests.servers import prefect_server
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


@pytest.mark.servers
@pytest.mark.slow
def test_every_switch_in_prefects_pages_works_under_load(tmp_path: Path) -> None:
    """The pages send one request and do not try again."""
    module = "restitch.deployments.server.prefect_server"
    with prefect_server(tmp_path / "prefect", module) as api:
        statuses, is_on = switched_under_load(api, times=25)
    assert statuses == [204] * 50
    assert not is_on


def switched_under_load(api: str, times: int) -> tuple[list[int], bool]:
    """Switch a schedule and its deployment off and on under load.

    Returns:
        The statuses of the server's answers, and whether the schedule is on in the end.
    """
    with connected(api) as client:
        flow = made(client, "/flows/", {"name": "remerge"})
        schedule = {"schedule": {"cron": "0 0 1 1 *"}, "slug": "a", "parameters": {"line": "a"}}
        body = {"name": "restitch", "flow_id": flow, "schedules": [schedule]}
        deployment = f"/deployments/{made(client, '/deployments/', body)}"
        (before,) = client.get(f"{deployment}/schedules").json()
        answers = []
        with loaded(api):
            for time in range(times):
                off = time % 2 == 0
                page = f"{deployment}/schedules/{before['id']}"
                same = {key: before[key] for key in ("slug", "schedule", "parameters")}
                answers.append(client.patch(page, json={**same, "active": not off}))
                answers.append(client.patch(deployment, json={"paused": off}))
        (after,) = client.get(f"{deployment}/schedules").json()
    return [answer.status_code for answer in answers], after["active"]
