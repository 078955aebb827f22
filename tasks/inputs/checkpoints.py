"""Opened models: the base of a line, finetuned checkpoints, and the live base in memory.

What is opened is checked against the digest that was recorded when it was registered, so
a folder that changed since is an error and never a wrong result. The live base is loaded
once per process; other weights are put onto it for the length of a context and the base's
own are put back by copying, so nothing drifts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from restitch.merging.digests import digest_file, digest_json
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.experts.files import open_expert
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import Comparison, compare
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.files.edits import Edits
from restitch.merging.files.sparse import SparseFile
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.weights import apply_edits, restore, set_weights
from restitch.registry.ledger.line_state import ModelRef
from restitch.registry.sources.resolve import copy_into_store, resolve_source
from restitch.registry.specs.line import LineSpec
from restitch.tasks.inputs.remote_weights import list_remote, remote_checkpoint
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace

# Larger than any vocabulary; a sparse file of a terabyte costs whoever sends it nothing.
MOST_ASSET = 1 << 28

# Name, number, size and time of each file. Not ctime: another name for a file changes it too.
_State = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Base:
    """The base of a line, opened.

    Attributes:
        names: the localizable tensors, sorted.
    """

    ref: ModelRef
    folder: Path
    checkpoint: Checkpoint
    family: Family
    names: tuple[str, ...]


def open_base(line: LineRef, space: Workspace) -> Base:
    """Open and verify the base of a line."""
    family = get_family(line.spec.family)
    folder, checkpoint = open_model(line.base, space, family, whole=True)
    choice = line.spec.localize
    names = select_tensors(checkpoint.floating, family.localizable, choice.include, choice.exclude)
    return Base(line.base, folder, checkpoint, family, tuple(names))


def describe_model(
    source: str, family: Family, space: Workspace, *, copy: bool = False, whole: bool = False
) -> ModelRef:
    """Resolve a source and take the digests that it will be known by.

    A local model is used in place while the store is a folder beside it, and is copied into the
    store otherwise: other hosts do not have its folder. What a bucket, the hub or MLflow holds
    is read there, pinned or kept already, and not copied.

    Args:
        source: where the model is; see `restitch.registry.sources.resolve.resolve_source`.
        family: what it is read as.
        space: where it is copied to.
        copy: copy a local model in any case, and one in a bucket.
        whole: it will be used whole, as a base is.

    Raises:
        BadInput: it is not there or is no usable checkpoint.
        Unavailable: a server that holds it is away.
    """
    resolved = resolve_source(source, space.home, whole=whole or copy)
    local = resolved.local
    with unchanged(local), working("reading the model"):
        remote = resolved.remote is not None
        checkpoint = list_remote(resolved, space) if remote else Checkpoint.open(local)
        weights, config = checkpoint.digest(), assets_digest(family, local)
        here = resolved.kind == "path" and not space.home.store_is_local
        if here or (copy and resolved.kind in ("path", "s3")):
            with working("copying the model into the store"):
                resolved = copy_into_store(resolved, space.home)
        if assets_digest(family, local) != config:
            raise _changed(local)
    return ModelRef(uri=resolved.uri, weights=weights, config=config, size=checkpoint.nbytes)


def assets_digest(family: Family, folder: Path) -> str:
    """The digest of a model folder's configuration, tokenizer and processor files.

    Raises:
        BadInput: one of them is larger than any honest one.
    """
    if not folder.is_dir():
        return digest_json({})
    names = family.asset_files(folder)
    for name in names:
        size = (folder / name).stat().st_size
        if size > MOST_ASSET:
            raise BadInput(
                f"{folder / name} is too large",
                expected=f"at most {MOST_ASSET:,} bytes of configuration or vocabulary",
                found=f"{size:,} bytes",
                hint="does it belong to this model?",
            )
    return digest_json({name: digest_file(folder / name) for name in names})


def open_model(
    ref: ModelRef,
    space: Workspace,
    family: Family,
    *,
    like: Checkpoint | None = None,
    whole: bool = False,
) -> tuple[Path, Checkpoint]:
    """Open a recorded model and make sure that it is still what was recorded.

    Args:
        ref: the model.
        space: where it is read.
        family: what it is read as.
        like: the base, which may have some of the same tensors.
        whole: its folder must hold all of it; otherwise weights in a bucket stay there, and
            the checkpoint fetches what is looked at.

    Raises:
        BadInput: it is gone or has changed.
    """
    local, checkpoint = _open_weights(ref.uri, ref.weights, space, like, whole=whole)
    found = assets_digest(family, local)
    if found != ref.config:
        raise BadInput(
            f"the configuration files of {ref.uri} changed since it was registered",
            expected=f"files of digest {ref.config[:12]}",
            found=found[:12],
            hint="put the files back, or register the changed model as a new version",
        )
    return local, checkpoint


def _open_weights(
    uri: str, weights: str, space: Workspace, like: Checkpoint | None, *, whole: bool = False
) -> tuple[Path, Checkpoint]:
    source = resolve_source(uri, space.home, whole=whole)
    if source.remote is not None:
        return source.local, remote_checkpoint(source, space, weights, like)
    return source.local, _verified(source.local, _state(source.local), weights)


@lru_cache(maxsize=16)
def _verified(local: Path, _state: _State, weights: str) -> Checkpoint:
    checkpoint = Checkpoint.open(local)
    found = checkpoint.digest()
    if found != weights:
        raise BadInput(
            f"the weights in {local} changed since they were registered",
            expected=f"digest {weights[:12]}",
            found=found[:12],
            hint="put the files back, or register the changed model as a new version",
        )
    return checkpoint


def _state(local: Path) -> _State:
    files = sorted(local.glob("*.safetensors*")) if local.is_dir() else [local]
    found = [(str(file), file.stat()) for file in files if file.exists()]
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found)


@contextmanager
def unchanged(local: Path) -> Iterator[None]:
    """Make sure that the weights which a block reads are the same before and after it.

    Weights are mapped: what is written to their file shows in what is computed from them.

    Raises:
        BadInput: they were written to, replaced or removed meanwhile.
    """
    before = _state(local)
    yield
    if _state(local) != before:
        raise _changed(local)


def _changed(local: Path) -> BadInput:
    return BadInput(
        f"{local} changed while it was read",
        expected="files that nobody writes to",
        hint="register it again when it is whole",
    )


def line_up(base: Base, finetuned: Checkpoint) -> Comparison:
    """Compare a finetuned checkpoint with the base by the family's rules."""
    return compare(base.checkpoint, finetuned, base.names, base.family.prefixes)


@contextmanager
def memory_explained(doing: str, expected: str, hint: str = "") -> Iterator[None]:
    """Tell what to do where a GPU's memory is not enough for what is done in the block.

    Args:
        doing: what that is.
        expected: what has to fit.
        hint: what helps beside another device.

    Raises:
        Unavailable: it is not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Unavailable(
            f"the GPU's memory is not enough to {doing}",
            expected=expected,
            found=str(error).splitlines()[0],
            hint=f"use a worker with a larger GPU or RESTITCH_DEVICE=cpu{hint}",
        ) from error


def device() -> torch.device:
    """The worker's device: `RESTITCH_DEVICE`, by default CUDA where there is one.

    Raises:
        BadInput: the variable names a device that is not here.
    """
    wanted = os.environ.get("RESTITCH_DEVICE", "auto")
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(wanted)
    except RuntimeError as error:
        raise BadInput(
            f"RESTITCH_DEVICE={wanted!r} is no device",
            expected="auto, cpu, cuda or cuda:N",
            hint="correct or unset it",
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            f"RESTITCH_DEVICE={wanted!r}, but there is no CUDA here",
            hint="set it to auto or cpu, or run on a worker with a GPU",
        )
    return chosen


def check_device(line: LineSpec) -> None:
    """Refuse to work on a line that asks for another device than this worker's.

    Raises:
        Unavailable: it does.
    """
    here = device().type
    if line.require_device not in (None, here):
        raise Unavailable(
            f"line {line.line} is worked on with {line.require_device} only",
            found=f"{here} here",
            hint=f"run `restitch remerge {line.line}` on a worker that has it",
        )


class LiveBase:
    """The base as a loaded model on the worker's device.

    Attributes:
        parameters: the live tensors by the base's tensor names.
    """

    def __init__(self, base: Base, on: torch.device) -> None:
        self.base = base
        self.device = on
        self.model = base.family.load(base.folder).to(on)
        self.parameters = base.family.parameters(self.model)

    @contextmanager
    def wearing(self, weights: WeightsRef, space: Workspace) -> Iterator[torch.nn.Module]:
        """The model with other weights; the base's are back afterwards, bit for bit."""
        touched = self._put_on(weights, space)
        try:
            yield self.model
        finally:
            restore(self.parameters, self.base.checkpoint, touched)

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[torch.nn.Module]:
        """The model with edits applied; the base's weights are back afterwards, bit for bit."""
        try:
            apply_edits(self.parameters, self.base.checkpoint, edits)
            yield self.model
        finally:
            restore(self.parameters, self.base.checkpoint, edits.names)

    def _put_on(self, weights: WeightsRef, space: Workspace) -> list[str]:
        if weights.kind == "base":
            return []
        if weights.kind in ("grafted", "merged", "expert"):
            open_weights = open_specialist if weights.kind == "expert" else open_sparse
            edits = open_weights(weights.identity, space, self.base.checkpoint)
            apply_edits(self.parameters, self.base.checkpoint, edits)
            return list(edits.names)
        base = self.base.checkpoint
        local, checkpoint = _open_weights(weights.uri, weights.identity, space, base)
        with unchanged(local):
            finetuned = aligned(self.base, checkpoint)
            names = [n for n in finetuned.names if n in self.parameters]
            if weights.kind == "localizable":
                names = [n for n in names if n in frozenset(self.base.names)]
            set_weights(self.parameters, ((n, finetuned.tensor(n)) for n in names))
        return names


def open_sparse(blob: str, space: Workspace, base: Checkpoint) -> Edits:
    """What a delta or a patch makes of the base.

    Raises:
        Damage: it is missing or altered.
    """
    return SparseFile.open(space.objects.blob_path(blob), base)


def open_specialist(blob: str, space: Workspace, base: Checkpoint | None = None) -> Edits:
    """What the mask of a specialist, or a patch of its own, makes of the base.

    Raises:
        Damage: it, or the patch that a mask selects from, is missing or altered.
    """
    return open_expert(space.objects.blob_path(blob), space.objects.blob_path, base)


@contextmanager
def open_vector(
    line: LineRef, model: ModelRef, space: Workspace
) -> Iterator[tuple[Base, TaskVector]]:
    """The base and a model's task vector over the localizable tensors, for the length of a block.

    Raises:
        BadInput: a model is gone, or changed since it was registered or while it was read.
    """
    base = open_base(line, space)
    folder = resolve_source(model.uri, space.home, whole=False).local
    # What is verified at the beginning is what is read to the end.
    with unchanged(folder), unchanged(base.folder):
        base = open_base(line, space)
        _, checkpoint = open_model(model, space, base.family, like=base.checkpoint)
        yield base, TaskVector(base.checkpoint, aligned(base, checkpoint), base.names)


def aligned(base: Base, finetuned: Checkpoint) -> Checkpoint:
    """A finetuned checkpoint under the base's tensor names."""
    return finetuned.renamed(line_up(base, finetuned).mapping)


_live: dict[tuple[str, str, str], LiveBase] = {}


def live_base(base: Base) -> LiveBase:
    """The loaded base; one at a time is kept in memory."""
    on = device()
    key = (base.ref.weights, base.ref.config, str(on))
    if key not in _live:
        _live.clear()
        _live[key] = LiveBase(base, on)
    return _live[key]
