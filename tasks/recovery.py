"""Find the smallest delta that recovers a finetuned model, as far as validation rows support it.

The target is a promise: it must not lie above the one-sided 95 % lower bound of what a delta
recovers on the validation rows, which are compared row by row. If no delta reaches it, the largest
is taken, and the record has the shortfall. Neither test rows nor calibration rows are used. The
record keeps every delta that was tried.

The bound is not corrected for the number of deltas that are tried. If rows stay right when more is
kept, the bisection chooses as a walk from the largest down to the first failure does: a fixed
sequence of tests, which needs no correction. See the page about registering for the other case.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from restitch.merging.files.edits import Edits
from restitch.merging.numerics.bisection import smallest
from restitch.modeling.evaluation import EVALUATOR_VERSION, Evaluation
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.ledger.measurements import recovered_share
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.task_head import reading_inputs
from restitch.tasks.localizers import split_digests
from restitch.tasks.runtime.console import say, warn, working
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import Workspace

# Raised when the same measurements would lead to another choice.
VERSION = 2

# Validation rows: more would make each look slower and hardly change the choice.
_MOST_ROWS = 2000


@dataclass(frozen=True)
class Look:
    """One delta, measured by its graft on validation rows.

    Attributes:
        kept: the number that was tried: coordinates, or the rank of the largest matrix.
        density: the share of the coordinates, or of each matrix's rank.
        recovered: the graft's value over that of the finetuned model.
        low: lower end of the 95 % interval of that ratio; `high` is the upper one.
        bound: its one-sided 95 % lower bound; None if the rows support none.
    """

    kept: int
    density: float
    value: float
    recovered: float
    low: float | None
    high: float | None
    bound: float | None

    def supports(self, target: float) -> bool:
        """True if the rows support that it recovers at least this share."""
        return self.bound is not None and self.bound >= target


@dataclass(frozen=True)
class Recovery:
    """The search for one finetuned model.

    Attributes:
        target: the share of the finetuned model's value to reach.
    """

    target: float
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace

    def inputs(self) -> dict[str, Any]:
        """All that a search depends on in addition to the candidates."""
        splits = split_digests(self.task)
        return {
            "recovery": self.target,
            "validation": splits.get("validation", splits.get("train")),
            **reading_inputs(self.task, self.base, self.model),
            "metric": self.task.metric,
            "version": [VERSION, EVALUATOR_VERSION],
        }

    def search(
        self,
        candidates: Sequence[int],
        edits_of: Callable[[int], Edits],
        share_of: Callable[[int], float],
        what: str,
        of: str,
    ) -> dict[str, Any]:
        """The smallest candidate that the rows support to reach the target, or else the largest.

        Args:
            candidates: in rising order.
            edits_of: the graft of a candidate.
            share_of: the share that a candidate keeps.
            what: the delta, for messages.
            of: what the share is of, for messages.

        Returns:
            The choice (`kept`) and all measurements, for the record.
        """
        assert self.task.data is not None
        exam = Exam(self.base, self.task, self.model, self.space, validation=_MOST_ROWS)
        whole = WeightsRef("finetuned", self.model.weights, self.model.uri)
        live = exam.live
        with live.wearing(whole, self.space):
            whole_model = exam.take()
        looks: dict[int, Look] = {}

        def look(kept: int) -> Look:
            if kept not in looks:
                with live.edited(edits_of(kept)):
                    grafted = exam.take()
                looks[kept] = _look(kept, share_of(kept), grafted, whole_model)
            return looks[kept]

        with working(f"choosing how much to keep of {self.task.task}"):
            kept = smallest(candidates, lambda count: look(count).supports(self.target))
        chosen = look(candidates[-1] if kept is None else kept)
        found = {
            "target": self.target,
            "reached": kept is not None,
            "kept": chosen.kept,
            "recovered": chosen.recovered,
            "bound": chosen.bound,
            **({} if kept is not None else {"shortfall": self.target - (chosen.bound or 0.0)}),
            "finetuned": whole_model.value,
            "metric": self.task.metric,
            "rows": exam.count,
            "rows_set_apart_from_train": self.task.data.validation is None,
            "curve": [asdict(looks[kept]) for kept in sorted(looks)],
        }
        message = f"{what} of {self.task.task} with {chosen.density:.1%} {of}"
        (warn if kept is None else say)(f"{message}: {recovered_share(found)}")
        return found


def _look(kept: int, share: float, grafted: Evaluation, finetuned: Evaluation) -> Look:
    interval = finetuned.rows.ratio_interval(grafted.rows)
    low, high = (None, None) if interval is None else interval
    ratio = finetuned.metric.ratio(grafted.value, finetuned.value)
    # Without a ratio nothing is left to recover.
    recovered, bound = (
        (1.0, 1.0) if ratio is None else (ratio, finetuned.rows.ratio_bound(grafted.rows))
    )
    return Look(kept, share, grafted.value, recovered, low, high, bound)
