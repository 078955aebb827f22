"""The keys under `localize`: how a line selects the coordinates of a finetuned model."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from restitch.registry.sizes import Size
from restitch.registry.specs.base import Count, Spec, Text

DEFAULT_DENSITY = {"dataless": 0.05, "trained": 0.01, "fisher": 0.1, "distilled": 0.1}
DEFAULT_EPOCHS = {"distilled": 3}
DEFAULT_RECOVERY, DEFAULT_MAX_DENSITY = 0.99, 0.3

# What determines the mask in each mode, in addition to its density.
_USED: dict[str, set[str]] = {
    "dataless": set(),
    "trained": {"preset", "shots", "epochs", "seed"},
    "fisher": {"shots", "seed"},
    "distilled": {"shots", "epochs", "seed"},
}

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
# The tags keep pydantic from reporting what is wrong with the other choice.
Density = Annotated[
    Annotated[Share, Tag("as number")] | Annotated[Literal["auto"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as number"),
]


def _if_auto(value: float) -> Any:
    return lambda earlier: value if earlier.get("density") == "auto" else None


class LocalizeSpec(Spec):
    """How masks are found.

    A task without train rows is localized without data in any mode. The default mode recovers
    most of a finetuned model for its cost (docs/results/).
    """

    mode: Literal["dataless", "trained", "fisher", "distilled"] = "distilled"
    """How coordinates are ranked: `dataless` takes the largest differences; `fisher` weighs them by
    how much the model's predictions depend on each; `distilled` refines that until the base with
    the mask predicts what the finetuned model predicts; `trained` learns the mask from labelled
    rows."""
    density: Density = Field(
        default_factory=lambda earlier: DEFAULT_DENSITY[earlier.get("mode", "distilled")],
        description="The fraction of the localizable coordinates that a mask keeps, or `auto` "
        "for the lowest that recovers the finetuned model on validation rows; the default is "
        + ", ".join(f"{density} for {mode}" for mode, density in DEFAULT_DENSITY.items())
        + ".",
        examples=[0.05, "auto"],
    )
    preset: Literal["budget", "grafting", "paper", "official"] = "budget"
    """For `trained`: how the mask is learned. Only `budget` keeps exactly the density."""
    shots: Count = 64
    """For all modes but `dataless`: train rows per class, or all where there are fewer."""
    epochs: Count = Field(
        default_factory=lambda earlier: DEFAULT_EPOCHS.get(earlier.get("mode", "distilled"), 10),
        examples=[3],
    )
    """For `trained` and `distilled`: passes over those rows; the default is 3 for distilled and 10
    for trained."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the choice of rows and the training."""
    include: tuple[Text, ...] = Field(default=(), examples=[["embeddings.*"]])
    """Globs on tensor names that add to the family's localizable tensors."""
    exclude: tuple[Text, ...] = Field(default=(), examples=[["*.bias"]])
    """Globs on tensor names that are never localized; they win over `include`."""
    recovery: Share | None = Field(
        default_factory=_if_auto(DEFAULT_RECOVERY),
        description="For `density: auto`: the share of the finetuned model's metric to reach; "
        f"the default is {DEFAULT_RECOVERY}.",
        examples=[DEFAULT_RECOVERY],
    )
    max_density: Share | None = Field(
        default_factory=_if_auto(DEFAULT_MAX_DENSITY),
        description="For `density: auto`: the density to use where `recovery` is not reached; "
        f"the default is {DEFAULT_MAX_DENSITY}.",
        examples=[DEFAULT_MAX_DENSITY],
    )
    budget: Size | None = Field(default=None, examples=["20MB"])
    """The largest size of a sparse delta, in bytes or as text."""
    values: Literal["exact", "int8"] = "exact"
    """What a delta stores of a weight: its `exact` bits, or `int8`, its difference from the base in
    8 bits."""

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

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the mask in this mode, except for the choice of tensors."""
        optional = self.model_dump(
            mode="json",
            include={"recovery", "max_density", "budget", "values"},
            exclude_defaults=True,
            exclude_none=True,
        )
        return {**self.model_dump(mode="json", include={"density", *_USED[self.mode]}), **optional}
