"""A loaded model that follows a line: new versions are applied to it in place.

    follower = Follower("photos")
    with follower.model() as model:      # many threads at once
        answers = model(**inputs)
    follower.refresh()                   # between requests, or in a thread of its own

`refresh` reads the patch of the new version, and finds the weights that differ from those in memory
while requests go on. Then it waits until no thread is inside of `model`, and sets them. So a reader
sees one version from the beginning of its block to the end, and the model has the same bits as one
that was loaded afresh.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinate_codec import differing_positions
from restitch.merging.files.edits import Edits, edited
from restitch.merging.files.sparse import SparseFile
from restitch.merging.numerics.bitwise import as_integers, scatter
from restitch.modeling.families.family import Family, loads_in_any_type
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.weights import apply_edits
from restitch.registry.home import Home, prepare_environment
from restitch.serving.reader_lock import ReaderLock
from restitch.serving.served_version import ServedVersion, read_version
from restitch.serving.version_folder import open_served_base

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_INT32 = 2**31 - 1
_THREADS = 2


@dataclass(frozen=True)
class Refreshed:
    """The outcome of a refresh.

    Attributes:
        version: the version in memory.
        previous: the one before; the same if nothing changed.
        tensors: the number of tensors that changed, and `weights` that of their weights that did.
        patch_bytes: the bytes of the patch that was read.
        seconds: the time of the whole refresh; `pause` is the part in which readers waited.
    """

    version: int
    previous: int
    tensors: int = 0
    weights: int = 0
    patch_bytes: int = 0
    seconds: float = 0.0
    pause: float = 0.0


class Follower:
    """A merged version as a loaded model, which follows the line.

    Args:
        line: the line's name, in the store that `RESTITCH_HOME` or `RESTITCH_STORE` names.
        alias: `champion` or `candidate`.
        device: where the model is; by default on the CPU.
        dtype: the type of the weights: float32 or bfloat16; by default bfloat16 if all weights of
            the base have this type and the family can load it, and float32 otherwise.

    Raises:
        BadInput: there is no such line or version, its versions are adapters, or the base cannot
            be read.
        Damage: the patch is damaged.
        Unavailable: the store cannot be reached, and there is no copy of the version here.
    """

    def __init__(
        self,
        line: str,
        *,
        alias: Literal["champion", "candidate"] = "champion",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.line = line
        self.alias = alias
        self._home = Home.from_environment()
        prepare_environment(self._home)
        self._lock, self._refreshing = ReaderLock(), threading.Lock()
        self._version = read_version(self._home, line, alias)
        if self._version.space is not None:
            raise BadInput(
                f"the versions of line {line} are adapters, and no follower sets these in place",
                expected="a line that merges weights",
                found="space: adapter",
                hint=f"use `restitch follow {line} FOLDER`, and load the adapter again",
            )
        patch = _open_patch(self._version)
        base = open_served_base(self._version)
        self._base = base.checkpoint
        given = _given_type(base.family, base.checkpoint, dtype)
        loaded = base.family.load(base.folder, *given).to(device)
        self._model = _shown(loaded, base.family)
        self._parameters = base.family.parameters(loaded)
        apply_edits(self._parameters, self._base, patch)
        self._edits = _digests(patch)

    @property
    def version(self) -> ServedVersion:
        """The version in memory, with its number, its tasks and the time when it was made."""
        return self._version

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The model, which does not change inside of the block; many threads may be in one.

        It is the model of transformers, or what the family of another package loads. In a family
        whose tasks have heads of their own it is the model without a head. Do not keep it after the
        block, and do not call `refresh` inside.
        """
        with self._lock.reading():
            yield self._model

    def refresh(self) -> Refreshed:
        """Bring the model to the newest version of the alias, if it is not there yet.

        If the store cannot be reached, or the patch is damaged, the model stays as it is.

        Raises:
            BadInput: the line does not exist any more, or has another base.
            Damage: the patch is damaged.
            Unavailable: the patch cannot be read.
        """
        with self._refreshing:
            return self._refresh()

    def _refresh(self) -> Refreshed:
        started = time.monotonic()
        old, new = self._version, read_version(self._home, self.line, self.alias)
        if new.record == old.record:
            return Refreshed(old.version, old.version, seconds=time.monotonic() - started)
        if (new.base.weights, new.base.config) != (old.base.weights, old.base.config):
            raise BadInput(
                f"{new.name} has another base than {old.name}, which is in memory",
                expected=old.base.weights,
                found=new.base.weights,
                hint="make a new Follower",
            )
        patch = _open_patch(new)
        after = _digests(patch)
        changed = sorted(
            name
            for name in self._edits.keys() | after.keys()
            if self._edits.get(name) != after.get(name)
        )
        changes = self._changes(patch, changed)
        with self._lock.writing():
            stopped = time.monotonic()
            try:
                _set(changes)
            except BaseException:  # such as an interrupt: nobody may see a half of it
                _set(changes)
                raise
            finally:
                self._version, self._edits = new, after
            ended = time.monotonic()
        return Refreshed(
            new.version,
            old.version,
            len(changes),
            sum(change.values.numel() for change in changes),
            patch.path.stat().st_size,
            ended - started,
            ended - stopped,
        )

    def _changes(self, patch: SparseFile, names: list[str]) -> list["_Change"]:
        """What a patch changes in the live tensors of some names."""

        def change(name: str) -> _Change | None:
            return _change(self._parameters[name], self._base, patch, name)

        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            return [found for found in pool.map(change, names) if found is not None]


@dataclass(frozen=True)
class _Change:
    """New weights of a live tensor: those at some places, or all."""

    live: Tensor
    places: Tensor | None
    values: Tensor


def _change(live: Tensor, base: Checkpoint, edits: Edits, name: str) -> _Change | None:
    """What differs between a live tensor and the base with the edits; None if nothing does."""
    after = edited(base, edits, name).to(live.dtype).to(live.device)
    if not live.is_contiguous():
        return _Change(live, None, after)
    places = _differing(live.detach().view(-1), after.view(-1))
    if not places.numel():
        return None
    if live.numel() <= _MOST_INT32:
        places = places.int()
    size = places.dtype.itemsize + live.dtype.itemsize
    if places.numel() * size >= live.numel() * live.dtype.itemsize:
        return _Change(live, None, after)
    return _Change(live, places, after.view(-1)[places])


def _differing(live: Tensor, after: Tensor) -> Tensor:
    """The places at which the bits of two flat tensors differ."""
    if live.device.type == "cpu":
        return torch.from_numpy(differing_positions(as_integers(live), as_integers(after)))
    bits = _INTEGERS[live.dtype.itemsize]
    return (after.view(bits) != live.view(bits)).nonzero().view(-1)


def _set(changes: list[_Change]) -> None:
    with torch.no_grad(), ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for _ in pool.map(_set_one, changes):
            pass


def _set_one(change: _Change) -> None:
    live, places = change.live.detach(), change.places
    if places is None:
        live.copy_(change.values)
    elif live.device.type == "cpu":
        scatter(live.view(-1), places.numpy(), change.values)
    else:
        live.view(-1)[places] = change.values


def _shown(loaded: nn.Module, family: Family) -> nn.Module:
    """The model that readers get: of transformers, without a head that no task has."""
    if not isinstance(loaded, NamedModel):
        return loaded
    model: nn.Module = loaded.inner if family.task_heads is None else loaded.inner.base_model
    return model


def _open_patch(version: ServedVersion) -> SparseFile:
    """The patch of a version, verified.

    Raises:
        Damage: it is missing or damaged.
        Unavailable: the store cannot be reached.
    """
    return SparseFile.open(version.open_store().blob_path(version.patch))


def _digests(patch: SparseFile) -> Mapping[str, str]:
    return {name: patch.tensor_digest(name) for name in patch.names}


def _given_type(
    family: Family, base: Checkpoint, dtype: torch.dtype | None
) -> tuple[torch.dtype, ...]:
    """The type to load the weights in; nothing for a family that has no choice.

    Raises:
        BadInput: the family cannot load this type.
    """
    choice = loads_in_any_type(family)
    if dtype is None:
        stored = {base.info(name).dtype for name in base.floating}
        dtype = torch.bfloat16 if choice and stored == {torch.bfloat16} else torch.float32
    if dtype not in (torch.float32, torch.bfloat16) or (dtype != torch.float32 and not choice):
        raise BadInput(
            f"the family {family.name} cannot load weights as {dtype}",
            expected="float32 or bfloat16" if choice else "float32",
            found=dtype,
            hint="leave dtype out",
        )
    return (dtype,) if choice else ()
