"""Prepare a merge of a line's members by another method; the line stays as it is.

The deltas that the method needs are stored. A method that needs whole task vectors gets them from
the finetuned models. Other methods get the line's own deltas, or dataless ones if the
line's deltas hold everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from restitch.merging.localize.subspace import NAME as SUBSPACE
from restitch.merging.methods.registry import Method, get_method, resolve_settings
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.method import MethodSpec
from restitch.tasks.localize import localize
from restitch.tasks.research.tune import Tuned, tune
from restitch.tasks.runtime.refs import DeltaRef, LineRef, StatisticRef
from restitch.tasks.statistics import statistics


@dataclass(frozen=True)
class WhatIf:
    """Members that are ready for a merge by a method.

    Attributes:
        line: the line with the method, its settings, and its choice of masks.
        members: the members with the `deltas` that the method merges.
        statistics: the statistics that the method needs, by their names in a recipe.
        choice: the result of tuning, if it was asked for and the method has a setting to tune.
    """

    line: LineRef
    members: tuple[Member, ...]
    deltas: tuple[DeltaRef, ...]
    statistics: Mapping[str, StatisticRef] = field(default_factory=dict)
    choice: Tuned | None = None

    @property
    def stored(self) -> int:
        """The bytes of deltas and statistics in the store."""
        of_statistics = sum(each.size for each in self.statistics.values())
        return of_statistics + sum(delta.size for delta in self.deltas)


def prepare(
    line: LineRef,
    members: Iterable[Member],
    method: Method,
    *,
    tuned: bool = False,
    masks: LocalizeSpec | None = None,
    settings: Mapping[str, Any] | None = None,
) -> WhatIf:
    """Localize members and measure statistics as a method needs them, and tune it if asked.

    By default the masks are those of the method, or else the line's, and the settings are the
    line's, if the method is the line's own.

    Raises:
        BadInput: a setting is unknown, a finetuned model is gone, or a task lacks the rows that
            the method needs or is tuned on.
    """
    line = _line_with(line, method, masks, settings)
    given = tuple(members)
    deltas = tuple(localize(line, member.spec, member.model.model) for member in given)
    ready = tuple(_with(member, delta) for member, delta in zip(given, deltas, strict=True))
    what_if = WhatIf(line, ready, deltas, statistics(line, ready))
    if not tuned or method.tunes is None:
        return what_if
    choice = tune(line, ready, method)
    chosen = {**line.spec.method.settings, choice.setting: choice.value}
    best = LineRef(line.spec.with_method_settings(chosen), line.base)
    return replace(what_if, line=best, choice=choice)


def masks_like(spec: LineSpec, **choice: Any) -> LocalizeSpec:
    """A choice of masks with the line's tensors, rows, seed and values."""
    same = ["include", "exclude", "shots", "seed"]
    if spec.localize.mode != SUBSPACE:
        same.append("values")
    return LocalizeSpec(**{name: getattr(spec.localize, name) for name in same} | choice)


def everything(spec: LineSpec) -> LocalizeSpec:
    """The choice of masks that keeps whole task vectors exactly."""
    return masks_like(spec, mode="dataless", density=1.0, values="exact")


def _line_with(
    line: LineRef,
    method: Method,
    masks: LocalizeSpec | None,
    settings: Mapping[str, Any] | None,
) -> LineRef:
    """The line with another method, its settings and its choice of masks."""
    spec = line.spec
    resolved = resolve_settings(
        method.name, own_settings(line, method) if settings is None else settings
    )
    is_subspace = spec.localize.mode == SUBSPACE
    keeps_all = get_method(spec.method.name).whole or spec.localize.density == 1.0
    if masks is None and method.whole:
        masks = spec.localize if is_subspace else everything(spec)
    elif masks is None:
        masks = masks_like(spec, mode="dataless") if keeps_all else spec.localize
    chosen = {"method": MethodSpec(name=method.name, settings=resolved), "localize": masks}
    return LineRef(spec.model_copy(update=chosen), line.base)


def own_settings(line: LineRef, method: Method) -> Mapping[str, Any]:
    """The line's settings of a method, if the method is the line's own."""
    own = line.spec.method
    return own.settings if own.name == method.name else {}


def _with(member: Member, delta: DeltaRef) -> Member:
    """The member with another delta."""
    model = member.model.model_copy(update={"mask": delta.mask, "delta": delta.blob})
    return member.model_copy(update={"model": model})
