"""Another method on the members of a line, which stays as it is.

What the method needs of each member is localized once and kept under the key of all that it
depends on. Methods that need whole task vectors get them, whatever the line keeps; the others get
the line's own deltas, or dataless ones where the line keeps everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.methods import Method, get_method, resolve_settings
from registry.head import Head, Member
from registry.localize_spec import LocalizeSpec
from registry.specs import MethodSpec
from tasks.localize import localize
from tasks.refs import LineRef
from tasks.tune import Tuned, tune


@dataclass(frozen=True)
class Prepared:
    """A method with its settings, and what it needs of each member.

    Attributes:
        line: as if the method were its own, with the tuned setting.
        members: with the deltas that the method merges.
        stored: bytes of these in the store.
        choice: what tuning found, where it was asked for and there was something to tune.
    """

    line: LineRef
    members: tuple[Member, ...]
    stored: int
    choice: Tuned | None = None


def prepare(
    head: Head,
    members: tuple[Member, ...],
    method: Method,
    tuned: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Prepared:
    """Localize what a method needs, and choose its setting where that is asked for.

    Args:
        head: of the line.
        members: what is merged.
        method: any.
        tuned: choose the setting that the method tunes on validation rows.
        settings: what differs from its defaults; by default what the line says of it, if it is
            the line's own.

    Raises:
        BadInput: a setting is unknown, a finetuned model is gone, there are no rows to tune on.
    """
    line = _line_with(head, method, settings)
    given = [_with_delta(line, member) for member in members]
    ready = Prepared(line, tuple(member for member, _ in given), sum(size for _, size in given))
    if not tuned or method.tunes is None:
        return ready
    choice = tune(line, ready.members, method)
    chosen = {**line.spec.method.settings, choice.setting: choice.value}
    line = LineRef(line.spec.with_method_settings(chosen), line.base)
    return Prepared(line, ready.members, ready.stored, choice)


def _line_with(head: Head, method: Method, settings: Mapping[str, Any] | None) -> LineRef:
    """The line as if a method were its own."""
    spec = head.spec
    given = settings
    if given is None:
        given = spec.method.settings if spec.method.name == method.name else {}
    resolved = resolve_settings(method.name, given)
    keeps_all = get_method(spec.method.name).whole or spec.localize.density == 1.0
    among = {"include": spec.localize.include, "exclude": spec.localize.exclude}
    kept = spec.localize
    if method.whole:
        kept = LocalizeSpec(mode="dataless", density=1.0).model_copy(update=among)
    elif keeps_all:
        kept = LocalizeSpec(mode="dataless").model_copy(update=among)
    chosen = {"method": MethodSpec(name=method.name, settings=resolved), "localize": kept}
    return LineRef(spec.model_copy(update=chosen), head.base)


def _with_delta(line: LineRef, member: Member) -> tuple[Member, int]:
    """A member with the delta that a method needs of it, and the bytes of that."""
    delta = localize(line, member.spec, member.model.model)
    model = member.model.model_copy(update={"mask": delta.mask, "delta": delta.blob})
    return member.model_copy(update={"model": model}), delta.size
