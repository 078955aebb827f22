"""Choose how many coordinates of a ranking a mask keeps.

A line gives a density, a budget for the bytes of the delta file, or `density: auto`. The latter
keeps the fewest coordinates whose graft recovers the requested share of the finetuned model's value
on validation rows. Masks are nested, so coordinates are ranked only once. Neither test rows nor
calibration rows are used. If even the highest density misses the target, but by no more than its
confidence interval, then its own value becomes the reference: otherwise few validation rows would
give every model the largest allowed mask. The record keeps every density that was tried.
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
from restitch.registry.ledger.line_state import ModelRef
from restitch.registry.specs.localize import DEFAULT_DENSITY, LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.task_data import has_validation, reading_inputs
from restitch.tasks.localizers import split_digests
from restitch.tasks.runtime.console import say, warn, working
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import Workspace

# Raised when the same measurements would lead to another choice.
VERSION = 1

# Validation rows: more would make each look slower and hardly change the choice.
_MOST_ROWS = 2000
_LOWEST = 0.001
# The search stops when a delta is within this share of its budget.
_TOLERANCE = 0.002


@dataclass(frozen=True)
class Look:
    """One density, measured by its graft on validation rows.

    Attributes:
        recovered: the graft's value over that of the finetuned model.
        low: lower end of the 95 % interval of that ratio; `high` is the upper one.
    """

    kept: int
    density: float
    value: float
    recovered: float
    low: float | None
    high: float | None

    def may_reach(self, target: float) -> bool:
        """True if it misses the target by no more than its interval."""
        return self.recovered < target and self.high is not None and self.high >= target


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
    """The density settings of a line, applied to one finetuned model."""

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace

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
            splits = split_digests(self.task)
            inputs |= {
                "recovery": self.choice.recovery,
                "max_density": self.choice.max_density,
                "validation": splits.get("validation", splits.get("train")),
                **reading_inputs(self.task, self.base, self.model),
                "metric": self.task.metric,
                "version": [VERSION, EVALUATOR_VERSION],
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
        choice = self.choice
        assert choice.recovery is not None
        target = choice.recovery
        assert self.task.data is not None
        exam = Exam(self.base, self.task, self.model, self.space, validation=_MOST_ROWS)
        whole = WeightsRef("finetuned", self.model.weights, self.model.uri)
        live = exam.live
        with live.wearing(whole, self.space):
            whole_model = exam.take()
        looks: dict[int, Look] = {}

        def look(kept: int) -> Look:
            if kept not in looks:
                with live.edited(Grafted(finetuned, mask_of(kept))):
                    grafted = exam.take()
                looks[kept] = _look(kept, coordinates, grafted, whole_model)
            return looks[kept]

        with working(f"choosing the density of {self.task.task}"):
            best = look(most)
            reference, metric = whole_model.value, whole_model.metric
            if best.may_reach(target):
                reference = best.value
            candidates = geometric(max(1, kept_count(_LOWEST, coordinates)), most)
            kept = smallest(
                candidates, lambda count: metric.reaches(look(count).value, target, reference)
            )
        chosen = look(most if kept is None else kept)
        message = (
            f"the mask of {self.task.task} recovers {chosen.recovered:.1%} of the finetuned "
            f"model's {self.task.metric} with {chosen.density:.1%} of the coordinates"
        )
        if kept is None:
            warn(f"{message}, less than the requested {target:.1%}")
        else:
            say(message)
        return {
            "target": target,
            "reached": chosen.recovered >= target,
            "kept": chosen.kept,
            "finetuned": whole_model.value,
            "reference": reference,
            "metric": self.task.metric,
            "rows": exam.count,
            "rows_set_apart_from_train": self.task.data.validation is None,
            "curve": [asdict(looks[kept]) for kept in sorted(looks)],
        }


def _look(kept: int, coordinates: int, grafted: Evaluation, finetuned: Evaluation) -> Look:
    interval = finetuned.rows.ratio_interval(grafted.rows)
    low, high = (None, None) if interval is None else interval
    ratio = finetuned.metric.ratio(grafted.value, finetuned.value)
    recovered = 1.0 if ratio is None else ratio
    return Look(kept, kept / coordinates, grafted.value, recovered, low, high)
