"""Comparison of a finetuned checkpoint with its base: names, shapes and types.

`compare` matches names up to one common prefix on either side and lists all differences;
it raises only if the match itself is ambiguous. `Comparison.problems` lists the reasons
why the model cannot join: localizable tensors are missing, shapes differ, or a tensor
holds weights on one side and integers on the other. A subset of the tensors is allowed
if it holds all required ones, and so is any mix of float types.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from restitch.merging.errors import CannotJoin
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.header import DTYPE_NAMES
from restitch.merging.order import by_bytes


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; all lists are sorted by name.

    Attributes:
        mapping: finetuned name to base name, for every tensor that both hold.
        missing: tensors of the base that the finetuned checkpoint lacks.
        missing_required: the missing tensors that are localizable.
        unexpected: tensors of the finetuned checkpoint that the base lacks.
        other_shape: tensors whose shapes differ.
        other_dtype: tensors whose types differ.
        other_kind: tensors that are weights on one side only.
    """

    mapping: Mapping[str, str]
    missing: tuple[str, ...]
    missing_required: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]
    other_dtype: tuple[str, ...]
    other_kind: tuple[str, ...]

    def problems(self) -> list[str]:
        """All reasons why the model cannot join; empty if it can."""
        return [
            *(f"missing: {name}" for name in self.missing_required),
            *(f"shape differs: {item}" for item in self.other_shape),
            *(f"kind of numbers differs: {item}" for item in self.other_kind),
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
        required: the base's names of the localizable tensors, which joining needs.
        prefixes: prefixes that the names of either side may have.
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

    def required_pairs(candidate: dict[str, str]) -> set[tuple[str, str]]:
        return {item for item in candidate.items() if item[1] in required}

    def score(candidate: dict[str, str]) -> tuple[int, int]:
        return len({new for _, new in required_pairs(candidate)}), len(candidate)

    best = max(candidates, key=score)  # the first of equals: unchanged names win
    rivals = [
        c
        for c in candidates
        if score(c)[0] == score(best)[0] and required_pairs(c) != required_pairs(best)
    ]
    if rivals and score(best)[0]:
        raise CannotJoin(
            "the finetuned tensors match the base's in more than one way",
            expected="one common prefix on either side",
            found=_examples([best, *rivals], required),
            hint="save the finetuned model with the tensor names of its base",
        )
    return _injective(best)


def _renamed(known: frozenset[str], names: Mapping[str, str]) -> dict[str, str]:
    """Map finetuned names to base names: the new name if the base has it, else the name itself."""
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
                expected="one finetuned tensor for each tensor of the base",
                found=f"{back[ours]}, {theirs}",
                hint="save the finetuned model with the tensor names of its base",
            )
        back[ours] = theirs
    return mapping


def _examples(candidates: Iterable[dict[str, str]], required: frozenset[str]) -> str:
    pairs = {
        min(item for item in candidate.items() if item[1] in required) for candidate in candidates
    }
    return "; ".join(f"{theirs} as {ours}" for theirs, ours in sorted(pairs))
