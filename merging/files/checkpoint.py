"""Checkpoints: one safetensors file or several shards, memory-mapped tensor by tensor.

Opening reads and checks headers only. Tensors are views of the mapped files and cost no
private memory; callers must not write to them. Names are ordered by their UTF-8 bytes.
The digest is taken over the tensors in that order (name, type, shape, digest of the
bytes), so it depends neither on sharding nor on file names.
"""

import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput
from restitch.merging.files.header import DTYPE_NAMES, MAX_HEADER, count_elements, read_header
from restitch.merging.files.safe_open import open_regular, read_limited
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Python has a name for this flag from 3.13 on; its number is different outside of Linux.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
_CONVERT = (
    "if you trust the file, convert it: AutoModel.from_pretrained(FOLDER)"
    ".save_pretrained(OUT, safe_serialization=True), then use OUT"
)


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of a tensor, known without reading it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return count_elements(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all elements."""
        return self.numel * self.dtype.itemsize


# Makes sure that a tensor's bytes are in its file.
Fetch = Callable[[str], None]


@dataclass(frozen=True)
class TensorLocation:
    """The shard of a tensor and its first byte, counted from the start of the shard's file."""

    shard: str
    start: int


class Checkpoint:
    """A set of named tensors on disk; make one with `open`."""

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        locations: Mapping[str, TensorLocation],
        files: Mapping[str, Path],
        maps: Mapping[str, mmap.mmap],
        shards: Mapping[str, tuple[str, ...]],
        metadata: Mapping[str, Mapping[str, str]],
        index: Path | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self.path = path
        self.names = tuple(sorted(infos, key=by_bytes))
        self.shards = dict(shards)
        self.files = dict(files)
        self.index = index
        self.shard_metadata = {name: dict(values) for name, values in metadata.items()}
        self._infos = dict(infos)
        self._locations = dict(locations)
        self._maps = dict(maps)
        self._fetch = fetch
        self._listing: bytes | None = None

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open a folder of safetensors or one safetensors file."""
        path = Path(path)
        try:
            files, index = _locate(path)
        except OSError as error:
            raise BadInput(
                f"{path} cannot be read",
                found=error.strerror or str(error),
                hint="check the path and its permissions",
            ) from error
        return cls.from_files(path, files, index)

    @classmethod
    def from_files(
        cls,
        path: Path,
        files: Mapping[str, Path],
        index: Path | None = None,
        fetch: Fetch | None = None,
    ) -> "Checkpoint":
        """Open files as the shards of one checkpoint.

        Args:
            path: the name of the checkpoint in messages.
            files: by shard.
            index: the file that maps tensors to shards, if there is one.
            fetch: called with a tensor's name before its bytes are read, so that it can
                download them then; the headers must be complete from the start.
        """
        infos: dict[str, TensorInfo] = {}
        locations: dict[str, TensorLocation] = {}
        maps: dict[str, mmap.mmap] = {}
        shards: dict[str, tuple[str, ...]] = {}
        metadata: dict[str, dict[str, str]] = {}
        for shard, file in files.items():
            header = read_header(file)
            metadata[shard] = header.metadata
            shards[shard] = tuple(entry.name for entry in header.entries)
            for entry in header.entries:
                if entry.name in infos:
                    raise BadInput(
                        f"{path} contains the tensor {entry.name!r} twice",
                        expected="each tensor in one shard",
                        found=f"{locations[entry.name].shard} and {shard}",
                        hint="save the checkpoint again",
                    )
                infos[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape)
                locations[entry.name] = TensorLocation(shard, header.data_start + entry.begin)
            maps[shard] = _map(file, header.size)
        if index is not None:
            _check_index(index, {name: location.shard for name, location in locations.items()})
        return cls(path, infos, locations, files, maps, shards, metadata, index, fetch)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all shards together; for a repeated key the first shard counts."""
        merged: dict[str, str] = {}
        for values in self.shard_metadata.values():
            for key, value in values.items():
                merged.setdefault(key, value)
        return merged

    @property
    def floating(self) -> tuple[str, ...]:
        """The names of the tensors that hold weights, without integer buffers."""
        return tuple(name for name in self.names if self._infos[name].dtype in FLOATING)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(info.nbytes for info in self._infos.values())

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor."""
        return self._infos[name]

    def location(self, name: str) -> TensorLocation:
        """The position of a tensor's bytes."""
        return self._locations[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file; do not write to it."""
        info, location = self._infos[name], self._locations[name]
        if info.numel == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._fetch is not None:
            self._fetch(name)
        source = self._maps[location.shard]
        if location.start % info.dtype.itemsize:
            # A header need not be padded; torch wants elements at multiples of their size.
            raw = bytearray(memoryview(source)[location.start : location.start + info.nbytes])
            return torch.frombuffer(raw, dtype=info.dtype).view(info.shape)
        flat = torch.frombuffer(source, dtype=info.dtype, count=info.numel, offset=location.start)
        return flat.view(info.shape)

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor, mapped."""
        info, location = self._infos[name], self._locations[name]
        if self._fetch is not None:
            self._fetch(name)
        return memoryview(self._maps[location.shard])[location.start : location.start + info.nbytes]

    def header_bytes(self, shard: str) -> bytes | None:
        """The header of a shard's file, or None if this view renames or omits its tensors."""
        with open_regular(self.files[shard]) as file:
            length = file.read(8)
            raw = length + file.read(int.from_bytes(length, "little"))
        named = json.loads(raw[8:])
        named.pop("__metadata__", None)
        return raw if tuple(named) == self.shards[shard] else None

    def digest(self, progress: Progress | None = None) -> str:
        """The digest of all tensors in name order; computed once."""
        return digest_bytes(self.listing(progress))

    def listing(self, progress: Progress | None = None) -> bytes:
        """A line of JSON for each tensor in name order: name, type, shape and digest.

        Its digest is the checkpoint's digest, so a stored listing allows to compare tensors.
        """
        if self._listing is None:
            report, total, done = progress or ignore, self.nbytes, 0
            lines = []
            with ThreadPoolExecutor(max_workers=2) as pool:
                for name, digest in zip(
                    self.names, pool.map(self.tensor_digest, self.names), strict=True
                ):
                    info = self._infos[name]
                    kind = DTYPE_NAMES[info.dtype]
                    lines.append(json.dumps([name, kind, list(info.shape), digest]))
                    done += info.nbytes
                    report(done, total)
            self._listing = "\n".join(lines).encode()
        return self._listing

    def tensor_digest(self, name: str) -> str:
        """The digest of one tensor's bytes."""
        return str(blake3(self.tensor_bytes(name)).hexdigest())

    def renamed(self, mapping: Mapping[str, str]) -> "Checkpoint":
        """The tensors named in `mapping` under their new names; the others are left out."""
        if len(set(mapping.values())) != len(mapping):
            raise ValueError("two tensors cannot have the same new name")
        infos = {new: replace(self._infos[old], name=new) for old, new in mapping.items()}
        locations = {new: self._locations[old] for old, new in mapping.items()}
        shards = {
            shard: tuple(mapping[name] for name in names if name in mapping)
            for shard, names in self.shards.items()
        }
        back, fetch = {new: old for old, new in mapping.items()}, self._fetch
        return Checkpoint(
            self.path,
            infos,
            locations,
            self.files,
            self._maps,
            shards,
            self.shard_metadata,
            fetch=None if fetch is None else lambda name: fetch(back[name]),
        )


def _map(file: Path, size: int) -> mmap.mmap:
    # Private and writable: torch refuses read-only memory without a warning, and what a
    # careless caller writes stays in this process. No swap is reserved for it.
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        with open_regular(file) as handle:
            # Reading beyond the end of a mapped file kills the process, so check its size.
            if os.fstat(handle.fileno()).st_size == size:
                return mmap.mmap(handle.fileno(), size, flags=flags, prot=protection)
        found = "a different size"
    except (OSError, ValueError) as error:
        found = str(error)
    raise BadInput(
        f"{file} changed while it was read",
        expected=f"{size} bytes",
        found=found,
        hint="try again when the file is complete and no program writes to it",
    )


def _locate(path: Path) -> tuple[dict[str, Path], Path | None]:
    """The files of a checkpoint by name, and its index file where it is sharded."""
    if path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise _pickle(path, [path.name])
        if path.name.endswith(".index.json"):
            return _indexed(path)
        return {path.name: path}, None
    if not path.is_dir():
        raise BadInput(
            f"{path} does not exist",
            expected="a folder with safetensors, or a .safetensors file",
            found="no file or folder",
            hint="check the path",
        )
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single.name: single}, None
    if index.is_file():
        return _indexed(index)
    found = sorted(item for item in path.iterdir() if item.suffix == ".safetensors")
    if len(found) == 1:
        return {found[0].name: found[0]}, None
    pickles = sorted(item.name for item in path.iterdir() if item.suffix.lower() in _PICKLES)
    if not found and pickles:
        raise _pickle(path, pickles)
    raise BadInput(
        f"{path} contains no checkpoint" if not found else f"{path} contains several checkpoints",
        expected="model.safetensors, or shards with model.safetensors.index.json",
        found=", ".join(item.name for item in found) or "no safetensors file",
        hint="name the .safetensors file itself" if found else "check the path",
    )


def _pickle(path: Path, names: list[str]) -> BadInput:
    return BadInput(
        f"{path} is not a safetensors checkpoint",
        expected="safetensors (opening a pickle can run code)",
        found=", ".join(names),
        hint=_CONVERT,
    )


def index_shards(index: Path) -> list[str]:
    """The file names of the shards in an index.

    Raises:
        BadInput: the file is not an index, or names a file outside of its folder.
    """
    shards = sorted(set(_weight_map(index).values()), key=by_bytes)
    for shard in shards:
        if Path(shard).name != shard or shard in {"", ".", ".."} or "\0" in shard:
            raise BadInput(
                f"{index} names a shard outside of its folder",
                expected="plain file names",
                found=repr(shard),
                hint="do not use this checkpoint: it may have been tampered with",
            )
    return shards


def _indexed(index: Path) -> tuple[dict[str, Path], Path]:
    files = {}
    for shard in index_shards(index):
        if not (index.parent / shard).is_file():
            raise BadInput(
                f"a shard is missing in {index.parent}",
                expected=shard,
                found="no such file",
                hint="fetch or save the checkpoint again",
            )
        files[shard] = index.parent / shard
    return files, index


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(read_limited(index, MAX_HEADER))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("shards must be file names")  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise BadInput(
            f"{index} is not a valid index of shards",
            expected="JSON with weight_map: tensor name to file name",
            found=f"{type(err).__name__}: {err}",
            hint="fetch or save the checkpoint again",
        ) from err
    return dict(weight_map)


def _check_index(index: Path, actual: Mapping[str, str]) -> None:
    listed = _weight_map(index)
    wrong = sorted(
        f"{name}: index {listed.get(name, 'nothing')}, files {actual.get(name, 'nothing')}"
        for name in listed.keys() | actual.keys()
        if listed.get(name) != actual.get(name)
    )
    if wrong:
        raise BadInput(
            f"{index} disagrees with its shards",
            expected="each tensor in the shard that the index names",
            hint="fetch or save the checkpoint again",
            details=wrong,
        )
