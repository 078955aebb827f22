"""Merge methods: one file each in this folder, with one decorated function.

A method is a function `(inputs, *, setting=default, ...) -> Edits`, or `-> Experts` if it gives one
model for each task. Its keyword parameters, with their types and defaults, are its settings. The
folder is scanned when a method is first used, so a new method needs only a new file
(docs/how-to/add-a-method.md).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from restitch.merging.errors import BadInput, unknown_name
from restitch.merging.experts.specialists import Experts
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.stitch import DeltaMember

_F = TypeVar("_F", bound=Callable[..., Edits | Experts])
KINDS = ("merged", "experts")
_REGISTERED: dict[str, "Method"] = {}


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: its name in a line's file.
        version: raised whenever the same input gives different bytes.
        source: the paper or code that it follows.
        exact: True if the result has the same bytes on every machine.
        kind: `merged` for one model for all tasks, `experts` for one model for each task.
        whole: True if it needs whole task vectors: deltas that keep every coordinate.
        needs: the statistics of each member that it needs in addition to its delta, measured on
            the train rows of its task (`DeltaMember.statistics`).
        tunes: the setting to tune on request, with the values to try.
        settings: its settings with their defaults.
        added: the settings that the first release of this version did not have.
    """

    name: str
    version: int
    source: str
    exact: bool
    kind: str
    whole: bool
    needs: tuple[str, ...]
    tunes: tuple[str, tuple[float, ...]] | None
    settings: Mapping[str, Any]
    added: tuple[str, ...]
    function: Callable[..., Edits | Experts] = field(repr=False)

    def __call__(self, base: Checkpoint, members: Iterable[DeltaMember], **settings: Any) -> Edits:
        """Merge the members, in any order, with settings by name.

        Raises:
            BadInput: the method gives one model for each task.
        """
        if self.kind != "merged":
            raise BadInput(
                f"the method {self.name} gives no merged model",
                expected="a method that gives one model for all tasks",
                found=f"{self.name}, which gives one for each task",
                hint="choose another method for the line; "
                f"`restitch experts` and `restitch compare --methods {self.name}` use this one",
            )
        return cast(Edits, self.function(MergeInputs(base, members), **settings))

    def experts(self, base: Checkpoint, members: Iterable[DeltaMember], **settings: Any) -> Experts:
        """Make one model per task; see `__call__`."""
        if self.kind != "experts":
            raise ValueError(f"the method {self.name} gives no experts")
        return cast(Experts, self.function(MergeInputs(base, members), **settings))


def method(
    *,
    name: str,
    version: int,
    source: str,
    exact: bool,
    kind: str = "merged",
    whole: bool = False,
    needs: tuple[str, ...] = (),
    tunes: tuple[str, tuple[float, ...]] | None = None,
    added: tuple[str, ...] = (),
) -> Callable[[_F], _F]:
    """Register the decorated function as the merge method `name`."""

    def register(function: _F) -> _F:
        keywords = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        bare = [item.name for item in keywords if item.default is inspect.Parameter.empty]
        if bare or name in _REGISTERED:
            raise ValueError(f"method {name!r}: registered twice, or no default for {bare}")
        settings = {item.name: item.default for item in keywords}
        if kind not in KINDS:
            raise ValueError(f"method {name!r} has the unknown kind {kind!r}")
        if tunes is not None and tunes[0] not in settings:
            raise ValueError(f"method {name!r} has no setting {tunes[0]!r} to tune")
        _REGISTERED[name] = Method(
            name, version, source, exact, kind, whole, needs, tunes, settings, added, function
        )
        return function

    return register


@cache
def _scan() -> Mapping[str, Method]:
    folder = str(Path(__file__).parent)
    for module in sorted(pkgutil.iter_modules([folder]), key=lambda item: item.name):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def method_names() -> list[str]:
    """The names of all methods."""
    return list(_scan())


def get_method(name: str) -> Method:
    """The method `name`; `BadInput` with the nearest name if it does not exist."""
    methods = _scan()
    if name not in methods:
        raise unknown_name("method", name, methods)
    return methods[name]


def resolve_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types of a method's settings and fill in its defaults.

    An added setting with its default is left out, so that recipes of before keep their digest.
    """
    chosen = get_method(name)
    for key, value in settings.items():
        if key not in chosen.settings:
            raise unknown_name(f"setting of {name}", key, chosen.settings)
        expected = get_type_hints(chosen.function)[key]
        if not _fits(value, expected):
            raise BadInput(
                f"the setting {key!r} of {name} has the wrong type",
                expected=getattr(expected, "__name__", str(expected)),
                found=f"{value!r} ({type(value).__name__})",
                hint=f"the default is {chosen.settings[key]!r}",
            )
    usual = {key: chosen.settings[key] for key in chosen.added}
    return {
        key: value
        for key, value in {**chosen.settings, **settings}.items()
        if key not in usual or value != usual[key]
    }


def _fits(value: object, expected: Any) -> bool:
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected in (int, str, bool):
        return type(value) is expected
    return True
