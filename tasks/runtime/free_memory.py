"""Check that the memory is enough before a step begins, and say what is missing.

A step names the bytes that it certainly holds; what depends on the rows, such as activations, is
not counted. All that the system can reclaim counts as available. So a step that would fit is never
refused, and one that is not refused can still run out of memory.
"""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from restitch.merging.errors import Unavailable

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# The files of a control group with its limit and its usage, by the version of the interface.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_VERSION_2 = ("memory.max", "memory.current")
# Pages of files, which the system reclaims when a process needs memory.
_RECLAIMABLE = {
    "active_file",
    "inactive_file",
    "slab_reclaimable",
    "total_active_file",
    "total_inactive_file",
}


@dataclass(frozen=True)
class Part:
    """Bytes that a step holds, and for what: `the weights in float32`."""

    what: str
    size: int


@dataclass(frozen=True)
class Free:
    """The memory that is available, and whose it is."""

    size: int
    where: str


def check_memory(step: str, parts: list[Part], on: torch.device, hint: str) -> None:
    """Refuse a step that needs more memory than there is.

    Args:
        step: the work, after "to".
        parts: all that it holds at once, in addition to what this process has allocated.
        on: the device that holds it.
        hint: what the user can do.

    Raises:
        Unavailable: the message says what it needs and what there is.
    """
    free = free_memory(on)
    needed = sum(part.size for part in parts)
    if free is None or needed <= free.size:
        return
    listed = ", ".join(f"{gigabytes(part.size)} for {part.what}" for part in parts)
    raise Unavailable(
        f"there is not enough memory to {step}",
        expected=f"at least {gigabytes(needed)}: {listed}",
        found=f"{gigabytes(free.size)} available {free.where}",
        hint=hint,
    )


def gigabytes(size: int) -> str:
    """A number of bytes to two digits after the point, or megabytes if it is small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def free_memory(on: torch.device) -> Free | None:
    """The memory that can be allocated on a device; None where the system does not say."""
    if on.type == "cuda":
        free, _ = torch.cuda.mem_get_info(on)
        # Freed by tensors and kept by torch for the next ones.
        kept = torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on)
        return Free(free + kept, f"on {torch.cuda.get_device_name(on)}")
    if on.type != "cpu":
        return None
    release_freed()
    swap = psutil.swap_memory().free
    free_here = Free(psutil.virtual_memory().available + swap, "on this machine")
    limits = [Free(size + swap, "within this worker's memory limit") for size in _cgroups()]
    return min((free_here, *limits), key=lambda one: one.size)


def release_freed() -> None:
    """Return memory that was freed, but that the allocator keeps, to the system."""
    with suppress(AttributeError, OSError):  # the C library has another allocator
        ctypes.CDLL(None).malloc_trim(0)


def _cgroups() -> Iterator[int]:
    """The bytes that are left in each control group of this process that has a limit."""
    for folder, files in _own_cgroups():
        with suppress(OSError, ValueError):  # no limit is no number in version 2
            limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in files)
            if limit < psutil.virtual_memory().total:
                yield max(0, limit - usage + _reclaimable(folder))


def _own_cgroups() -> Iterator[tuple[Path, tuple[str, str]]]:
    """The control groups of this process and all above them, each with the names of its files."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "":
            root, files = _CGROUPS, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = _CGROUPS / "memory", _VERSION_1
        else:
            continue
        # In a container the root is often the process's own group, and its place is not there.
        own = root / place.lstrip("/")
        folders = (own, *own.parents)
        yield from ((folder, files) for folder in folders if folder.is_relative_to(root))


def _reclaimable(folder: Path) -> int:
    """The bytes of a control group that are pages of files."""
    lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    values = dict(line.split() for line in lines)
    # Version 1 has the same numbers with those of the groups below as `total_`.
    totals = {name for name in values if name.startswith("total_")}
    names = _RECLAIMABLE & (totals or values.keys())
    return sum(int(values[name]) for name in names)
