"""The recipe of a merged version: everything that determines its weights.

Two versions with the same recipe are the same model, and the digest of the recipe
identifies it. Members are ordered by the UTF-8 bytes of their task and settings hold
every default, so a recipe has exactly one JSON text. `from_json` refuses any other.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from restitch.merging.digests import canonical_json, digest_bytes
from restitch.merging.errors import Damage
from restitch.merging.order import by_bytes

FORMAT = 1


@dataclass(frozen=True)
class RecipeBase:
    """The base: digests of its weights and of its config."""

    weights: str
    config: str


@dataclass(frozen=True)
class RecipeMethod:
    """The merge method with all its settings, including tuned values."""

    name: str
    version: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class RecipeMember:
    """A member: its task and the digests of its model, its mask and its sparse delta."""

    task: str
    model: str
    mask: str
    delta: str


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merged version.

    Attributes:
        base: the base.
        family: the line's family.
        method: the merge method.
        members: sorted by task.
        code: version of the stitching code.
        other: digests of all other inputs, by name.
    """

    base: RecipeBase
    family: str
    method: RecipeMethod
    members: tuple[RecipeMember, ...]
    code: int
    other: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.members, key=lambda member: by_bytes(member.task)))
        if len({member.task for member in ordered}) != len(ordered):
            raise ValueError("a recipe must name each task once")
        object.__setattr__(self, "members", ordered)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        plain = asdict(self)
        plain["members"] = list(plain["members"])
        # Through text and back: a value that JSON cannot hold fails here, not in a digest.
        result: dict[str, Any] = json.loads(canonical_json({"format": FORMAT, **plain}))
        return result

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe of `to_json`'s output; raises `Damage` for anything else."""
        try:
            rest = dict(data)
            if rest.pop("format") != FORMAT:
                raise ValueError(f"format {data['format']}")  # noqa: TRY301
            recipe = cls(
                base=RecipeBase(**rest.pop("base")),
                method=RecipeMethod(**rest.pop("method")),
                members=tuple(RecipeMember(**member) for member in rest.pop("members")),
                **rest,
            )
            if recipe.to_json() != dict(data):
                raise ValueError("members out of order")  # noqa: TRY301
        except (KeyError, TypeError, ValueError) as err:
            raise Damage(
                "a recipe cannot be read",
                expected=f"format {FORMAT} with {', '.join(item.name for item in fields(cls))}",
                found=f"{type(err).__name__}: {err}",
                hint="restore the object from a copy, or use a newer restitch",
            ) from err
        return recipe

    def digest(self) -> str:
        """The digest that identifies the merged version."""
        return digest_bytes(canonical_json(self.to_json()))
