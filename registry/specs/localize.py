"""The keys under `localize`: how a line selects the coordinates of a finetuned model."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from restitch.registry.sizes import Size
from restitch.registry.specs.base import Count, Spec, Text

DEFAULT_DENSITY = {
    "dataless": 0.05,
    "trained": 0.01,
    "fisher": 0.1,
    "distilled": 0.1,
    "subspace": 1.0,
}
DEFAULT_RANK, DEFAULT_MAX_RANK = 0.0417, 0.25
DEFAULT_EPOCHS = {"distilled": 3}
DEFAULT_RECOVERY, DEFAULT_MAX_DENSITY = 0.95, 0.3

# What determines the mask in each mode, in addition to its density.
_USED: dict[str, set[str]] = {
    "dataless": set(),
    "trained": {"preset", "shots", "epochs", "seed"},
    "fisher": {"shots", "seed"},
    "distilled": {"shots", "epochs", "seed"},
    "subspace": {"rank"},
}

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
# The tags keep pydantic from reporting what is wrong with the other choice.
Density = Annotated[
    Annotated[Share, Tag("as number")] | Annotated[Literal["auto"], Tag("as word")],
    Discriminator(lambda value: "as word" if isinstance(value, str) else "as number"),
]


Rank = Density


def _if_auto(value: float, *keys: str) -> Any:
    return lambda earlier: value if any(earlier.get(key) == "auto" for key in keys) else None


class LocalizeSpec(Spec):
    """How masks are found.

    A task without train rows is localized without data in any mode. The default mode recovers
    most of a finetuned model for its cost (docs/results/).
    """

    mode: Literal["dataless", "trained", "fisher", "distilled", "subspace"] = "distilled"
    """What is kept of a finetuned model. `subspace` keeps the leading singular vectors of each
    matrix's change, for methods that need whole task vectors. The others keep a mask, and say how
    coordinates are ranked: `dataless` takes the largest differences; `fisher` weighs them by
    how much the model's predictions depend on each; `distilled` refines that until the base with
    the mask predicts what the finetuned model predicts; `trained` learns the mask from labelled
    rows."""
    density: Density = Field(
        default_factory=lambda earlier: DEFAULT_DENSITY[earlier.get("mode", "distilled")],
        description="The fraction of the localizable coordinates that a mask keeps, or `auto` "
        "for the lowest of which validation rows support that it recovers the finetuned model; "
        "the default is "
        + ", ".join(f"{density} for {mode}" for mode, density in DEFAULT_DENSITY.items())
        + ", which touches every weight"
        + ".",
        examples=[0.05, "auto"],
    )
    rank: Rank | None = Field(
        default=None,
        description="For `subspace`: the share of each matrix's rank to keep, or `auto` for the "
        "lowest of which validation rows support that it recovers the finetuned model; "
        f"the default is {DEFAULT_RANK}.",
        examples=[DEFAULT_RANK, "auto"],
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
        default_factory=_if_auto(DEFAULT_RECOVERY, "density", "rank"),
        description="For `density: auto` and `rank: auto`: the share of the finetuned model's "
        "metric that the one-sided 95 % lower bound on validation rows must reach; "
        f"the default is {DEFAULT_RECOVERY}.",
        examples=[DEFAULT_RECOVERY],
    )
    max_density: Share | None = Field(
        default_factory=_if_auto(DEFAULT_MAX_DENSITY, "density"),
        description="For `density: auto`: the density to use, with a warning, where no "
        "lower one reaches `recovery`; "
        f"the default is {DEFAULT_MAX_DENSITY}.",
        examples=[DEFAULT_MAX_DENSITY],
    )
    max_rank: Share | None = Field(
        default=None,
        description="For `rank: auto`: the share to use, with a warning, where no lower one "
        "reaches `recovery`; "
        f"the default is {DEFAULT_MAX_RANK}.",
        examples=[DEFAULT_MAX_RANK],
    )
    budget: Size | None = Field(default=None, examples=["20MB"])
    """The largest size of a delta, in bytes or as text."""
    values: Literal["exact", "int8", "bf16"] = Field(
        default="exact",
        description="What a delta stores of a weight: its `exact` bits, or `int8`, its difference "
        "from the base in 8 bits. What it stores of a factor of a `subspace`: `int8` (the "
        "default), `bf16`, or `exact`, which is float32.",
        examples=["int8"],
    )

    @model_validator(mode="after")
    def _defaults_of_a_subspace(self) -> Self:
        # Not in the fields: a default that depends on another key enters every line's digest.
        if self.mode == "subspace":
            if self.rank is None:
                self._fill("rank", DEFAULT_RANK)
            if self.rank == "auto" and self.max_rank is None:
                self._fill("max_rank", DEFAULT_MAX_RANK)
            if "values" not in self.model_fields_set:
                self._fill("values", "int8")
        return self

    def _fill(self, key: str, value: object) -> None:
        object.__setattr__(self, key, value)  # frozen for everybody else
        self.model_fields_set.add(key)

    @model_validator(mode="after")
    def _one_way_to_a_density(self) -> Self:
        if self.mode == "subspace":
            if self.density != DEFAULT_DENSITY["subspace"]:
                raise ValueError("mode: subspace keeps a rank, not a density: give rank")
            if (self.rank == "auto") != (self.max_rank is not None):
                raise ValueError("max_rank belongs to rank: auto")
            if (self.rank == "auto") != (self.recovery is not None):
                raise ValueError("recovery belongs to rank: auto")
            return self
        if self.rank is not None or self.max_rank is not None or self.values == "bf16":
            raise ValueError("rank, max_rank and values: bf16 belong to mode: subspace")
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
    def reads_rows(self) -> bool:
        """True if the mode calibrates on rows of the task."""
        return self.mode in ("trained", "fisher", "distilled")

    @property
    def chooses_by_rows(self) -> bool:
        """True if validation rows choose how much is kept."""
        return "auto" in (self.density, self.rank)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the mask in this mode, except for the choice of tensors."""
        optional = self.model_dump(
            mode="json",
            include={"recovery", "max_density", "max_rank", "budget"},
            exclude_none=True,
        )
        plain = self.mode != "subspace" and self.values == "exact"
        own = _USED[self.mode] | (set() if plain else {"values"})
        own |= set() if self.mode == "subspace" else {"density"}
        return {**self.model_dump(mode="json", include=own), **optional}
