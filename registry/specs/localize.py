"""How a line selects the coordinates of a finetuned model: the keys under `localize`.

Defaults depend on the mode and are stored where a line is made, so that they mean the same when
ours change. Keys that came later are written only where they are used: an older line keeps its
digest.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from restitch.registry.sizes import Size
from restitch.registry.specs.base import Spec, Text

DEFAULT_DENSITY = {"dataless": 0.05, "trained": 0.01, "fisher": 0.1, "distilled": 0.1}
DEFAULT_EPOCHS = {"distilled": 3}
DEFAULT_RECOVERY, DEFAULT_MAX_DENSITY = 0.99, 0.3

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
# The tags keep pydantic from reporting what is wrong with the other choice.
Density = Annotated[
    Annotated[Share, Tag("as number")] | Annotated[Literal["auto"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as number"),
]


def _if_auto(value: float) -> Any:
    return lambda earlier: value if earlier.get("density") == "auto" else None


class LocalizeSpec(Spec):
    """How the coordinates of a finetuned model are selected.

    Attributes:
        mode: `dataless` takes the largest differences; `fisher` weighs them with how much the
            model's predictions depend on each, `distilled` refines that until the graft predicts
            what the model does, both from inputs alone; `trained` learns from labelled examples.
            A task without train rows is localized without data in any mode. The default holds
            most of a model for its cost (docs/results/).
        density: the fraction of localizable coordinates that is kept; `auto` is the lowest that
            recovers the finetuned model on validation rows.
        preset: how a trained mask is learned.
        shots: examples per class, or all where there are fewer.
        epochs: passes over them, for `trained` and `distilled`.
        include: globs on tensor names that add to the family's localizable tensors.
        exclude: globs on tensor names that are never localized, and win.
        recovery: for `auto`: the share of the finetuned model's value that is to be reached.
        max_density: for `auto`: what is kept where that is not reached.
        budget: the most bytes that a delta may have; may be given as `20MB`.
        values: what a delta keeps of a weight: its `exact` bits, or `int8`, its difference from
            the base in 8 bits.
    """

    mode: Literal["dataless", "trained", "fisher", "distilled"] = "distilled"
    density: Density = Field(
        default_factory=lambda earlier: DEFAULT_DENSITY[earlier.get("mode", "distilled")]
    )
    preset: Literal["budget", "grafting", "paper", "official"] = "budget"
    shots: Annotated[int, Field(ge=1)] = 64
    epochs: Annotated[int, Field(ge=1)] = Field(
        default_factory=lambda earlier: DEFAULT_EPOCHS.get(earlier.get("mode", "distilled"), 10)
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()
    recovery: Share | None = Field(default_factory=_if_auto(DEFAULT_RECOVERY))
    max_density: Share | None = Field(default_factory=_if_auto(DEFAULT_MAX_DENSITY))
    budget: Size | None = None
    values: Literal["exact", "int8"] = "exact"

    @model_validator(mode="after")
    def _one_way_to_a_density(self) -> Self:
        if self.density == "auto":
            if self.recovery is None or self.max_density is None:
                raise ValueError("density: auto needs recovery and max_density")
        elif self.recovery is not None or self.max_density is not None:
            raise ValueError("recovery and max_density belong to density: auto")
        ends_by_itself = self.mode == "trained" and self.preset != "budget"
        if ends_by_itself and (self.density == "auto" or self.budget is not None):
            raise ValueError(
                f"preset: {self.preset} ends with a density of its own; "
                "choose preset: budget for density: auto or a budget"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not used is not written: the digest is then what it was before there were any.
        values: dict[str, Any] = handler(self)
        unused = {"recovery": None, "max_density": None, "budget": None, "values": "exact"}
        return {k: v for k, v in values.items() if k not in unused or v != unused[k]}

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the mask in this mode, beside the choice of tensors."""
        used = {
            "dataless": set(),
            "trained": {"preset", "shots", "epochs", "seed"},
            "fisher": {"shots", "seed"},
            "distilled": {"shots", "epochs", "seed"},
        }[self.mode]
        chosen = used | {"density", "recovery", "max_density", "budget", "values"}
        return {key: value for key, value in self.to_json().items() if key in chosen}
