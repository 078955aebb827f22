"""The errors that a user can meet, each with the exit code of its kind.

Every message names the thing, what was expected, what was found and what to do. A
`RestitchError` has its cause in the input or the environment and is shown without a
traceback; any other exception is a bug.
"""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Self, TypeVar

# The lines of a list that a message shows; it counts the others.
MOST_LINES = 5


def shortlist(names: Collection[str]) -> str:
    """The first names of a list, and the number of the others."""
    shown = ", ".join(list(names)[:MOST_LINES])
    more = len(names) - MOST_LINES
    return f"{shown} and {more} more" if more > 0 else shown


def counted(number: int, noun: str) -> str:
    """A number with its noun, which takes an s in the plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


E = TypeVar("E", bound="RestitchError")


class RestitchError(Exception):
    """An error that is explained to the user.

    Args:
        summary: the thing and what is wrong with it, one sentence.
        expected: the correct value or state.
        found: the actual value or state.
        hint: what the user can do.
        details: more lines, for instance every differing tensor; the message shows the first
            five and counts the others.
    """

    exit_code = 1

    def __init__(
        self,
        summary: str,
        *,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        self.summary = summary
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint
        self.details = tuple(details)
        super().__init__(self.message())

    def message(self) -> str:
        """The whole message, one fact per line."""
        lines = [self.summary]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.found is not None:
            lines.append(f"  found:    {self.found}")
        lines.extend(f"  - {detail}" for detail in self.details[:MOST_LINES])
        if len(self.details) > MOST_LINES:
            lines.append(f"  - and {len(self.details) - MOST_LINES} more")
        if self.hint is not None:
            lines.append(f"  to do:    {self.hint}")
        return "\n".join(lines)

    def renamed(self, old: str, new: str) -> Self:
        """The same error with another name of the thing, such as an address for a cached folder."""
        texts = [
            None if text is None else text.replace(old, new)
            for text in (self.summary, self.expected, self.found, self.hint)
        ]
        details = [detail.replace(old, new) for detail in self.details]
        return type(self)(
            str(texts[0]), expected=texts[1], found=texts[2], hint=texts[3], details=details
        )

    def of_kind(self, kind: type[E]) -> E:
        """The same explanation as an error of another kind, with its exit code."""
        return kind(
            self.summary,
            expected=self.expected,
            found=self.found,
            hint=self.hint,
            details=self.details,
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect and process pools pickle exceptions; the default would lose the keywords.
        keywords = {name: getattr(self, name) for name in ("expected", "found", "hint", "details")}
        return partial(type(self), self.summary, **keywords), ()


class UsageError(RestitchError):
    """A command was called with wrong arguments or options."""

    exit_code = 2


class BadInput(RestitchError):  # noqa: N818
    """A file, a source or a specification cannot be used as it is."""

    exit_code = 3


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not among the known ones; it suggests the nearest."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return BadInput(
        f"unknown {kind}: {name!r}",
        expected=", ".join(names) or "none",
        found=name,
        hint=f"did you mean {near[0]!r}?" if near else "choose one of the expected names",
    )


class CannotJoin(RestitchError):  # noqa: N818
    """A finetuned model is readable but cannot join its line; it is quarantined."""

    exit_code = 4


class GateFailed(RestitchError):  # noqa: N818
    """A merged version or a joining member failed a gate of its line."""

    exit_code = 5


class Unavailable(RestitchError):  # noqa: N818
    """The store, a server or the disk is not available now."""

    exit_code = 6


class Damage(RestitchError):  # noqa: N818
    """A stored object does not match its digest or its format."""

    exit_code = 7
