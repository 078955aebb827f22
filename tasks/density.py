"""Choose how many coordinates of a ranking a mask keeps.

A line gives a density, a budget for the bytes of the delta file, or `density: auto`. The latter
keeps the fewest coordinates whose graft recovers the requested share of the finetuned model's
value, as far as validation rows support it (see `recovery`). Masks are nested, so coordinates are
ranked only once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import kept_count
from restitch.merging.numerics.bisection import geometric
from restitch.merging.numerics.bitwise import gather, scatter
from restitch.merging.ranking.top_k import Scores, top_k
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.localize import DEFAULT_DENSITY, LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.task_data import has_validation
from restitch.tasks.recovery import Recovery
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.workspace import Workspace

_LOWEST = 0.001
# The search stops when a delta is within this share of its budget.
_TOLERANCE = 0.002


@dataclass(frozen=True)
class Grafted:
    """Edits that write the finetuned values at a mask's coordinates; see `files.edits`."""

    finetuned: Checkpoint
    mask: Mask

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the mask touches."""
        return self.mask.names

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the mask's coordinates."""
        coordinates = self.mask.coordinates(name).numpy()
        scatter(flat, coordinates, gather(self.finetuned.tensor(name).reshape(-1), coordinates))


@dataclass(frozen=True)
class Density:
    """The density settings of a line, applied to one finetuned model.

    Attributes:
        recorded: the coordinates that validation rows chose before, to write the same bytes again.
    """

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace
    recorded: int | None = None

    def __post_init__(self) -> None:
        if self.choice.density == "auto" and not self.is_measured:
            warn(
                f"task {self.task.task} has no validation rows to choose a density by: "
                f"using a density of {self._given:.0%}"
            )

    @cached_property
    def is_measured(self) -> bool:
        """True if validation rows choose the density."""
        return self.choice.density == "auto" and has_validation(self.task, self.base.family)

    def inputs(self) -> dict[str, Any] | None:
        """All that the choice depends on in addition to the ranking; None for a fixed density."""
        inputs: dict[str, Any] = {}
        if self.choice.budget is not None:
            inputs["budget"] = self.choice.budget
        if self.choice.density == "auto":
            inputs["given"] = self._given
        if self.is_measured:
            inputs |= {
                "max_density": self.choice.max_density,
                **self._recovery.inputs(),
            }
        return inputs or None

    def choose(
        self,
        scores: Scores,
        finetuned: Checkpoint,
        size_of: Callable[[Mask], int],
        scratch: Path,
    ) -> tuple[Mask, dict[str, Any]]:
        """Choose the mask; also return how it was chosen, for the record.

        Args:
            scores: of all coordinates.
            finetuned: the finetuned model under the base's tensor names.
            size_of: returns the bytes of the delta with a mask.
            scratch: for temporary files; must outlive the mask.
        """
        coordinates = sum(scores.numel(name) for name in scores.names)

        def mask_of(kept: int) -> Mask:
            return top_k(scores, kept, scratch=scratch)

        if self.recorded is not None:
            return mask_of(self.recorded), {}
        highest = self.choice.max_density if self.is_measured else self._given
        assert highest is not None
        most = kept_count(highest, coordinates)
        facts: dict[str, Any] = {}
        if self.choice.budget is not None:
            fits = self._fitting(most, lambda kept: size_of(mask_of(kept)))
            facts["budget"] = {"bytes": self.choice.budget, "fits": fits}
            most = min(most, fits)
        if not self.is_measured or most == 0:
            return mask_of(most), facts
        recovery = self._recovering(most, coordinates, finetuned, mask_of)
        return mask_of(int(recovery["kept"])), {**facts, "recovery": recovery}

    @property
    def _given(self) -> float:
        density = self.choice.density
        return DEFAULT_DENSITY[self.choice.mode] if density == "auto" else density

    def _fitting(self, most: int, size: Callable[[int], int]) -> int:
        """The most coordinates, up to `most`, whose delta fits the budget."""
        budget = self.choice.budget
        assert budget is not None
        if size(most) <= budget:
            return most
        fits, over = 0, most
        while over - fits > max(1, _TOLERANCE * fits):
            middle = (fits + over) // 2
            if size(middle) <= budget:
                fits = middle
            else:
                over = middle
        if fits == 0:
            warn(
                f"the mask of {self.task.task} is empty: its budget of {budget:,} bytes "
                "is too small for any coordinate"
            )
        return fits

    def _recovering(
        self, most: int, coordinates: int, finetuned: Checkpoint, mask_of: Callable[[int], Mask]
    ) -> dict[str, Any]:
        """The fewest coordinates that reach the target, or else `most`, and all measurements."""
        return self._recovery.search(
            geometric(max(1, kept_count(_LOWEST, coordinates)), most),
            lambda kept: Grafted(finetuned, mask_of(kept)),
            lambda kept: kept / coordinates,
            "the mask",
            "of the coordinates",
        )

    @property
    def _recovery(self) -> Recovery:
        assert self.choice.recovery is not None
        return Recovery(self.choice.recovery, self.task, self.base, self.model, self.space)
