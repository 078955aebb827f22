"""The key `method`: one merge method, or a tournament of several.

A tournament names its contestants, how many of them run in one merge, and what "best" means.
Each merge selects the winner (`flows.promotion.method_selection`) and writes it to the recipe.
A method may take part twice with different settings.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from restitch.registry.gates.gate import Fraction
from restitch.registry.specs.base import InFile, Spec, Text

MOST_CONTESTANTS = 32

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MethodSpec(Spec):
    """A merge method and its settings."""

    name: Text = Field(examples=["localize-and-stitch"])
    """The name of a merge method; docs/methods.md lists them."""
    settings: dict[str, JsonValue] = Field(default_factory=dict, examples=[{"overlap": "mean"}])
    """The method's settings; those left out get the method's defaults."""

    @field_validator("settings")
    @classmethod
    def _finite(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # NaN equals nothing, not even itself.
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("all numbers must be finite") from None
        return value

    @property
    def methods(self) -> "tuple[MethodSpec, ...]":
        """All methods that may merge the line: itself."""
        return (self,)


class ObjectiveSpec(Spec):
    """What the winner of a tournament has the most of."""

    accuracy: Weight = 1.0
    """The weight of the mean accuracy over the tasks."""
    retention: Weight = 0.0
    """The weight of retention, the accuracy kept on the benchmark."""
    min_retention: Fraction | None = Field(default=None, examples=[0.95])
    """Contestants with less retention come after all others; by default the line's gate of this
    name."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {} if value == "mean" else value

    @model_validator(mode="after")
    def _weighs_something(self) -> "ObjectiveSpec":
        if self.accuracy == 0 and self.retention == 0:
            raise ValueError("give accuracy or retention a weight above 0")
        return self

    @property
    def asks_retention(self) -> bool:
        """True if retention must be measured."""
        return self.retention > 0 or bool(self.min_retention)


class TournamentSpec(Spec):
    """Merge methods of which the best becomes the merged version."""

    tournament: Annotated[
        tuple[MethodSpec, ...],
        Field(min_length=2, max_length=MOST_CONTESTANTS),
        InFile(
            Annotated[list[Text | MethodSpec], Field(min_length=2, max_length=MOST_CONTESTANTS)]
        ),
    ] = Field(examples=[["localize-and-stitch", "ties"]])
    """The contestants; of equally good ones the first wins."""
    objective: Annotated[ObjectiveSpec, InFile(ObjectiveSpec | Literal["mean"] | None)] = (
        ObjectiveSpec()
    )
    """What the winner has the most of; `mean` is the mean accuracy alone."""
    at_most: Annotated[int, Field(ge=2, le=MOST_CONTESTANTS)] | None = Field(
        default=None, examples=[3]
    )
    """How many contestants run in one merge: the method in use, and those that have waited longest;
    by default all."""

    @field_validator("tournament", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple({"name": one} if isinstance(one, str) else one for one in value)

    @field_validator("tournament")
    @classmethod
    def _once(cls, value: tuple[MethodSpec, ...]) -> tuple[MethodSpec, ...]:
        for place, one in enumerate(value):
            if one in value[:place]:
                raise ValueError(f"names {one.name} twice with the same settings")
        return value

    @property
    def name(self) -> Literal["tournament"]:
        """The word in place of a method's name."""
        return "tournament"

    @property
    def settings(self) -> dict[str, JsonValue]:
        """Empty: each contestant has its own settings."""
        return {}

    @property
    def methods(self) -> tuple[MethodSpec, ...]:
        """All methods that may merge the line: the contestants."""
        return self.tournament

    @property
    def rotates(self) -> bool:
        """True if some contestants sit out each merge."""
        return self.at_most is not None and self.at_most < len(self.tournament)

    @property
    def labels(self) -> tuple[str, ...]:
        """The contestants' names, with the settings that differ where a name occurs twice."""
        return tuple(_label(one, self.tournament) for one in self.tournament)


def _label(one: MethodSpec, others: tuple[MethodSpec, ...]) -> str:
    same = [other.settings for other in others if other.name == one.name]
    if len(same) == 1:
        return one.name
    differences = (
        f"{key} {json.dumps(value)}"
        for key, value in sorted(one.settings.items())
        if any(other.get(key) != value for other in same)
    )
    return f"{one.name} ({', '.join(differences) or 'defaults'})"


# The tags keep pydantic from reporting what is wrong with the other choice.
AnyMethod = Annotated[
    Annotated[MethodSpec, Tag("as method")] | Annotated[TournamentSpec, Tag("as tournament")],
    Discriminator(
        lambda value: (
            "as tournament"
            if isinstance(value, TournamentSpec)
            or (isinstance(value, dict) and "tournament" in value)
            else "as method"
        )
    ),
    InFile(Text | MethodSpec | TournamentSpec),
]
