"""The input and the output of a study: the members of a line, and a table.

A study merges some of the members and measures the result on the rows that results are reported
on. It runs the same steps as a merge, which keep their results in the store.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from restitch.flows.promotion.snapshot import Snapshot
from restitch.flows.promotion.what_if import WhatIf, own_settings, prepare
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import Method, get_method
from restitch.modeling.families.family import Family, get_family
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import mean_of
from restitch.registry.specs.localize import LocalizeSpec
from restitch.tasks.evaluate import evaluate
from restitch.tasks.gain import gain_over_base
from restitch.tasks.inputs.task_data import evaluation_split, has_validation
from restitch.tasks.merge import make_recipe, stitch
from restitch.tasks.report.drawing import Plot
from restitch.tasks.runtime.refs import LineRef, PatchRef, ResultRef, WeightsRef
from restitch.tasks.runtime.workspace import workspace

STITCHING = "localize-and-stitch"
NOT_TUNED = "coefficients have their defaults: not every task has validation rows"


@dataclass(frozen=True)
class Study:
    """The table of a study, whose rows have the same columns.

    Attributes:
        notes: remarks on how the table was made.
        details: the columns that a terminal leaves out.
    """

    rows: Sequence[Mapping[str, Any]]
    plots: Sequence[Plot]
    notes: Sequence[str] = ()
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Reached:
    """The accuracy of a merged model.

    Attributes:
        finetuned: the accuracy of each finetuned model that can still be read and is better than
            the base, by task.
    """

    patch: PatchRef
    tasks: Mapping[str, ResultRef]
    finetuned: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over the tasks, on the scale of `Metric.worth`."""
        worths = [result.measure.worth(result.value) for result in self.tasks.values()]
        return sum(worths) / len(worths)

    @property
    def normalized(self) -> float | None:
        """The mean normalized accuracy of the tasks whose finetuned model has a gain."""
        own = {task: (self.tasks[task], value) for task, value in self.finetuned.items()}
        return mean_of(one.measure.ratio(one.value, value) for one, value in own.values())

    def values(self) -> dict[str, Any]:
        """The columns that every study of merged models has."""
        by_task = {task: result.value for task, result in self.tasks.items()}
        return {"mean": self.mean, "normalized": self.normalized, **by_task}


@dataclass(frozen=True)
class Subject:
    """The members of a line that a study measures."""

    snapshot: Snapshot

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise BadInput(
                f"line {self.line.spec.line} has too few members for a study",
                expected="two members in use with rows to evaluate on",
                found=", ".join(member.task for member in self.members) or "none",
                hint="register models whose tasks have data",
            )

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The members of the version in use that can be evaluated, by task name."""
        everyone = self.snapshot.champion_members
        return tuple(m for m in everyone if evaluation_split(m.spec) is not None)

    @property
    def left_out(self) -> list[str]:
        """The tasks of the members without rows to evaluate on."""
        everyone = self.snapshot.champion_members
        return [m.task for m in everyone if evaluation_split(m.spec) is None]

    @property
    def line(self) -> LineRef:
        """The line with the method in use."""
        return self.snapshot.line_in_use

    @cached_property
    def family(self) -> Family:
        """The line's family."""
        return get_family(self.line.spec.family)

    @property
    def method(self) -> Method:
        """The method in use."""
        return get_method(self.line.spec.method.name)

    def with_own(self, *names: str) -> list[Method]:
        """The method in use, and the others with these names."""
        own = self.method
        return [own, *(get_method(name) for name in names if name != own.name)]

    @property
    def sparse_method(self) -> Method:
        """The line's method if it merges sparse deltas, otherwise localize-and-stitch."""
        return get_method(STITCHING) if self.method.whole else self.method

    @property
    def can_tune(self) -> bool:
        """True if every task has validation rows, on which settings are chosen."""
        return all(has_validation(member.spec, self.family) for member in self.members)

    def prepare(
        self,
        method: Method,
        members: Iterable[Member],
        *,
        masks: LocalizeSpec | None = None,
        settings: Mapping[str, Any] | None = None,
        tuned: bool = False,
    ) -> WhatIf:
        """Prepare a merge of members by a method that gives one merged model.

        `settings` change the method's defaults, or the line's if the method is its own. The method
        is tuned only if all tasks have validation rows. The rest is as for `what_if.prepare`.
        """
        chosen = {**own_settings(self.line, method), **(settings or {})}
        tuned = tuned and self.can_tune
        return prepare(self.line, members, method, tuned=tuned, masks=masks, settings=chosen)

    def reached(self, what_if: WhatIf) -> Reached:
        """The accuracy of a merged model on the rows that results are reported on."""
        patch = stitch(what_if.line, make_recipe(what_if.line, what_if.members))
        return self.reached_with(patch, what_if.members)

    def reached_with(self, patch: PatchRef, members: Iterable[Member]) -> Reached:
        """The accuracy of the base with a patch on members' tasks."""
        merged = WeightsRef("merged", patch.blob)
        results, finetuned = {}, {}
        for member in members:
            model = member.model.model
            results[member.task] = evaluate(self.line, member.spec, merged, model)
            weights = WeightsRef("finetuned", model.weights, model.uri)
            with suppress(BadInput):  # its files may be gone: the merge does not need them
                own = evaluate(self.line, member.spec, weights, model)
                base = evaluate(self.line, member.spec, WeightsRef("base"), model)
                if gain_over_base(workspace().objects, base, own).verdict == "better":
                    finetuned[member.task] = own.value
        return Reached(patch, results, finetuned)
