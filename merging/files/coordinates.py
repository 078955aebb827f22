"""Selection of the localizable tensors of a checkpoint.

Patterns are case-sensitive shell globs on whole tensor names, in which `*` also matches
dots. `include` adds to the family's default; `exclude` removes and wins. A pattern of the
user that matches no tensor is an error: ignoring it would select the wrong tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from restitch.merging.errors import BadInput
from restitch.merging.order import by_bytes


@dataclass(frozen=True)
class Selection:
    """Globs on tensor names.

    Attributes:
        default: the family's globs.
        include: globs that add tensors.
        exclude: globs that remove tensors.
    """

    default: Sequence[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def matches(self, name: str) -> bool:
        """True if the globs select a name."""
        return any(fnmatchcase(name, glob) for glob in (*self.default, *self.include)) and not any(
            fnmatchcase(name, glob) for glob in self.exclude
        )


def select_tensors(
    names: Iterable[str],
    default: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """The localizable tensors among `names`, sorted.

    Args:
        names: the tensors to choose from: `Checkpoint.floating`, since integer buffers are
            never localizable.
        default: the family's globs.
        include: globs that add tensors.
        exclude: globs that remove tensors.
    """
    names = sorted(set(names), key=by_bytes)
    found = f"{len(names)} tensors, for instance {', '.join(names[:3])}"
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(
                f"the pattern {pattern!r} matches no tensor",
                expected="a glob that matches a tensor name",
                found=found,
                hint="correct or remove it in localize: include or exclude",
            )
    selection = Selection(default, include, exclude)
    chosen = [name for name in names if selection.matches(name)]
    if not chosen:
        raise BadInput(
            "no tensor is localizable",
            expected=f"tensors that match {', '.join((*default, *include))}",
            found=found,
            hint="check the family of the line, and localize: include and exclude",
        )
    return chosen


def covering_globs(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Short globs that match all of `names` and none of `others`: shared prefixes, or whole names.

    Args:
        names: the tensors to match.
        others: the tensors not to match.
    """
    avoided = tuple(others)
    globs: list[str] = []
    for name in sorted(set(names), key=by_bytes):
        if any(fnmatchcase(name, glob) for glob in globs):
            continue
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) + "." for end in range(1, len(parts)))
        free = (p for p in prefixes if not any(other.startswith(p) for other in avoided))
        prefix = next(free, None)
        globs.append(name if prefix is None else f"{prefix}*")
    return tuple(globs)
