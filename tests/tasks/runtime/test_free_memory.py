"""What memory is available, and steps that are refused because it is not enough."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.errors import Unavailable
from restitch.tasks.runtime import free_memory as module
from restitch.tasks.runtime.free_memory import Free, Part, check_memory, free_memory, gigabytes
from tests.shell import Shell
from tests.worlds import World

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a control group of this process, with its files."""

    def make(entry: str, place: str, **files: object) -> None:
        own = tmp_path / "self"
        own.write_text(f"7:cpu,cpuacct:/\n{entry}\n", encoding="utf-8")
        folder = tmp_path / "fs" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n", encoding="ascii")
        monkeypatch.setattr(module, "_CGROUPS", tmp_path / "fs")
        monkeypatch.setattr(module, "_OWN_CGROUPS", own)

    return make


def only(size: int) -> Callable[[torch.device], Free]:
    return lambda _: Free(size, "on this machine")


def test_the_memory_of_the_machine_is_what_the_system_can_give() -> None:
    free = free_memory(CPU)
    assert free is not None
    assert 0 < free.size <= psutil.virtual_memory().total + psutil.swap_memory().total


def test_a_limit_of_version_2_counts_and_pages_of_files_are_available(
    cgroups: Callable[..., None],
) -> None:
    stat = f"anon {60 * MB}\nactive_file {5 * MB}\ninactive_file {20 * MB}\nslab 9"
    cgroups("0::/jobs/one", "jobs/one", max=100 * MB, current=90 * MB, stat=stat)
    assert free_memory(CPU) == Free(
        35 * MB + psutil.swap_memory().free, "within this worker's memory limit"
    )


def test_a_limit_of_a_group_above_counts_too(cgroups: Callable[..., None]) -> None:
    cgroups("0::/jobs/one", "jobs", max=80 * MB, current=10 * MB, stat="inactive_file 0")
    cgroups("0::/jobs/one", "jobs/one", max="max", current=10 * MB, stat="inactive_file 0")
    free = free_memory(CPU)
    assert free is not None
    assert free.size == 70 * MB + psutil.swap_memory().free


def test_a_limit_of_version_1_counts_and_totals_are_not_added_twice(
    cgroups: Callable[..., None],
) -> None:
    stat = f"inactive_file 7\nactive_file 7\ntotal_inactive_file {3 * MB}\ntotal_active_file 0"
    files = {"limit_in_bytes": 50 * MB, "usage_in_bytes": 20 * MB, "stat": stat}
    cgroups("4:memory:/job", "memory/job", **files)
    free = free_memory(CPU)
    assert free is not None
    assert free.size == 33 * MB + psutil.swap_memory().free


def test_in_a_container_the_group_is_the_root(cgroups: Callable[..., None]) -> None:
    cgroups("0::/docker/0123", ".", max=64 * MB, current=4 * MB, stat="inactive_file 0")
    free = free_memory(CPU)
    assert free is not None
    assert free.size == 60 * MB + psutil.swap_memory().free


@pytest.mark.parametrize("value", ["max", 1 << 62, "nothing"])
def test_no_limit_is_no_limit(cgroups: Callable[..., None], value: object) -> None:
    cgroups("0::/", ".", max=value, current=4 * MB, stat="inactive_file 0")
    free = free_memory(CPU)
    assert free is not None
    assert free.where == "on this machine"


@given(st.lists(st.integers(0, 1 << 40), max_size=4), st.integers(0, 1 << 41))
def test_a_step_is_refused_exactly_if_its_parts_do_not_fit(sizes: list[int], free: int) -> None:
    parts = [Part(f"part {number}", size) for number, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "free_memory", only(free))
        if sum(sizes) <= free:
            check_memory("work", parts, CPU, "buy more")
            return
        with pytest.raises(Unavailable) as refused:
            check_memory("work", parts, CPU, "buy more")
    text = refused.value.message()
    assert "not enough memory to work" in text
    assert f"at least {gigabytes(sum(sizes))}" in text
    assert all(f"{gigabytes(p.size)} for {p.what}" in text for p in parts)
    assert f"found:    {gigabytes(free)} available on this machine" in text
    assert "to do:    buy more" in text


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda _: None)
    check_memory("work", [Part("everything", 1 << 60)], CPU, "")


@pytest.mark.usefixtures("without_mlflow")
def test_a_registration_is_refused_before_the_model_is_loaded_and_goes_on_later(
    shell: Shell, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    task, model = world.task("colour"), world.model("colour")
    with monkeypatch.context() as little:
        little.setattr(module, "free_memory", only(1000))
        little.setattr("restitch.tasks.inputs.live_base._live", {})
        done = shell("register", "demo", "--task", task, "--model", model, code=6)
    assert "there is not enough memory to evaluate on colour" in done.err
    assert "for the weights in float32" in done.err
    assert "0.00 MB available on this machine" in done.err
    assert "set `compute: bfloat16` in the line file, or use a worker with more memory" in done.err
    assert shell.state().tasks["colour"].versions[1].state == "registered"
    assert shell.json("remerge", "demo")["action"] == "promoted"
