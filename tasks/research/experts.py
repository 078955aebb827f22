"""Make and store the specialists of a recipe: a shared patch, and a mask file for each task.

Like a patch, they are stored under the digest of all that determines them. The key names a
manifest that lists the parts; `restitch gc` removes both unless a version of a line keeps them
(see `flows.research.experts`).
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from restitch.merging.digests import digest_file
from restitch.merging.errors import Damage
from restitch.merging.experts.files import write_experts
from restitch.merging.experts.specialists import Experts
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.merge import recipe_members
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace


@dataclass(frozen=True)
class Part:
    """One file: the digest of its blob and its size in bytes."""

    blob: str
    bytes: int


@dataclass(frozen=True)
class ExpertsRef:
    """Specialists in the store.

    Attributes:
        method: its name and version.
        settings: all settings with defaults; with tuning, one threshold for each task.
        members: digests of the finetuned weights, by task.
        shared: the patch that all specialists select from; None if each has its own.
        tasks: the part of each task, in addition to the shared patch.
        seconds: how long they took to make; None if they were in the store.
    """

    manifest: str
    recipe: str
    method: tuple[str, int]
    settings: dict[str, Any]
    members: dict[str, str]
    shared: Part | None
    tasks: dict[str, Part]
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """The size of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The shared part and those of the tasks."""
        return (*([] if self.shared is None else [self.shared]), *self.tasks.values())


@step("make-experts", "experts {recipe.method.name}")
def make_experts(line: LineRef, recipe: Recipe) -> ExpertsRef | Cached[ExpertsRef]:
    """The specialists of a recipe, from the store or made from the members' deltas."""
    space = workspace()
    key = recipe.digest()
    record = space.objects.lookup("experts", key)
    if record is not None:
        known = read_experts(record.blob, space)
        if all(space.objects.store.exists(f"blobs/{part.blob}") for part in known.parts):
            return Cached(known)
    began = time.perf_counter()
    with space.scratch() as scratch:
        values, files = write_parts(scratch, line, recipe, space)
        for path in files.values():
            space.objects.put_blob(path, move=True)
    manifest = space.objects.put_json(values)
    won = space.objects.publish("experts", key, manifest, made_by())
    return _ref(won.blob, values, round(time.perf_counter() - began, 3))


def write_parts(
    folder: Path, line: LineRef, recipe: Recipe, space: Workspace
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Make the specialists of a recipe in a folder: their manifest, and the files by digest."""
    base = open_base(line, space)
    experts = recipe_experts(base, recipe, space)
    with working("making specialists") as progress:
        origin = {"base": base.ref.weights, "recipe": recipe.digest()}
        written = write_experts(folder, base.checkpoint, experts, origin, progress)
    files: dict[str, Path] = {}

    def part(path: Path) -> dict[str, Any]:
        digest = digest_file(path)
        files[digest] = path
        return {"blob": digest, "bytes": path.stat().st_size}

    values = {
        "recipe": recipe.digest(),
        "method": [recipe.method.name, recipe.method.version],
        "settings": dict(recipe.method.settings),
        "members": {member.task: member.model for member in recipe.members},
        "shared": None if written.shared is None else part(written.shared),
        "tasks": {task: part(path) for task, path in written.tasks.items()},
    }
    return values, files


def recipe_experts(base: Base, recipe: Recipe, space: Workspace) -> Experts:
    """The specialists of a recipe, computed tensor by tensor on demand."""
    method = get_method(recipe.method.name)
    members = recipe_members(base, recipe, space)
    return method.experts(base.checkpoint, members, **recipe.method.settings)


def read_experts(manifest: str, space: Workspace) -> ExpertsRef:
    """The specialists that a manifest lists.

    Raises:
        Damage: the manifest is missing or malformed.
    """
    try:
        return _ref(manifest, json.loads(space.objects.read_blob(manifest)))
    except (ValueError, TypeError) as error:
        raise Damage(
            f"the object blobs/{manifest} is not readable",
            expected="a manifest of specialists",
            found=str(error),
            hint="make them again with `restitch experts`",
        ) from error


def _ref(manifest: str, values: dict[str, Any], seconds: float | None = None) -> ExpertsRef:
    return _REF.validate_python({**values, "manifest": manifest, "seconds": seconds})


_REF = TypeAdapter(ExpertsRef)
