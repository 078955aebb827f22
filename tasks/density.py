"""How many coordinates of a ranking are kept: a density, what recovers the model, what fits.

With `density: auto` it is the fewest whose graft reaches the asked share of the finetuned model's
value on validation rows: masks are nested, so no coordinate is ranked again. Test rows are never
looked at, nor are those that the ranking was calibrated on. Where the highest density falls short
by no more than chance explains, its own value is what the others are measured by: few rows must not
make every model as large as is allowed. A budget bounds the bytes of the delta, counted on the
file. All that was tried is in the record.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import kept_count
from restitch.merging.numerics.bisection import geometric, smallest
from restitch.merging.numerics.bitwise import gather, scatter
from restitch.merging.ranking.top_k import Scores, top_k
from restitch.modeling.evaluation import EVALUATOR_VERSION, Evaluation
from restitch.modeling.significance import ratio_interval
from restitch.registry.ledger.line_state import ModelRef
from restitch.registry.specs.localize import DEFAULT_DENSITY, LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import Base, live_base
from restitch.tasks.inputs.task_data import has_validation, reading_inputs
from restitch.tasks.runtime.console import say, warn, working
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import Workspace

# Raised when the same looks would lead to another choice.
VERSION = 1

# Rows that are looked at: more would not tell densities apart that matter, and cost each look.
_MOST_ROWS = 2000
_LOWEST = 0.001
# A delta below its budget by less than this share is not made larger.
_NEAR = 0.002


@dataclass(frozen=True)
class Look:
    """The graft of one density on validation rows.

    Attributes:
        recovered: its value over that of the finetuned model.
        low: lower end of the 95 % interval of the shares of right rows over each other.
        high: upper end.
    """

    kept: int
    density: float
    value: float
    recovered: float
    low: float | None
    high: float | None

    def is_target_by_chance(self, target: float) -> bool:
        """Whether it falls short of the target by no more than its interval."""
        return self.recovered < target and self.high is not None and self.high >= target


@dataclass(frozen=True)
class Grafted:
    """Edits that put the finetuned values at a mask's coordinates; see `restitch.merging.files.edits`."""

    finetuned: Checkpoint
    mask: Mask

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the mask touches."""
        return self.mask.names

    def apply(self, name: str, flat: Tensor) -> None:
        """Overwrite the kept coordinates."""
        coordinates = self.mask.coordinates(name).numpy()
        scatter(flat, coordinates, gather(self.finetuned.tensor(name).reshape(-1), coordinates))


@dataclass(frozen=True)
class Density:
    """What a line says about densities, for one finetuned model."""

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace

    def __post_init__(self) -> None:
        if self.choice.density == "auto" and not self.is_measured:
            warn(
                f"{self.task.task} has no validation rows to choose a density by: "
                f"{self._given:.0%} are kept"
            )

    @cached_property
    def is_measured(self) -> bool:
        """Whether it is chosen by validation rows."""
        return self.choice.density == "auto" and has_validation(self.task, self.base.family)

    def inputs(self) -> dict[str, Any] | None:
        """All that the choice depends on beside the ranking; None where a density is all."""
        known: dict[str, Any] = {}
        if self.choice.budget is not None:
            known["budget"] = self.choice.budget
        if self.choice.density == "auto":
            known["given"] = self._given
        if self.is_measured:
            data = self.task.data
            assert data is not None
            assert data.content is not None
            splits: Any = data.content["splits"]
            known |= {
                "recovery": self.choice.recovery,
                "max_density": self.choice.max_density,
                "validation": splits.get("validation", splits.get("train")),
                **reading_inputs(self.task, self.base, self.model),
                "metric": self.task.metric,
                "version": [VERSION, EVALUATOR_VERSION],
            }
        return known or None

    def choose(
        self,
        scores: Scores,
        finetuned: Checkpoint,
        size_of: Callable[[Mask], int],
        scratch: Path,
    ) -> tuple[Mask, dict[str, Any]]:
        """The mask, and what the record keeps of how it was chosen.

        Args:
            scores: of all coordinates.
            finetuned: under the base's names.
            size_of: the bytes of the delta with a mask.
            scratch: for temporary files, for as long as the mask lives.
        """
        coordinates = sum(scores.numel(name) for name in scores.names)

        def mask_of(kept: int) -> Mask:
            return top_k(scores, kept, scratch=scratch)

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
        found = self._recovering(most, coordinates, finetuned, mask_of)
        return mask_of(int(found["kept"])), {**facts, "recovery": found}

    @property
    def _given(self) -> float:
        density = self.choice.density
        return DEFAULT_DENSITY[self.choice.mode] if density == "auto" else density

    def _fitting(self, most: int, size: Callable[[int], int]) -> int:
        """The most coordinates, up to `most`, whose delta is no larger than the budget."""
        budget = self.choice.budget
        assert budget is not None
        if size(most) <= budget:
            return most
        fits, over = 0, most
        while over - fits > max(1, _NEAR * fits):
            middle = (fits + over) // 2
            if size(middle) <= budget:
                fits = middle
            else:
                over = middle
        if fits == 0:
            warn(f"{self.task.task} fits its budget of {budget:,} bytes with no coordinate at all")
        return fits

    def _recovering(
        self, most: int, coordinates: int, finetuned: Checkpoint, mask_of: Callable[[int], Mask]
    ) -> dict[str, Any]:
        """The fewest coordinates that reach the target, or `most`, with all that was tried."""
        choice, live = self.choice, live_base(self.base)
        assert choice.recovery is not None
        target = choice.recovery
        assert self.task.data is not None
        exam = Exam(self.base, self.task, self.model, self.space, validation=_MOST_ROWS)
        whole = WeightsRef("finetuned", self.model.weights, self.model.uri)
        with live.wearing(whole, self.space):
            wanted = exam.take()
        looks: dict[int, Look] = {}

        def look(kept: int) -> Look:
            if kept not in looks:
                with live.edited(Grafted(finetuned, mask_of(kept))):
                    found = exam.take()
                looks[kept] = _look(kept, coordinates, found, wanted)
            return looks[kept]

        with working(f"choosing the density of {self.task.task}"):
            best = look(most)
            measure = wanted.value
            if best.is_target_by_chance(target):
                measure = min(measure, best.value)
            candidates = geometric(max(1, kept_count(_LOWEST, coordinates)), most)
            kept = smallest(candidates, lambda some: look(some).value >= target * measure)
        chosen = look(most if kept is None else kept)
        told = f"{self.task.task} recovers {chosen.recovered:.1%} of its model's value with "
        told += f"{chosen.density:.1%} of the coordinates"
        if kept is None:
            warn(f"{told}, less than the {target:.1%} asked for")
        else:
            say(told)
        return {
            "target": target,
            "reached": chosen.recovered >= target,
            "kept": chosen.kept,
            "finetuned": wanted.value,
            "measured_by": measure,
            "metric": self.task.metric,
            "rows": exam.count,
            "rows_set_apart_from_train": self.task.data.validation is None,
            "curve": [asdict(looks[kept]) for kept in sorted(looks)],
        }


def _look(kept: int, coordinates: int, found: Evaluation, wanted: Evaluation) -> Look:
    spread = ratio_interval(wanted.correct_rows(), found.correct_rows())
    low, high = (None, None) if spread is None else spread
    recovered = found.value / wanted.value if wanted.value else 1.0
    return Look(kept, kept / coordinates, found.value, recovered, low, high)
