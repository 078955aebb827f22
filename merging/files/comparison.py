"""How a finetuned checkpoint lines up with its base: names, shapes and types.

`compare` matches names up to one common prefix on either side and lists everything that
differs; it raises only where the match itself is ambiguous. What makes joining
impossible is `Comparison.problems`: localizable tensors that are missing, shapes that
differ, weights on one side and integers on the other. A subset is fine as long as all
required tensors are there, and so is any mix of float types.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from restitch.merging.errors import CannotJoin
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.header import DTYPE_NAMES
from restitch.merging.order import by_bytes


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; all lists are readable and sorted by name.

    Attributes:
        mapping: finetuned name to base name, for every tensor that both hold.
        missing: tensors of the base that the finetuned checkpoint lacks.
        missing_required: those of them that are localizable.
        unexpected: tensors of the finetuned checkpoint that the base lacks.
        other_shape: tensors of another shape.
        other_dtype: tensors of another type.
        other_kind: those of them that are weights on one side only.
    """

    mapping: Mapping[str, str]
    missing: tuple[str, ...]
    missing_required: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]
    other_dtype: tuple[str, ...]
    other_kind: tuple[str, ...]

    def problems(self) -> list[str]:
        """What makes joining impossible, everything at once; empty when it can join."""
        return [
            *(f"missing: {name}" for name in self.missing_required),
            *(f"other shape: {item}" for item in self.other_shape),
            *(f"other kind of numbers: {item}" for item in self.other_kind),
        ]


def compare(
    base: Checkpoint,
    finetuned: Checkpoint,
    required: Sequence[str],
    prefixes: Sequence[str] = (),
) -> Comparison:
    """Match the tensors of `finetuned` with those of `base`.

    Args:
        base: the base's checkpoint.
        finetuned: the finetuned one; it may hold a subset.
        required: names in the base that joining needs: the localizable tensors.
        prefixes: prefixes that either side may have in front of its names.
    """
    mapping = _match(base.names, finetuned.names, frozenset(required), prefixes)
    matched = set(mapping.values())
    shapes, dtypes, kinds = [], [], []
    for theirs, ours in sorted(mapping.items(), key=lambda item: by_bytes(item[1])):
        ft, b = finetuned.info(theirs), base.info(ours)
        if ft.shape != b.shape:
            shapes.append(f"{ours}: base {list(b.shape)}, finetuned {list(ft.shape)}")
        if ft.dtype != b.dtype:
            item = f"{ours}: base {DTYPE_NAMES[b.dtype]}, finetuned {DTYPE_NAMES[ft.dtype]}"
            dtypes.append(item)
            if (ft.dtype in FLOATING) != (b.dtype in FLOATING):
                kinds.append(item)
    return Comparison(
        mapping=mapping,
        missing=tuple(name for name in base.names if name not in matched),
        missing_required=tuple(sorted(set(required) - matched, key=by_bytes)),
        unexpected=tuple(name for name in finetuned.names if name not in mapping),
        other_shape=tuple(shapes),
        other_dtype=tuple(dtypes),
        other_kind=tuple(kinds),
    )


def _match(
    ours: Sequence[str], theirs: Sequence[str], required: frozenset[str], prefixes: Sequence[str]
) -> dict[str, str]:
    known = frozenset(ours)
    candidates = [{name: name for name in theirs if name in known}]
    for prefix in prefixes:
        candidates.append(_renamed(known, {name: prefix + name for name in theirs}))
        candidates.append(_renamed(known, {name: name.removeprefix(prefix) for name in theirs}))

    def wanted(candidate: dict[str, str]) -> set[tuple[str, str]]:
        return {item for item in candidate.items() if item[1] in required}

    def score(candidate: dict[str, str]) -> tuple[int, int]:
        return len({new for _, new in wanted(candidate)}), len(candidate)

    best = max(candidates, key=score)  # the first of equals: names as they are win
    rivals = [c for c in candidates if score(c)[0] == score(best)[0] and wanted(c) != wanted(best)]
    if rivals and score(best)[0]:
        raise CannotJoin(
            "the finetuned tensors match the base's in more than one way",
            expected="one common prefix on either side",
            found=_examples([best, *rivals], required),
            hint="save the finetuned model with the names of its base",
        )
    return _injective(best)


def _renamed(known: frozenset[str], names: Mapping[str, str]) -> dict[str, str]:
    """The base's names of finetuned tensors: the new ones where it has them, or as they are."""
    mapping = {}
    for name, new in names.items():
        if new in known:
            mapping[name] = new
        elif name in known:
            mapping[name] = name
    return mapping


def _injective(mapping: dict[str, str]) -> dict[str, str]:
    back: dict[str, str] = {}
    for theirs, ours in mapping.items():
        if ours in back:
            raise CannotJoin(
                f"two finetuned tensors match the base's {ours!r}",
                expected="one",
                found=f"{back[ours]}, {theirs}",
                hint="save the finetuned model with the names of its base",
            )
        back[ours] = theirs
    return mapping


def _examples(candidates: Iterable[dict[str, str]], required: frozenset[str]) -> str:
    pairs = {
        min(item for item in candidate.items() if item[1] in required) for candidate in candidates
    }
    return "; ".join(f"{theirs} as {ours}" for theirs, ours in sorted(pairs))
