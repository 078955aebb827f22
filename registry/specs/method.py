"""How a line merges its members: one method, or several of which each merge takes the best.

A tournament names its contestants, how many of them a merge may cost, and what "best" means; who
wins is found out at each merge (`restitch.flows.promotion.method_selection`) and stands in that version's recipe. Its
contestants are methods with settings of their own, the same method twice where the settings differ.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from restitch.registry.specs.base import Spec, Text

MOST_CONTESTANTS = 32

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MethodSpec(Spec):
    """A merge method and its settings."""

    name: Text
    settings: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _finite(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # One that is no number equals nothing, not even itself.
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("holds a number that is not finite") from None
        return value

    @property
    def methods(self) -> "tuple[MethodSpec, ...]":
        """All methods that may merge the line: itself."""
        return (self,)


class ObjectiveSpec(Spec):
    """What the best contestant has the most of; the word `mean` is accuracy alone.

    Attributes:
        accuracy: weight of the mean over the tasks.
        retention: weight of retention.
        min_retention: contestants below it come after all others; None, or 0, asks for nothing.
    """

    accuracy: Weight = 1.0
    retention: Weight = 0.0
    min_retention: Weight | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {} if value == "mean" else value

    @model_validator(mode="after")
    def _weighs_something(self) -> "ObjectiveSpec":
        if self.accuracy == 0 and self.retention == 0:
            raise ValueError("weighs nothing: give accuracy or retention a weight above 0")
        return self

    @property
    def asks_retention(self) -> bool:
        """Whether retention has to be measured."""
        return self.retention > 0 or bool(self.min_retention)


class TournamentSpec(Spec):
    """Merge methods of which the best becomes the merged version.

    Attributes:
        tournament: the contestants, in an order that decides between equals.
        objective: which is the best.
        at_most: how many take part in one merge; None for all. The method in use does, and those
            that have waited longest.
    """

    tournament: Annotated[tuple[MethodSpec, ...], Field(min_length=2, max_length=MOST_CONTESTANTS)]
    objective: ObjectiveSpec = ObjectiveSpec()
    at_most: Annotated[int, Field(ge=2, le=MOST_CONTESTANTS)] | None = None

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
        """What it is called where a method's name stands."""
        return "tournament"

    @property
    def settings(self) -> dict[str, JsonValue]:
        """None of its own: each contestant has its settings."""
        return {}

    @property
    def methods(self) -> tuple[MethodSpec, ...]:
        """All methods that may merge the line: the contestants."""
        return self.tournament

    @property
    def rotates(self) -> bool:
        """Whether some contestants sit out."""
        return self.at_most is not None and self.at_most < len(self.tournament)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the contestants are called: names, with what differs where a name occurs twice."""
        return tuple(_label(one, self.tournament) for one in self.tournament)


def _label(one: MethodSpec, others: tuple[MethodSpec, ...]) -> str:
    same = [other.settings for other in others if other.name == one.name]
    if len(same) == 1:
        return one.name
    told = (
        f"{key} {json.dumps(value)}"
        for key, value in sorted(one.settings.items())
        if any(other.get(key) != value for other in same)
    )
    return f"{one.name} ({', '.join(told) or 'defaults'})"


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
]
