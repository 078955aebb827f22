"""Files mapped into memory, and their digests, which threads can compute ahead of their use.

It needs neither torch nor numpy, so hashing can start before these are loaded.
"""

import json
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular

# The limit of the safetensors library itself.
MAX_HEADER = 100_000_000

# Python has a name for this flag from 3.13 on; its number is different outside of Linux.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class MappedFile:
    """A file in memory; do not write to it.

    Args:
        file: the file, open for reading.
        size: its bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        # Private and writable: torch refuses read-only memory without a warning, and what a
        # careless caller writes stays in this process. No swap is reserved for it.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self.memory = mmap.mmap(file.fileno(), size, flags=flags, prot=protection)
        self._ahead: dict[tuple[int, int], Future[str]] = {}

    def part(self, start: int, size: int) -> memoryview:
        """A range of bytes."""
        return memoryview(self.memory)[start : start + size]

    def digest(self, start: int, size: int) -> str:
        """The digest of a range, which may have been computed ahead."""
        if (ahead := self._ahead.get((start, size))) is not None:
            with suppress(CancelledError):
                return ahead.result()
        return self._digest(start, size)

    def _digest(self, start: int, size: int) -> str:
        return str(blake3(self.part(start, size)).hexdigest())

    def hash_tensors(self, pool: ThreadPoolExecutor) -> None:
        """Compute the digests of the tensors of a safetensors file in a pool.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, RecursionError: the file is damaged.
        """
        start = 8 + int.from_bytes(self.memory[:8], "little")
        table = json.loads(self.memory[8 : min(start, MAX_HEADER)])
        table.pop("__metadata__", None)
        for entry in table.values():
            begin, end = entry["data_offsets"]
            part = start + begin, end - begin
            self._ahead[part] = pool.submit(self._digest, *part)


# Device, inode, size and time of the last change of a file.
_State = tuple[int, int, int, int]
_hashed_ahead: dict[_State, MappedFile] = {}


def map_file(file: Path, size: int) -> MappedFile:
    """Map a file that has a known size.

    Raises:
        BadInput: it has another size by now, or cannot be read.
    """
    try:
        with open_regular(file) as opened:
            state = _state(opened)
            # Reading beyond the end of a mapped file kills the process, so check its size.
            if state[2] == size:
                return _hashed_ahead.get(state) or MappedFile(opened, size)
        found = "a different size"
    except (OSError, ValueError) as error:
        found = str(error)
    raise BadInput(
        f"{file} changed while it was read",
        expected=f"{size} bytes",
        found=found,
        hint="try again when the file is complete and no program writes to it",
    )


@contextmanager
def hashing_ahead(sources: Iterable[str]) -> Iterator[None]:
    """Hash models in folders and files of this machine while a block runs.

    Other sources, and what cannot be read, are left to the block, which explains it.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        states = []
        try:
            for file in (file for source in sources for file in _files(Path(source))):
                with suppress(*_UNREADABLE), open_regular(file) as opened:
                    state = _state(opened)
                    mapped = _hashed_ahead.setdefault(state, MappedFile(opened, state[2]))
                    states.append(state)
                    mapped.hash_tensors(pool)
            yield
        finally:
            pool.shutdown(cancel_futures=True)
            for state in states:
                _hashed_ahead.pop(state, None)


_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors")) if source.is_dir() else [source]


def _state(file: BinaryIO) -> _State:
    at = os.fstat(file.fileno())
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns
