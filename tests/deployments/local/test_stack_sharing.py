"""Merges in workers share their work: a process of `assist` and runs of another worker help."""

from collections import Counter
from pathlib import Path

import pytest

from tests.deployments.conftest import running_stack
from tests.worlds import SKILLS, World

pytestmark = [pytest.mark.servers, pytest.mark.slow]


def test_helpers_make_parts_of_a_workers_merge_with_the_bytes_of_one_process(
    tmp_path: Path, world: World
) -> None:
    settings = {"RESTITCH_PART_SIZE": "1B", "RESTITCH_SHARE_AFTER": "0"}
    with running_stack(tmp_path, world, **settings) as stack:
        stack.line("demo")
        helper = stack.shell.start(
            *("assist", "demo", "--json"), environment={**stack.environment, **settings}
        )
        for task in SKILLS:
            stack.register("demo", task)
        stack.champion("demo", *SKILLS)
        for run in stack.runs("remerge", "demo") + stack.runs("assist", "demo"):
            stack.finished(run["id"])
        helper.terminate()
        helped, errors = helper.communicate()
        objects = stack.shell.ledger("demo").objects
        keys = [name.rpartition("/")[2] for name in objects.store.list("keys/part")]
        makers: Counter[str] = Counter()
        for key in keys:
            record = objects.lookup("part", key)
            assert record is not None
            assert isinstance(record.made_by, dict)
            makers[str(record.made_by["actor"]).partition("@")[0]] += 1
        states = Counter(run["state_type"] for run in stack.runs("assist", "demo"))
        assert makers["remerge"], makers
        assert makers.total() > makers["remerge"], f"nobody helped: {makers} {helped} {errors}"
        assert states, "no worker was asked"
        assert states.keys() <= {"COMPLETED", "CANCELLED"}, states
        assert not list(objects.store.list("offers"))
        # Makes every version again in one process, and compares the bytes.
        stack.process("verify", "demo")
