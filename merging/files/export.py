"""Export of a merged checkpoint, streamed tensor by tensor.

The files are those of the base (names, header, order, metadata) with the edited weights
in place of the base's. The kernel copies a tensor without edits; an edited one needs
memory for one tensor. With a shard size the tensors are distributed to new files instead.
A file without a change since an earlier export is taken from there and not written.
Weights can be written in another type than the base's: each is rounded once from the result.
The caller makes the folder appear atomically.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import FLOATING, Checkpoint, TensorInfo
from restitch.merging.files.edits import Edits, StreamedEdits
from restitch.merging.files.header import write_header
from restitch.merging.numerics.rounding import cast, round_once
from restitch.merging.progress import Progress, ignore

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BLOCK = 1 << 22
_PART = 1 << 20  # bytes to edit at once: they stay in a core's cache from read to write
_NO_LINK = {errno.EXDEV, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP, errno.EPERM}
_NO_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Previous:
    """An earlier export of the same base, whose unchanged files can be taken.

    Attributes:
        folder: where its files are.
        changed: the tensors in which the new export differs from it.
    """

    folder: Path
    changed: frozenset[str]


@dataclass(frozen=True)
class PlannedFile:
    """One file to write: its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]


def export_weights(
    base: Checkpoint,
    edits: Edits,
    out: Path,
    *,
    shard_size: int | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Tensor] | None = None,
    previous: Previous | None = None,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the merged checkpoint into the folder `out`.

    Args:
        base: the base's checkpoint.
        edits: the differences of the merged model from the base.
        out: an existing folder.
        shard_size: bytes of tensors per file; None keeps the base's files.
        dtype: of all weights; that of the base's by default.
        extra: more tensors, for instance a head; they follow the last one of the base.
        previous: an earlier export to take unchanged files from, as hard links or else as copies.
        progress: called with the bytes written and the total.

    Returns:
        The files that were taken from the earlier export.

    Raises:
        BadInput: a weight is too large for `dtype`.
    """
    extra = dict(extra or {})
    clash = sorted(extra.keys() & set(base.names))
    if clash:
        raise ValueError(f"extra tensors have the same names as tensors of the base: {clash}")
    files = _plan(base, extra, shard_size, dtype)
    taken = [] if previous is None else [file for file in files if _is_unchanged(file, previous)]
    for file in taken:
        assert previous is not None
        _take(previous.folder / file.name, out / file.name)
    written = [file for file in files if file not in taken]
    writer = _Writer(base, edits, extra, progress or ignore, sum(map(_size, written)))
    for file in written:
        writer.write(out / file.name, file)
    write_index(out, files)
    return tuple(file.name for file in taken)


def planned_files(base: Checkpoint, shard_size: int | None = None) -> list[PlannedFile]:
    """The files that an export of the base's tensors writes, to write each by itself.

    `write_file` writes one of them, and `write_index` completes the folder.
    """
    return _plan(base, {}, shard_size, None)


def write_file(
    base: Checkpoint, edits: Edits, path: Path, file: PlannedFile, progress: Progress
) -> None:
    """Write one file of an export."""
    _Writer(base, edits, {}, progress, _size(file)).write(path, file)


def _is_unchanged(file: PlannedFile, previous: Previous) -> bool:
    """True if the earlier export has a file with the same bytes."""
    if any(info.name in previous.changed for info in file.tensors):
        return False
    path, header = previous.folder / file.name, len(file.header)
    try:
        with path.open("rb") as source:
            same_size = os.fstat(source.fileno()).st_size == header + _size(file)
            return same_size and source.read(header) == file.header
    except OSError:
        return False


def _take(source: Path, target: Path) -> None:
    """Give a file another name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as err:
        if err.errno not in _NO_LINK:
            raise
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, inside the kernel if the file system supports it."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        size = os.fstat(reading.fileno()).st_size
        _copy(reading.fileno(), 0, writing.fileno(), 0, size)


def in_type(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor as it is written in a type: only weights change theirs."""
    return info if dtype is None or info.dtype not in FLOATING else replace(info, dtype=dtype)


def _plan(
    base: Checkpoint,
    extra: Mapping[str, Tensor],
    shard_size: int | None,
    dtype: torch.dtype | None,
) -> list[PlannedFile]:
    added = [TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in extra.items()]
    if shard_size is not None:
        ordered = _in_place_order(base, base.shards, dtype)
        return _reshard([*ordered, *added], base.metadata, shard_size)
    files = []
    shards = list(base.shards)
    for shard in shards:
        tensors = _in_place_order(base, [shard], dtype)
        more = added if shard == shards[-1] else []
        as_in_base = not more and all(info == base.info(info.name) for info in tensors)
        own = base.header_bytes(shard) if as_in_base else None
        header = own or _header([*tensors, *more], base.shard_metadata[shard])
        name = shard if len(shards) > 1 else SINGLE
        files.append(PlannedFile(name, header, (*tensors, *more)))
    return files


def _in_place_order(
    base: Checkpoint, shards: Iterable[str], dtype: torch.dtype | None
) -> list[TensorInfo]:
    """The tensors of some shards in the order of their bytes."""
    return [
        in_type(base.info(name), dtype)
        for shard in shards
        for name in sorted(base.shards[shard], key=lambda name: base.location(name).start)
    ]


def _reshard(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str], limit: int
) -> list[PlannedFile]:
    shards: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + info.nbytes > limit:
            shards.append([])
        shards[-1].append(info)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    return [
        PlannedFile(name, _header(tensors_of_shard, metadata), tuple(tensors_of_shard))
        for name, tensors_of_shard in zip(names, shards, strict=True)
    ]


def _header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    return write_header([(info.name, info.dtype, info.shape) for info in tensors], metadata)


def _size(file: PlannedFile) -> int:
    return sum(info.nbytes for info in file.tensors)


def write_index(out: Path, files: Sequence[PlannedFile]) -> None:
    """Write the index of the files of an export into their folder; one file needs none."""
    if len(files) == 1:
        return
    weight_map = {info.name: file.name for file in files for info in file.tensors}
    index = {
        "metadata": {"total_size": sum(_size(file) for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (out / INDEX).write_text(text, encoding="utf-8")


@dataclass
class _Writer:
    """Writes files in two threads, each of which holds one tensor at a time."""

    base: Checkpoint
    edits: Edits
    extra: Mapping[str, Tensor]
    progress: Progress
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.edited = frozenset(self.edits.names)

    def write(self, path: Path, file: PlannedFile) -> None:
        with ExitStack() as stack:
            target = stack.enter_context(path.open("wb", buffering=0)).fileno()
            sources = {
                shard: stack.enter_context(source.open("rb", buffering=0)).fileno()
                for shard, source in self.base.files.items()
            }
            _write_at(target, memoryview(file.header), 0)
            at = len(file.header)
            pool = ThreadPoolExecutor(max_workers=2)
            stack.callback(pool.shutdown, cancel_futures=True)
            jobs = []
            for info in file.tensors:
                jobs.append(pool.submit(self._tensor, target, at, info, sources))
                at += info.nbytes
            for job, info in zip(jobs, file.tensors, strict=True):
                job.result()
                self.done += info.nbytes
                self.progress(self.done, self.total)

    def _tensor(self, target: int, at: int, info: TensorInfo, sources: Mapping[str, int]) -> None:
        if info.name in self.extra:
            value = self.extra[info.name].detach().cpu().contiguous().view(-1)
            if value.numel():
                _write_at(target, value.view(torch.uint8).numpy().data, at)
            return
        place = self.base.location(info.name)
        source = sources[place.shard]
        if info != self.base.info(info.name):
            self._converted(target, at, info, source)
            return
        if info.name not in self.edited:
            _copy(source, place.start, target, at, info.nbytes)
            return
        edit, step = self._editor(info)
        buffer = torch.empty(step, dtype=torch.uint8)
        for start in range(0, info.nbytes, step):
            part = buffer[: info.nbytes - start]
            data = part.numpy().data
            _read_at(source, data, place.start + start)
            edit(part.view(info.dtype))
            _write_at(target, data, at + start)

    def _editor(self, info: TensorInfo) -> tuple[Callable[[Tensor], None], int]:
        """A function that edits the parts of a base's tensor in order, and the bytes of a part."""
        if isinstance(self.edits, StreamedEdits):
            return self.edits.editor(info.name), max(1, min(info.nbytes, _PART))
        return partial(self.edits.apply, info.name), max(1, info.nbytes)

    def _converted(self, target: int, at: int, info: TensorInfo, source: int) -> None:
        """Edit a tensor in its working type, and write it in another type than the base's."""
        own, place = self.base.info(info.name), self.base.location(info.name)
        edit, step = self._editor(own) if info.name in self.edited else (None, _PART)
        buffer = torch.empty(step, dtype=torch.uint8)
        for start in range(0, own.nbytes, step):
            part = buffer[: own.nbytes - start]
            _read_at(source, part.numpy().data, place.start + start)
            wide = cast(part.view(own.dtype), torch.promote_types(own.dtype, torch.float32))
            if edit is not None:
                edit(wide)
            after = round_once(wide, info.dtype)
            if bool((after.isinf() & wide.isfinite()).any()):
                raise _too_large(info, wide)
            data = after.view(torch.uint8).numpy().data
            _write_at(target, data, at)
            at += len(data)


def _too_large(info: TensorInfo, weights: Tensor) -> BadInput:
    dtype, most = str(info.dtype).removeprefix("torch."), torch.finfo(info.dtype).max
    return BadInput(
        f"the merged weights of {info.name} do not fit into {dtype}",
        expected=f"weights of at most {most:g}",
        found=f"{float(weights[weights.isfinite()].abs().max()):g}",
        hint="choose bfloat16 or float32",
    )


def _read_at(source: int, data: memoryview, at: int) -> None:
    while data:
        got = os.preadv(source, [data], at)
        if not got:
            raise OSError(errno.EIO, "the base's file became shorter while it was read")
        data, at = data[got:], at + got


def _write_at(target: int, data: memoryview, at: int) -> None:
    while data:
        put = os.pwrite(target, data, at)
        data, at = data[put:], at + put


def _copy(source: int, start: int, target: int, at: int, size: int) -> None:
    """Copy bytes between files, inside the kernel if the file system supports it."""
    while size:
        try:
            got = os.copy_file_range(source, target, size, start, at)
        except OSError as err:
            if err.errno not in _NO_COPY:
                raise
            got = 0
        if not got:
            break
        start, at, size = start + got, at + got, size - got
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    while size:
        part = buffer[: min(size, _BLOCK)]
        _read_at(source, part, start)
        _write_at(target, part, at)
        start, at, size = start + len(part), at + len(part), size - len(part)
