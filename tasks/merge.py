"""Make a merged model from its recipe and keep it as a patch; a pure function of the recipe."""

import time
from pathlib import Path

from merging.digests import digest_file
from merging.edits import Edits
from merging.errors import Damage
from merging.methods import get_method
from merging.recipe import Recipe, RecipeBase, RecipeMember, RecipeMethod
from merging.sparse import SparseFile, SparseInfo
from merging.stitch import VERSION as STITCHING_VERSION
from merging.stitch import Member as StitchMember
from merging.stitch import write_patch
from registry.head import Member
from tasks.engine import Cached, step
from tasks.models import Base, open_base
from tasks.refs import LineRef, PatchRef
from tasks.reporting import working
from tasks.workspace import Workspace, made_by, workspace


def make_recipe(line: LineRef, members: tuple[Member, ...]) -> Recipe:
    """All that determines the merged model of these members."""
    settings = line.spec.method.settings
    method = get_method(line.spec.method.name)
    return Recipe(
        base=RecipeBase(line.base.weights, line.base.config),
        family=line.spec.family,
        method=RecipeMethod(method.name, method.version, settings),
        members=tuple(_recipe_member(member) for member in members),
        code=STITCHING_VERSION,
    )


def _recipe_member(member: Member) -> RecipeMember:
    mask, delta = member.model.mask, member.model.delta
    assert mask is not None, "a member has been localized"
    assert delta is not None, "a member has been localized"
    return RecipeMember(task=member.task, model=member.model.model.weights, mask=mask, delta=delta)


@step("stitch")
def stitch(line: LineRef, recipe: Recipe, again: bool = False) -> PatchRef | Cached[PatchRef]:
    """The patch of a recipe: from the store, or made from the members' deltas.

    Args:
        line: with the base.
        recipe: what to make.
        again: make it although it is there, and compare.

    Raises:
        Damage: what is in the store is not what the recipe gives.
    """
    space = workspace()
    key = recipe.digest()
    record = space.objects.lookup("patch", key)
    if record is not None and not again:
        return Cached(PatchRef(record.blob, int(str(record.facts["kept"])), record.size, key))
    began = time.perf_counter()
    base = open_base(line, space)
    with space.scratch() as scratch:
        file = scratch / "patch.safetensors"
        info = _write(file, base, recipe, space)
        blob = space.objects.put_blob(file, move=True)
    if record is not None and record.blob != blob:
        raise Damage(
            f"the patch of recipe {key[:12]} in the store is not what the recipe gives",
            expected=blob,
            found=record.blob,
            hint="restore the store from a backup, and find out what altered it",
        )
    won = space.objects.publish("patch", key, blob, made_by(), facts={"kept": info.kept})
    return PatchRef(won.blob, info.kept, won.size, key, round(time.perf_counter() - began, 3))


def rebuild(line: LineRef, recipe: Recipe) -> str:
    """The digest of the patch that a recipe gives, made anew and kept nowhere."""
    space = workspace()
    with space.scratch() as scratch:
        file = scratch / "patch.safetensors"
        write_patch_of(file, line, recipe, space)
        return digest_file(file)


def write_patch_of(file: Path, line: LineRef, recipe: Recipe, space: Workspace) -> None:
    """Write the patch that a recipe gives to a file."""
    _write(file, open_base(line, space), recipe, space)


def _write(file: Path, base: Base, recipe: Recipe, space: Workspace) -> SparseInfo:
    with working("stitching") as progress:
        return write_patch(
            file,
            base.checkpoint,
            recipe_edits(base, recipe, space),
            metadata={"base": base.ref.weights, "recipe": recipe.digest()},
            progress=progress,
        )


def recipe_edits(base: Base, recipe: Recipe, space: Workspace) -> Edits:
    """The merged model of a recipe, computed tensor by tensor as it is asked for."""
    method = get_method(recipe.method.name)
    members = []
    for member in recipe.members:
        delta = SparseFile.open(space.objects.blob_path(member.delta))
        if delta.metadata.get("base") != base.ref.weights:
            # Shapes say nothing: models of one architecture fit each other's bases.
            raise Damage(
                f"the delta of {member.task} was found on another base",
                expected=f"base {base.ref.weights[:12]}",
                found=f"base {delta.metadata.get('base', 'unknown')[:12]}",
                hint="restore the store from a backup, and find out what altered it",
            )
        members.append(StitchMember(member.task, delta))
    return method(base.checkpoint, members, **recipe.method.settings)
