import mmap
from pathlib import Path

import numpy as np

from restitch.tasks.runtime.memory import memory_added


def test_allocated_memory_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 25))
    with memory_added() as mapping, (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert not np.frombuffer(mapped, np.uint8).any()
    with memory_added() as holding:
        held = np.ones(1 << 22)
    assert mapping.added is not None
    assert holding.added is not None
    assert mapping.added < 1 << 24
    assert held.nbytes <= holding.added < 3 * held.nbytes


def test_memory_freed_before_the_end_counts() -> None:
    with memory_added() as peak:
        held = np.ones(1 << 22)
        for _ in range(60):  # until at least one sample was taken
            held += 1
        size = held.nbytes
        del held
    assert peak.added is not None
    assert peak.added >= size
