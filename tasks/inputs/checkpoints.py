"""Open models: the base of a line, finetuned checkpoints, and what was made from them.

Every model is checked against its registered digest when it is opened, so a folder that has
changed is an error and never a wrong result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.adapters.vectors import VectorEdits, VectorSpace
from restitch.merging.errors import BadInput
from restitch.merging.experts.files import open_expert
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import Comparison, compare
from restitch.merging.files.coordinates import Selection, select_tensors
from restitch.merging.files.delta import open_delta
from restitch.merging.files.edits import Edits
from restitch.merging.files.plain_weights import check_plain
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.configs import check_not_quantized, vocabulary_size
from restitch.modeling.device import device as device
from restitch.modeling.families.family import (
    Family,
    get_family,
    loads_in_any_type,
)
from restitch.modeling.family_choice import check_base
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.sources.resolve import copy_into_store, resolve_source
from restitch.registry.sources.vectors import ones_of, vector_space
from restitch.registry.sources.verified import (
    State,
    check_assets,
    check_weights,
    opened,
    state_of,
    verified_weights,
)
from restitch.registry.sources.verified import assets_digest as digest_of_files
from restitch.registry.specs.line import Compute, ComputeType
from restitch.tasks.inputs.adapter_vectors import vectors_of
from restitch.tasks.inputs.adapters import (
    check_same_base,
    is_adapter,
    open_adapter,
    whole_folder,
)
from restitch.tasks.inputs.remote_weights import list_remote, remote_checkpoint
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace


@dataclass(frozen=True)
class Base:
    """The base of a line, opened.

    Attributes:
        checkpoint: the tensors that are merged: the weights, or the vectors of a line with a space.
        names: the localizable tensors, sorted.
        selection: the globs that chose them.
        compute: the line's key, the type of the weights of a live model.
        heads: the tensors of its own head, in a family whose tasks have heads of their own.
        space: of the vectors of adapters, if the line merges these.
    """

    ref: ModelRef
    folder: Path
    checkpoint: Checkpoint
    family: Family
    names: tuple[str, ...]
    selection: Selection
    compute: Compute = "auto"
    heads: frozenset[str] = frozenset()
    space: VectorSpace | None = None

    @property
    def weights(self) -> Checkpoint:
        """The weights of the model itself."""
        return self.checkpoint if self.space is None else self.space.weights

    def on_weights(self, edits: Edits) -> Edits:
        """Edits of the merged tensors as edits of the weights."""
        return edits if self.space is None else VectorEdits(self.space, self.checkpoint, edits)

    @property
    def compute_type(self) -> ComputeType:
        """The type of the weights of a live model on this worker."""
        if self.compute != "auto":
            return self.compute
        if not self._is_in_bfloat16 or device().type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"

    def in_each_type(self) -> tuple["Base", ...]:
        """The base with each type that workers of the line compute in, this worker's first.

        What one worker measured counts for all of them. With `auto`, one with a GPU may have
        measured it in another type.
        """
        if self.compute != "auto":
            return (self,)
        types: list[ComputeType] = [self.compute_type]
        if self._is_in_bfloat16:
            types += ["float32" if types == ["bfloat16"] else "bfloat16"]
        return tuple(replace(self, compute=one) for one in types)

    @cached_property
    def vocabulary(self) -> int | None:
        """The number of tokens that it has embeddings of; None if it reads no texts."""
        return vocabulary_size(self.folder) if self.family.modality == "text" else None

    @property
    def _is_in_bfloat16(self) -> bool:
        """True if bfloat16 loses nothing of the base's weights, and the family can load it."""
        infos = map(self.weights.info, self.weights.floating)
        stored = all(info.dtype == torch.bfloat16 for info in infos)
        return stored and loads_in_any_type(self.family)


def open_base(line: LineRef, space: Workspace) -> Base:
    """Open and verify the base of a line."""
    family = get_family(line.spec.family)
    folder, checkpoint = open_model(line.base, space, family, whole=True)
    choice = line.spec.localize
    heads = frozenset(
        family.task_heads.tensors(folder, checkpoint.names) if family.task_heads else ()
    )
    vectors, globs = None, family.localizable
    if line.spec.space is not None:
        assert line.spec.space != "adapter", "`init` names the modules"
        vectors, globs = vector_space(line.spec.space, checkpoint, line.base.uri), ("*",)
        checkpoint = ones_of(vectors, space.home)
    names = select_tensors(
        [name for name in checkpoint.floating if name not in heads],
        globs,
        choice.include,
        choice.exclude,
    )
    selection = Selection(globs, choice.include, choice.exclude)
    return Base(
        line.base,
        folder,
        checkpoint,
        family,
        tuple(names),
        selection,
        line.spec.compute,
        heads,
        vectors,
    )


def describe_model(
    source: str,
    family: Family,
    space: Workspace,
    *,
    line: LineRef | None = None,
    copy: bool = False,
    whole: bool = False,
) -> ModelRef:
    """Resolve a source and compute the digests that identify the model.

    A local model is used in place if the store is a local folder, and copied into the store
    otherwise: other hosts do not have its folder. Models in a bucket, on the hub or in MLflow are
    read there.

    Args:
        source: the place of the model; see `registry.sources.resolve`.
        family: the family that it belongs to.
        space: the workspace to copy it into.
        line: the line of a finetuned model, on whose base an adapter is read.
        copy: copy a local model in any case, and one in a bucket.
        whole: it is a base: fetch the whole model, and check that the family takes it.

    Raises:
        BadInput: the model is missing, not a usable checkpoint, or a base of another family.
        Unavailable: its server cannot be reached.
    """

    def readable(local: Path, where: str) -> Checkpoint:
        return _readable(local, where, line, space)

    resolved = resolve_source(source, space.home, whole=whole or copy, check=readable)
    local = resolved.local
    with unchanged(local), working("reading the model"):
        if resolved.remote is None:
            checkpoint = readable(local, resolved.uri)
            if resolved.kind == "s3" and isinstance(checkpoint, AdapterCheckpoint):
                space.objects.put_blob(checkpoint.listing())
        else:
            check_not_quantized(local, resolved.uri)
            checkpoint = list_remote(resolved, space)
        if whole:
            check_base(family, local, resolved.uri)
        if line is not None and line.spec.space is not None:
            vectors_of(checkpoint, open_base(line, space).checkpoint, resolved.uri)
        weights, config = checkpoint.digest(), assets_digest(family, local)
        here = resolved.kind == "path" and not space.home.store_is_local
        if here or (copy and resolved.kind in ("path", "s3")):
            with working("copying the model into the store"):
                resolved = copy_into_store(resolved, space.home)
        if assets_digest(family, local) != config:
            raise _changed(local)
    size = checkpoint.size if isinstance(checkpoint, AdapterCheckpoint) else checkpoint.nbytes
    return ModelRef(uri=resolved.uri, weights=weights, config=config, size=size)


def _readable(local: Path, where: str, line: LineRef | None, space: Workspace) -> Checkpoint:
    """Open a model that is not registered yet, and check that its weights can be merged.

    Args:
        local: its folder or file.
        where: its name in messages.
        line: the line of a finetuned model.
        space: the workspace with the base of the line.

    Raises:
        BadInput: it is no checkpoint, an adapter that does not fit the base or has none, or
            quantized.
    """
    try:
        if line is not None and is_adapter(local):
            base = open_base(line, space)
            adapter = _adapter(
                local, state_of(local), where, base.weights, base.ref, base.family.prefixes
            )
            adapter.check_finite(where)
            check_same_base(adapter, base.ref, where)
            return adapter
        if local.is_dir():
            check_not_quantized(local, where)
        checkpoint = opened(local)
        check_plain(checkpoint, where)
    except BadInput as error:
        raise error.renamed(str(local), where) from error
    return checkpoint


def list_again(uri: str, line: LineRef, space: Workspace) -> bytes:
    """The listing of a registered model in a bucket, read again.

    Raises:
        BadInput: it does not exist any more, or cannot be read.
        Unavailable: the bucket cannot be read.
    """
    source = resolve_source(uri, space.home, whole=False)
    if source.remote is None:
        return _readable(source.local, uri, line, space).listing()
    return list_remote(source, space).listing()


def assets_digest(family: Family, folder: Path) -> str:
    """The digest of a model folder's configuration, tokenizer and processor files.

    Raises:
        BadInput: one of them is too large.
    """
    return digest_of_files(folder, family.asset_files(folder) if folder.is_dir() else ())


def open_model(
    ref: ModelRef,
    space: Workspace,
    family: Family,
    *,
    base: Base | None = None,
    whole: bool = False,
) -> tuple[Path, Checkpoint]:
    """Open a registered model and check it against its digests.

    Args:
        ref: the model.
        space: the workspace.
        family: the family that it belongs to.
        base: the base of a finetuned model, which may share some of the tensors, and on which an
            adapter is read.
        whole: fetch the whole model; otherwise weights in a bucket stay there, and the checkpoint
            fetches tensors when they are read.

    Returns:
        A folder with its configuration, or its file, and its weights.

    Raises:
        BadInput: the model is missing or has changed.
    """
    local, checkpoint = open_weights(ref.uri, ref.weights, space, base, whole=whole)
    check_assets(ref, assets_digest(family, local))
    if base is not None and isinstance(checkpoint, AdapterCheckpoint):
        local = whole_folder(local, checkpoint, family, base.folder, space.home)
    if base is not None and base.space is not None:
        checkpoint = vectors_of(checkpoint, base.checkpoint, ref.uri)
    return local, checkpoint


def open_weights(
    uri: str, weights: str, space: Workspace, base: Base | None, *, whole: bool = False
) -> tuple[Path, Checkpoint]:
    """Open the weights of a model and check their digest; the other files are not looked at.

    Args:
        uri: its address.
        weights: the digest of its weights.
        space: the workspace.
        base: the base of a finetuned model, as in `open_model`.
        whole: fetch the whole model.

    Raises:
        BadInput: the model is missing or has changed.
    """
    source = resolve_source(uri, space.home, whole=whole)
    local = source.local
    if source.remote is not None:
        like = None if base is None else base.weights
        return local, remote_checkpoint(source, space, weights, like)
    if base is not None and is_adapter(local):
        adapter = _adapter(
            local, state_of(local), uri, base.weights, base.ref, base.family.prefixes
        )
        check_weights(adapter, local, weights)
        return local, adapter
    return local, verified_weights(local, weights)


@lru_cache(maxsize=16)
def _adapter(
    local: Path,
    _state: State,
    where: str,
    base: Checkpoint,
    ref: ModelRef,
    prefixes: tuple[str, ...],
) -> AdapterCheckpoint:
    return open_adapter(local, where, base, ref, prefixes)


@contextmanager
def unchanged(local: Path) -> Iterator[None]:
    """Check that the weights a block reads did not change meanwhile.

    Weights are memory-mapped: a change of the file would change the result.

    Raises:
        BadInput: the files were written to, replaced or removed.
    """
    before = state_of(local)
    yield
    if state_of(local) != before:
        raise _changed(local)


def _changed(local: Path) -> BadInput:
    return BadInput(
        f"{local} changed while it was read",
        expected="files that nothing writes to",
        hint="register the model again when it is complete",
    )


def line_up(base: Base, finetuned: Checkpoint) -> Comparison:
    """Compare a finetuned checkpoint with the base, without its own head, by the family's rules."""
    names = [name for name in base.checkpoint.names if name not in base.heads]
    whole = (
        base.checkpoint.renamed({name: name for name in names}) if base.heads else base.checkpoint
    )
    rules = base.family.prefixes, base.selection.matches, base.vocabulary
    return compare(whole, finetuned, base.names, *rules)


def open_sparse(blob: str, space: Workspace, base: Checkpoint) -> Edits:
    """Open the edits of a delta or a patch.

    Raises:
        Damage: the file is missing or altered.
    """
    return open_delta(space.objects.blob_path(blob), base)


def open_specialist(blob: str, space: Workspace, base: Checkpoint | None = None) -> Edits:
    """Open the edits of a specialist: a mask over a shared patch, or a patch of its own.

    Raises:
        Damage: the mask or the patch is missing or altered.
    """
    return open_expert(space.objects.blob_path(blob), space.objects.blob_path, base)


@contextmanager
def open_vector(
    line: LineRef, model: ModelRef, space: Workspace
) -> Iterator[tuple[Base, TaskVector]]:
    """The base and a model's task vector over the localizable tensors, within a block.

    Raises:
        BadInput: a model is missing, or changed after its registration or while it was read.
    """
    base = open_base(line, space)
    folder = resolve_source(model.uri, space.home, whole=False).local
    # Opened again inside: the files must not change between the check and the end of the block.
    with unchanged(folder), unchanged(base.folder):
        base = open_base(line, space)
        _, checkpoint = open_model(model, space, base.family, base=base)
        yield base, TaskVector(base.checkpoint, aligned(base, checkpoint), base.names)


def aligned(base: Base, finetuned: Checkpoint) -> Checkpoint:
    """A finetuned checkpoint under the base's tensor names."""
    return line_up(base, finetuned).aligned(finetuned)
