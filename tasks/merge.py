"""Make a merged model, a pure function of its recipe, and store it as a patch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from restitch.merging.digests import digest_json
from restitch.merging.errors import Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import open_delta
from restitch.merging.files.edits import Edits, edited
from restitch.merging.files.factor_file import FactorFile
from restitch.merging.files.sparse import SparseFile, SparseInfo, join_sparse, write_sparse
from restitch.merging.methods.registry import get_method
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.recipe import Recipe, RecipeBase, RecipeMember, RecipeMethod
from restitch.merging.rules.per_matrix import computing_on
from restitch.merging.rules.stitch import VERSION as STITCHING_VERSION
from restitch.merging.rules.stitch import DeltaMember, split_names, write_patch
from restitch.merging.statistics.statistic_file import open_statistic
from restitch.modeling.device import device
from restitch.registry.ledger.finetuned_models import Member, ModelRef
from restitch.registry.specs.line import LineSpec
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import memory_explained
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, PatchRef
from restitch.tasks.runtime.sharing import Work, part_size, sharing, stored
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace
from restitch.tasks.statistics import known_statistics, statistic_inputs, statistics


def make_recipe(line: LineRef, members: tuple[Member, ...]) -> Recipe:
    """The recipe of the merged model of these members.

    Statistics that the line's method needs are measured if they are not in the store.

    Raises:
        BadInput: a task lacks the rows to measure them.
    """
    measured = statistics(line, members)
    return _recipe(line, members, {name: ref.blob for name, ref in measured.items()})


def known_recipe(line: LineRef, members: tuple[Member, ...]) -> Recipe | None:
    """The recipe if all statistics are in the store; None otherwise."""
    other = known_statistics(line, members)
    return None if other is None else _recipe(line, members, other)


def recipe_inputs(line: LineRef, members: tuple[Member, ...]) -> str:
    """The digest of all that determines the recipe, without measuring any statistics.

    Raises:
        BadInput: a task lacks the rows that the method needs.
    """
    return _recipe(line, members, statistic_inputs(line, members)).digest()


def _recipe(line: LineRef, members: tuple[Member, ...], other: Mapping[str, str]) -> Recipe:
    settings = line.spec.method.settings
    method = get_method(line.spec.method.name)
    return Recipe(
        base=RecipeBase(line.base.weights, line.base.config),
        family=line.spec.family,
        method=RecipeMethod(method.name, method.version, settings),
        members=tuple(_recipe_member(member) for member in members),
        code=STITCHING_VERSION,
        other=other,
    )


def _recipe_member(member: Member) -> RecipeMember:
    mask, delta = member.model.mask, member.model.delta
    assert mask is not None, "a member has been localized"
    assert delta is not None, "a member has been localized"
    return RecipeMember(task=member.task, model=member.model.model.weights, mask=mask, delta=delta)


@step("stitch")
def stitch(line: LineRef, recipe: Recipe, again: bool = False) -> PatchRef | Cached[PatchRef]:
    """The patch of a recipe, from the store or made from the members' deltas.

    `again` makes it even if it is in the store, and compares.

    Raises:
        Damage: the stored patch differs from the one that the recipe gives.
    """
    space = workspace()
    key = recipe.digest()
    record = space.objects.lookup("patch", key)
    if record is not None and not again:
        return Cached(PatchRef(record.blob, int(str(record.facts["kept"])), record.size, key))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / "patch.safetensors"
        if record is None:
            info = _write_shared(file, line, recipe, space)
        else:
            info = write_patch_of(file, line, recipe, space, record.blob)
        blob = space.objects.put_blob(file, move=True, digest=info.digest)
    if record is not None and record.blob != blob and is_reproducible(recipe, record, space):
        raise Damage(
            f"the stored patch of recipe {key[:12]} differs from the one that the recipe gives",
            expected=blob,
            found=record.blob,
            hint="restore the store from a backup, and find out what altered it",
        )
    won = space.objects.publish(
        "patch",
        key,
        blob,
        made_by(),
        required_fingerprint(recipe, space),
        facts={"kept": info.kept},
    )
    return PatchRef(won.blob, info.kept, won.size, key, round(time.perf_counter() - began, 3))


class PatchParts:
    """The parts of a recipe's patch, by ranges of tensors.

    A small model has one part. The parts of a large one are kept in the store until the patch is
    there and `restitch gc` removes them, so that no process makes them twice.

    Attributes:
        work: the parts as work that workers can share.
    """

    kind = "stitch"

    def __init__(self, line: LineRef, recipe: Recipe, limit: int, space: Workspace) -> None:
        self.recipe, self.space = recipe, space
        self.base = open_base(line, space)
        self.edits = recipe_edits(self.base, recipe, space)
        self.ranges = split_names(self.base.checkpoint, self.edits.names, limit)
        # Parts of before have no packed values.
        origin = [recipe.digest(), required_fingerprint(recipe, space), "packed"]
        self.work = Work(
            line=line.spec.line,
            kind=self.kind,
            content={
                "spec": line.spec.to_json(),
                "base": line.base.to_json(),
                "recipe": recipe.to_json(),
                "limit": limit,
            },
            results="part",
            keys=tuple(digest_json([*origin, names]) for names in self.ranges),
        )

    @classmethod
    def of(cls, content: Mapping[str, Any], space: Workspace) -> "PatchParts":
        """The parts of the work that another process offers."""
        spec, base = LineSpec.from_json(content["spec"]), ModelRef.model_validate(content["base"])
        recipe = Recipe.from_json(content["recipe"])
        return cls(LineRef(spec, base), recipe, content["limit"], space)

    def do(self, number: int) -> str:
        """Make a part, unless it is in the store; return its digest."""
        return stitch_part(self, number, f"{number + 1} of {len(self.ranges)}")

    def write(self, file: Path, number: int | None = None) -> SparseInfo:
        """Write a part, or the whole patch, to a file."""
        metadata = {"base": self.base.ref.weights, "recipe": self.recipe.digest()}
        names, title = None, "stitching"
        if number is not None:
            metadata, names = {**metadata, "part": self.work.keys[number]}, self.ranges[number]
            title = f"stitching part {number + 1} of {len(self.ranges)}"
        action = f"merge by {self.recipe.method.name}"
        room = "room for one matrix of every member and intermediate results"
        with memory_explained(action, room), working(title) as progress:
            return write_patch(
                file,
                self.base.checkpoint,
                self.edits,
                metadata=metadata,
                progress=progress,
                names=names,
                packed=True,
            )

    def join(self, file: Path, parts: Sequence[str]) -> SparseInfo:
        """Write the patch from the digests of its parts, with the bytes of `write`."""
        opened = [SparseFile.open(self.space.objects.blob_path(part)) for part in parts]
        metadata = {"base": self.base.ref.weights, "recipe": self.recipe.digest()}
        return join_sparse(file, opened, kind="patch", metadata=metadata)


@step("stitch part", "stitch part {title}")
def stitch_part(parts: PatchParts, number: int, title: str) -> str | Cached[str]:
    """The digest of a part of a patch, from the store or made now."""
    return stored(parts.space, parts.work, number, lambda file: parts.write(file, number).digest)


def _write_shared(file: Path, line: LineRef, recipe: Recipe, space: Workspace) -> SparseInfo:
    """Write the patch of a recipe; of a large model, part by part with other workers."""
    parts = PatchParts(line, recipe, part_size(), space)
    if len(parts.ranges) == 1:
        return parts.write(file)
    made = {}
    with sharing(space, parts.work) as turns:
        for number in turns:
            made[number] = parts.do(number)
    return parts.join(file, [made[number] for number in range(len(parts.ranges))])


def is_exact(recipe: Recipe, space: Workspace) -> bool:
    """True if the recipe gives the same bytes on every machine.

    Products of factors do not, by any method.
    """
    return get_method(recipe.method.name).exact and not any(
        isinstance(open_delta(space.objects.blob_path(member.delta)), FactorFile)
        for member in recipe.members
    )


def required_fingerprint(recipe: Recipe, space: Workspace) -> JsonValue:
    """The environment that another run needs to get the same bytes; None if any gives them."""
    return None if is_exact(recipe, space) else fingerprint(device())


def is_reproducible(recipe: Recipe, record: KeyRecord, space: Workspace) -> bool:
    """True if making the recipe here must give the bytes of the recorded patch."""
    return required_fingerprint(recipe, space) in (None, record.fingerprint)


@dataclass(frozen=True)
class Rebuilt:
    """A patch that was made again.

    Attributes:
        difference: the largest difference between a weight of the two patches, relative to the
            largest weight of its tensor; None if the bytes are equal or there was no other patch.
    """

    digest: str
    difference: float | None = None


def rebuild(line: LineRef, recipe: Recipe, patch: str, *, stored: bool) -> Rebuilt:
    """Make the patch of a recipe again, without storing it; compare it with `patch`.

    Args:
        line: the line.
        recipe: of the patch.
        patch: the recorded digest.
        stored: the store has that patch, so that its weights can be compared.
    """
    space = workspace()
    with space.scratch() as scratch:
        file = scratch / "patch.safetensors"
        digest = write_patch_of(file, line, recipe, space, patch).digest
        if digest == patch or not stored or is_exact(recipe, space):
            return Rebuilt(digest)
        other = SparseFile.open(space.objects.blob_path(patch))
        return Rebuilt(
            digest, _largest_difference(open_base(line, space), SparseFile.open(file), other)
        )


def _largest_difference(base: Base, one: SparseFile, other: SparseFile) -> float:
    largest = 0.0
    for name in sorted({*one.names, *other.names}):
        first, second = (edited(base.checkpoint, edits, name).double() for edits in (one, other))
        scale = float(second.abs().max())
        difference = float((first - second).abs().max())
        largest = max(largest, difference / scale if scale else difference)
    return largest


def write_patch_of(
    file: Path, line: LineRef, recipe: Recipe, space: Workspace, digest: str | None
) -> SparseInfo:
    """Make the patch of a recipe and write it to a file.

    Patches of before have values that are not packed. It is written like that if this gives the
    bytes of `digest`.
    """
    info = PatchParts(line, recipe, part_size(), space).write(file)
    if digest in (None, info.digest):
        return info
    packed, plain = SparseFile.open(file), file.with_name(f"{file.name}.plain")
    before = write_sparse(plain, packed.tensors(), kind=packed.kind, metadata=packed.metadata)
    if before.digest != digest:
        plain.unlink()
        return info
    plain.replace(file)
    return before


def recipe_edits(base: Base, recipe: Recipe, space: Workspace) -> Edits:
    """The merged model of a recipe as edits, computed tensor by tensor on demand."""
    method = get_method(recipe.method.name)
    members = recipe_members(base, recipe, space)
    with computing_on(device()):
        return method(base.checkpoint, members, **recipe.method.settings)


def recipe_members(base: Base, recipe: Recipe, space: Workspace) -> list[DeltaMember]:
    """The members of a recipe with their opened deltas."""
    members = []
    for member in recipe.members:
        delta = open_delta(space.objects.blob_path(member.delta), base.checkpoint)
        if delta.metadata.get("base") != base.ref.weights:
            # Shapes cannot tell: models of one architecture fit each other's bases.
            raise Damage(
                f"the delta of {member.task} belongs to another base",
                expected=f"base {base.ref.weights[:12]}",
                found=f"base {delta.metadata.get('base', 'unknown')[:12]}",
                hint="restore the store from a backup, and find out what altered it",
            )
        members.append(DeltaMember(member.task, delta, _statistics(base, recipe, member, space)))
    return members


def _statistics(
    base: Base, recipe: Recipe, member: RecipeMember, space: Workspace
) -> dict[str, Checkpoint]:
    """The statistics that the recipe's method needs of a member: its own and common ones."""
    opened = {}
    for kind in get_method(recipe.method.name).needs:
        own = recipe.other.get(f"{kind}/{member.task}")
        digest = recipe.other.get(kind) if own is None else own
        if digest is None:
            raise Damage(
                f"the recipe of a merge by {recipe.method.name} has no {kind} for {member.task}",
                hint="restore the record of the version from a backup",
            )
        origin = {"base": base.ref.weights} | ({} if own is None else {"delta": member.delta})
        opened[kind] = open_statistic(space.objects.blob_path(digest), kind, origin)
    return opened
