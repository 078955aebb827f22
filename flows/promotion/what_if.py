"""Another method on members of a line, which stays as it is.

What the method needs of each member is found once and kept under the key of all that it depends
on. Methods that need whole task vectors get them, whatever the line keeps; the others get the
line's own deltas, or dataless ones where the line keeps everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from restitch.merging.methods.registry import Method, get_method, resolve_settings
from restitch.registry.ledger.line_state import Member
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.method import MethodSpec
from restitch.tasks.localize import localize
from restitch.tasks.research.tune import Tuned, tune
from restitch.tasks.runtime.refs import DeltaRef, LineRef, StatisticRef
from restitch.tasks.statistics import statistics


@dataclass(frozen=True)
class Trial:
    """Some members, ready to be merged in some way.

    Attributes:
        line: with the method, its settings, and how masks are found.
        members: with the deltas that the method merges.
        deltas: how these were found.
        statistics: what the method needs beside them, by the name that a recipe gives it.
        choice: what tuning found, where it was asked for and there was something to tune.
    """

    line: LineRef
    members: tuple[Member, ...]
    deltas: tuple[DeltaRef, ...]
    statistics: Mapping[str, StatisticRef] = field(default_factory=dict)
    choice: Tuned | None = None

    @property
    def stored(self) -> int:
        """Bytes of what the method needs of the members, in the store."""
        of_statistics = sum(found.size for found in self.statistics.values())
        return of_statistics + sum(delta.size for delta in self.deltas)


def prepare(
    line: LineRef,
    members: Iterable[Member],
    method: Method,
    *,
    tuned: bool = False,
    masks: LocalizeSpec | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trial:
    """Find what a method needs of members, and its setting where that is asked for.

    Args:
        line: with one method.
        members: what is merged.
        method: any.
        tuned: choose the setting that the method tunes on validation rows.
        masks: how masks are found; by default what the method needs, else as in the line.
        settings: what differs from its defaults; by default what the line says of it, if it is
            the line's own.

    Raises:
        BadInput: a setting is unknown, a finetuned model is gone, a task lacks the rows that the
            method needs or is to be tuned on.
    """
    line = _line_with(line, method, masks, settings)
    given = tuple(members)
    deltas = tuple(localize(line, member.spec, member.model.model) for member in given)
    ready = tuple(_with(member, delta) for member, delta in zip(given, deltas, strict=True))
    trial = Trial(line, ready, deltas, statistics(line, ready))
    if not tuned or method.tunes is None:
        return trial
    choice = tune(line, ready, method)
    chosen = {**line.spec.method.settings, choice.setting: choice.value}
    best = LineRef(line.spec.with_method_settings(chosen), line.base)
    return replace(trial, line=best, choice=choice)


def masks_like(spec: LineSpec, **choice: Any) -> LocalizeSpec:
    """How masks are found in a line, otherwise where `choice` says so."""
    kept = ("include", "exclude", "shots", "seed", "values")
    return LocalizeSpec(**{name: getattr(spec.localize, name) for name in kept} | choice)


def everything(spec: LineSpec) -> LocalizeSpec:
    """Whole task vectors, to the bit."""
    return masks_like(spec, mode="dataless", density=1.0, values="exact")


def _line_with(
    line: LineRef,
    method: Method,
    masks: LocalizeSpec | None,
    settings: Mapping[str, Any] | None,
) -> LineRef:
    """The line as if a method were its own."""
    spec = line.spec
    given = own_settings(line, method) if settings is None else settings
    resolved = resolve_settings(method.name, given)
    keeps_all = get_method(spec.method.name).whole or spec.localize.density == 1.0
    if masks is None and method.whole:
        masks = everything(spec)
    elif masks is None:
        masks = masks_like(spec, mode="dataless") if keeps_all else spec.localize
    chosen = {"method": MethodSpec(name=method.name, settings=resolved), "localize": masks}
    return LineRef(spec.model_copy(update=chosen), line.base)


def own_settings(line: LineRef, method: Method) -> Mapping[str, Any]:
    """What a line says of a method, if it is the line's own."""
    own = line.spec.method
    return own.settings if own.name == method.name else {}


def _with(member: Member, delta: DeltaRef) -> Member:
    """A member with the delta that a method merges."""
    model = member.model.model_copy(update={"mask": delta.mask, "delta": delta.blob})
    return member.model_copy(update={"model": model})
