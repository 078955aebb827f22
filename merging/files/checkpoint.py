"""Checkpoints: one safetensors file or several shards, memory-mapped tensor by tensor.

Opening reads and checks headers only. Tensors are views of the mapped files and cost no
private memory; callers must not write to them. Names are ordered by their UTF-8 bytes.
The digest is taken over the tensors in that order (name, type, shape, digest of the
bytes), so it depends neither on sharding nor on file names.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.header import DTYPE_NAMES, count_elements, read_header
from restitch.merging.files.mapped_file import MappedFile, map_file
from restitch.merging.files.safe_open import open_regular
from restitch.merging.files.shards import (
    INDEX_SUFFIX,
    SUFFIX,
    check_whole_file,
    choose_shards,
    folders_below,
    index_shards,
    newer_weights,
    weight_map,
)
from restitch.merging.numerics.factors import Factors
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress, ignore

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    """A set of named tensors on disk; make one with `open`.

    Attributes:
        notes: sentences about files that are not read, and about what was inferred.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        locations: Mapping[str, TensorLocation],
        files: Mapping[str, Path],
        maps: Mapping[str, MappedFile],
        shards: Mapping[str, tuple[str, ...]],
        metadata: Mapping[str, Mapping[str, str]],
        index: Path | None = None,
        fetch: Fetch | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.notes = tuple(notes)
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
        self._hashing = threading.Lock()  # a second caller waits for the first one's digest

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open a folder of safetensors or one safetensors file."""
        path = Path(path)
        try:
            files, index, notes = _locate(path)
        except OSError as error:
            raise BadInput(
                f"{path} cannot be read",
                found=error.strerror or str(error),
                hint="check the path and its permissions",
            ) from error
        return cls.from_files(path, files, index, notes=notes)

    @classmethod
    def from_files(
        cls,
        path: Path,
        files: Mapping[str, Path],
        index: Path | None = None,
        fetch: Fetch | None = None,
        notes: Sequence[str] = (),
    ) -> "Checkpoint":
        """Open files as the shards of one checkpoint.

        Args:
            path: the name of the checkpoint in messages.
            files: by shard.
            index: the file that maps tensors to shards, if there is one.
            fetch: called with a tensor's name before its bytes are read, so that it can
                download them then; the headers must be complete from the start.
            notes: sentences about the choice of the files, for the user.
        """
        infos: dict[str, TensorInfo] = {}
        locations: dict[str, TensorLocation] = {}
        maps: dict[str, MappedFile] = {}
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
            maps[shard] = map_file(file, header.size)
        if index is not None:
            _check_index(index, {name: location.shard for name, location in locations.items()})
        return cls(path, infos, locations, files, maps, shards, metadata, index, fetch, notes)

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
            raw = bytearray(source.part(location.start, info.nbytes))
            return torch.frombuffer(raw, dtype=info.dtype).view(info.shape)
        flat = torch.frombuffer(
            source.memory, dtype=info.dtype, count=info.numel, offset=location.start
        )
        return flat.view(info.shape)

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor, mapped."""
        info, location = self._infos[name], self._locations[name]
        if self._fetch is not None:
            self._fetch(name)
        return self._maps[location.shard].part(location.start, info.nbytes)

    def is_known_as(self, other: "Checkpoint", name: str) -> bool:
        """True if a tensor is known to be the other checkpoint's of this name, without reading."""
        return other is self and name in self

    def factors(self, name: str) -> Factors | None:
        """The whole change of a tensor as factors, if the files hold it as such."""
        return None

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
        with self._hashing:
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
        info, location = self._infos[name], self._locations[name]
        if self._fetch is not None:
            self._fetch(name)
        return self._maps[location.shard].digest(location.start, info.nbytes)

    def renamed(
        self, mapping: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> "Checkpoint":
        """The tensors named in `mapping` under their new names; the others are left out.

        Args:
            mapping: new name by old name.
            shapes: by new name, of tensors of which only the first elements are wanted.
        """
        if len(set(mapping.values())) != len(mapping):
            raise ValueError("two tensors cannot have the same new name")
        infos = {new: replace(self._infos[old], name=new) for old, new in mapping.items()}
        for name, shape in (shapes or {}).items():
            infos[name] = replace(infos[name], shape=shape)
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


def _locate(path: Path) -> tuple[dict[str, Path], Path | None, tuple[str, ...]]:
    """The files of a checkpoint by name, its index if it has one, and notes about the choice."""
    if path.is_file():
        check_whole_file(path)
        if not path.name.endswith(INDEX_SUFFIX):
            return {path.name: path}, None, ()
        folder, names = path.parent, [*index_shards(path), path.name]
        names = [name for name in names if (folder / name).is_file()]
    elif path.is_dir():
        folder, names = path, [item.name for item in path.iterdir() if not item.is_dir()]
    else:
        raise BadInput(
            f"{path} does not exist",
            expected="a folder with safetensors, or a .safetensors file",
            found="no file or folder",
            hint="check the path",
        )
    if not any(name.endswith(SUFFIX) for name in names) and (below := folders_below(folder)):
        raise BadInput(
            f"{path} contains no checkpoint, but folders below it do",
            expected="the folder that holds model.safetensors",
            found=shortlist(below[::-1]),
            hint=f"name the folder of one of them, for instance {folder / below[-1]}",
        )
    chosen = choose_shards(str(path), folder, names)
    files = {name: folder / name for name in chosen.names}
    index = None if chosen.index is None else folder / chosen.index
    return files, index, (*chosen.notes, *newer_weights(folder, chosen.names, names))


def _check_index(index: Path, actual: Mapping[str, str]) -> None:
    listed = weight_map(index)
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
