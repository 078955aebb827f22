"""What a study is about and what it hands back: the members of a line, and a table.

A study merges some of the members in some way and measures that on the rows that results are
reported on. Whatever it makes is a step of a merge, and kept like one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from restitch.flows.promotion.snapshot import Snapshot
from restitch.flows.promotion.what_if import Trial, everything, masks_like, own_settings, prepare
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import Method, get_method
from restitch.modeling.families.family import Family, get_family
from restitch.registry.ledger.line_state import Member
from restitch.registry.specs.localize import LocalizeSpec
from restitch.tasks.evaluate import evaluate
from restitch.tasks.inputs.task_data import evaluation_split, has_validation
from restitch.tasks.merge import make_recipe, stitch
from restitch.tasks.report.drawing import Plot
from restitch.tasks.runtime.refs import LineRef, PatchRef, ResultRef, WeightsRef

STITCHING = "localize-and-stitch"


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        rows: of its table, all with the same columns.
        plots: of the rows.
        notes: what a reader must know of how it was made.
        details: columns that a table for a terminal goes without.
    """

    rows: Sequence[Mapping[str, Any]]
    plots: Sequence[Plot]
    notes: Sequence[str] = ()
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Reached:
    """What a merged model reaches.

    Attributes:
        tasks: by task.
        finetuned: what the finetuned models reach, of those that can still be read.
    """

    patch: PatchRef
    tasks: Mapping[str, ResultRef]
    finetuned: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return sum(found.value for found in self.tasks.values()) / len(self.tasks)

    @property
    def normalized(self) -> float | None:
        """Merged over finetuned, over the tasks whose finetuned model was measured."""
        ratios = [self.tasks[task].value / value for task, value in self.finetuned.items() if value]
        return sum(ratios) / len(ratios) if ratios else None

    def values(self) -> dict[str, Any]:
        """The columns that every study of merged models has."""
        each = {task: found.value for task, found in self.tasks.items()}
        return {"mean": self.mean, "normalized": self.normalized, **each}


@dataclass(frozen=True)
class Subject:
    """The members of a line that a study is made of.

    Attributes:
        snapshot: of the line.
        left_out: members without rows to evaluate on.
    """

    snapshot: Snapshot
    left_out: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        without = [m.task for m in self._all if evaluation_split(m.spec) is None]
        object.__setattr__(self, "left_out", tuple(without))
        if len(self.members) < 2:
            raise BadInput(
                f"line {self.line.spec.line} has too few members for a study",
                expected="two members in use with rows to evaluate on",
                found=", ".join(member.task for member in self.members) or "none",
                hint="register models whose tasks have data",
            )

    @property
    def _all(self) -> tuple[Member, ...]:
        return self.snapshot.champion_members

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Those of the version in use that can be measured, by the names of their tasks."""
        return tuple(m for m in self._all if evaluation_split(m.spec) is not None)

    @property
    def line(self) -> LineRef:
        """The line with the method in use."""
        return self.snapshot.line_in_use

    @cached_property
    def family(self) -> Family:
        """Of the line."""
        return get_family(self.line.spec.family)

    @property
    def method(self) -> Method:
        """The method in use."""
        return get_method(self.line.spec.method.name)

    @property
    def sparse_method(self) -> Method:
        """The line's method where it merges sparse deltas, otherwise localize-and-stitch."""
        return get_method(STITCHING) if self.method.whole else self.method

    @property
    def can_tune(self) -> bool:
        """Whether every task has rows to choose settings by."""
        return all(has_validation(member.spec, self.family) for member in self.members)

    def masks(self, **choice: Any) -> LocalizeSpec:
        """How masks are found in the line, otherwise where `choice` says so."""
        return masks_like(self.line.spec, **choice)

    def everything(self) -> LocalizeSpec:
        """Whole task vectors, to the bit."""
        return everything(self.line.spec)

    def prepare(
        self,
        method: Method,
        members: Iterable[Member],
        *,
        masks: LocalizeSpec | None = None,
        settings: Mapping[str, Any] | None = None,
        tuned: bool = False,
    ) -> Trial:
        """Find what a method needs of members, and its setting where that is asked for.

        Args:
            method: any that gives one merged model.
            members: which.
            masks: how masks are found; by default what the method needs, else as in the line.
            settings: what differs from the method's defaults, or from the line's where it is its
                own.
            tuned: choose the setting that it tunes on validation rows, where all have them.
        """
        chosen = {**own_settings(self.line, method), **(settings or {})}
        tuned = tuned and self.can_tune
        return prepare(self.line, members, method, tuned=tuned, masks=masks, settings=chosen)

    def reached(self, trial: Trial) -> Reached:
        """What the merged model of a trial reaches on the rows that results are reported on."""
        patch = stitch(trial.line, make_recipe(trial.line, trial.members))
        return self.reached_with(patch, trial.members)

    def reached_with(self, patch: PatchRef, members: Iterable[Member]) -> Reached:
        """What the base with a patch reaches on members' tasks, on the rows for reporting."""
        merged = WeightsRef("merged", patch.blob)
        found, whole = {}, {}
        for member in members:
            model = member.model.model
            found[member.task] = evaluate(self.line, member.spec, merged, model)
            finetuned = WeightsRef("finetuned", model.weights, model.uri)
            try:
                whole[member.task] = evaluate(self.line, member.spec, finetuned, model).value
            except BadInput:  # its folder may be gone: the merge does not need it
                continue
        return Reached(patch, found, whole)
