"""Comparison of a finetuned checkpoint with its base: names, shapes and types.

`compare` matches names and lists all differences; it raises only if the match itself is ambiguous.
Components that wrappers of PyTorch add to names are taken off, and so is any one prefix under which
the finetuned checkpoint holds every required tensor; a known prefix may also be on the base's side.
`Comparison.problems` lists the reasons why the model cannot join: localizable tensors are missing,
localizable layers have tensors that the base lacks, shapes differ, or a tensor holds weights on one
side and integers on the other. A subset of the tensors is allowed if it holds all required ones,
and so is any mix of float types. Embeddings and heads may have rows for tokens that the base lacks;
`Comparison.aligned` leaves these rows out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from restitch.merging.errors import CannotJoin
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.header import DTYPE_NAMES
from restitch.merging.files.plain_weights import described, is_buffer
from restitch.merging.order import by_bytes

# Components that torch.compile, FSDP, DeepSpeed, DistributedDataParallel and Opacus put into names.
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "module",
    "_module",
)
# Those that no model uses as a name of its own.
_WRAPPERS_ALONE = frozenset(WRAPPERS) - {"module", "_module"}
# Prefixes that wrappers put before all names; any other one must cover all required tensors.
_PREFIXES = ("base_model.model.", "base_model.", "model.")


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; all lists are sorted by name.

    Attributes:
        mapping: finetuned name to base name, for every tensor that both hold.
        missing: tensors of the base that the finetuned checkpoint lacks.
        missing_required: the missing tensors that are localizable.
        unexpected: tensors of the finetuned checkpoint that the base lacks.
        unexpected_inside: the unexpected tensors in localizable layers, with type and shape.
        other_shape: tensors whose shapes differ.
        other_dtype: tensors whose types differ.
        other_kind: tensors that are weights on one side only.
        more_rows: the base's shapes of the tensors that have more rows of a vocabulary.
        rows: the number of rows of these tensors in the finetuned checkpoint; None without any.
        renamed: a finetuned name and the base's name for it, if they differ for any tensor.
    """

    mapping: Mapping[str, str]
    missing: tuple[str, ...]
    missing_required: tuple[str, ...]
    unexpected: tuple[str, ...]
    unexpected_inside: tuple[str, ...]
    other_shape: tuple[str, ...]
    other_dtype: tuple[str, ...]
    other_kind: tuple[str, ...]
    more_rows: Mapping[str, tuple[int, ...]]
    rows: int | None
    renamed: tuple[str, str] | None = None

    def aligned(self, finetuned: Checkpoint) -> Checkpoint:
        """The finetuned tensors under the base's names and in its shapes."""
        return finetuned.renamed(self.mapping, self.more_rows)

    def problems(self) -> list[str]:
        """All reasons why the model cannot join; empty if it can."""
        return [
            *_alternating(
                [f"missing: {name}" for name in self.missing_required],
                [f"unexpected in a localizable layer: {item}" for item in self.unexpected_inside],
            ),
            *(f"shape differs: {item}" for item in self.other_shape),
            *(f"kind of numbers differs: {item}" for item in self.other_kind),
        ]


def compare(
    base: Checkpoint,
    finetuned: Checkpoint,
    required: Sequence[str],
    prefixes: Sequence[str] = (),
    localizable: Callable[[str], bool] = lambda _: True,
    vocabulary: int | None = None,
) -> Comparison:
    """Match the tensors of `finetuned` with those of `base`.

    Args:
        base: the base's checkpoint.
        finetuned: the finetuned one; it may hold a subset.
        required: the base's names of the localizable tensors, which joining needs.
        prefixes: prefixes that the names of either side may have.
        localizable: true for the names, in the form of the base's, that masks may select.
        vocabulary: the base's number of tokens, if it is a model of texts.
    """
    renaming = _choose(base.names, finetuned.names, frozenset(required), prefixes)
    mapping = _injective(renaming.mapping)
    matched = set(mapping.values())
    shapes, dtypes, kinds = [], [], []
    more_rows: dict[str, tuple[int, ...]] = {}
    rows: int | None = None
    for theirs, ours in sorted(mapping.items(), key=lambda item: by_bytes(item[1])):
        ft, b = finetuned.info(theirs), base.info(ours)
        tokens = _tokens(ours, b.shape, ft.shape, vocabulary)
        if tokens is not None and rows in (None, tokens):
            rows, more_rows[ours] = tokens, b.shape
        elif ft.shape != b.shape:
            turned = " (transposed)" if ft.shape == b.shape[::-1] else ""
            shapes.append(f"{ours}: base {list(b.shape)}, finetuned {list(ft.shape)}{turned}")
        if ft.dtype != b.dtype:
            item = f"{ours}: base {DTYPE_NAMES[b.dtype]}, finetuned {DTYPE_NAMES[ft.dtype]}"
            dtypes.append(item)
            if (ft.dtype in FLOATING) != (b.dtype in FLOATING):
                kinds.append(item)
    unexpected = tuple(name for name in finetuned.names if name not in mapping)
    layers = tuple(sorted({_layers_of(name) for name in required}))
    return Comparison(
        mapping=mapping,
        missing=tuple(name for name in base.names if name not in matched),
        missing_required=tuple(sorted(set(required) - matched, key=by_bytes)),
        unexpected=unexpected,
        unexpected_inside=tuple(
            described(finetuned.info(name))
            for name in unexpected
            if not is_buffer(finetuned.info(name))
            and (new := renaming.names[name]).startswith(layers)
            and localizable(new)
        ),
        other_shape=tuple(shapes),
        other_dtype=tuple(dtypes),
        other_kind=tuple(kinds),
        more_rows=more_rows,
        rows=rows,
        renamed=next((pair for pair in mapping.items() if pair[0] != pair[1]), None),
    )


def _tokens(
    name: str, ours: tuple[int, ...], theirs: tuple[int, ...], vocabulary: int | None
) -> int | None:
    """The rows of a finetuned tensor, if it differs only in having rows for more tokens.

    Embeddings and heads lie outside of the numbered layers.
    """
    inside = any(part.isdigit() for part in name.split("."))
    if vocabulary is None or inside or len(ours) != len(theirs) or ours == theirs:
        return None
    at = next(at for at, sizes in enumerate(zip(ours, theirs, strict=True)) if len({*sizes}) > 1)
    # Rows can be left out at the end only.
    first = all(size == 1 for size in ours[:at]) and ours[at] == vocabulary
    more = ours[at + 1 :] == theirs[at + 1 :] and theirs[at] > vocabulary
    return theirs[at] if first and more else None


@dataclass(frozen=True)
class _Renaming:
    """One way to rename the finetuned tensors.

    Attributes:
        names: every finetuned name in the form of the base's names.
        mapping: finetuned name to base name, for the tensors that the base has.
        pairs: the part of the mapping that is required.
    """

    names: Mapping[str, str]
    mapping: Mapping[str, str]
    pairs: frozenset[tuple[str, str]]

    @property
    def score(self) -> tuple[int, int]:
        """The number of required tensors that it matches, and of all."""
        return len({ours for _, ours in self.pairs}), len(self.mapping)


def _choose(
    ours: Sequence[str], theirs: Sequence[str], required: frozenset[str], prefixes: Sequence[str]
) -> _Renaming:
    """The renaming that matches most of the required tensors.

    Raises:
        CannotJoin: two renamings match equally many in different ways.
    """
    known = frozenset(ours)
    plain = without_wrappers(known, theirs)

    def renaming(off: str, on: str) -> _Renaming:
        names, mapping = {}, {}
        for name, bare in plain.items():
            new = on + bare.removeprefix(off) if bare.startswith(off) else bare
            names[name] = new
            found = next((each for each in (new, bare) if each in known), None)
            if found is not None:
                mapping[name] = found
        pairs = frozenset(item for item in mapping.items() if item[1] in required)
        return _Renaming(names, mapping, pairs)

    familiar = tuple(dict.fromkeys((*prefixes, *_PREFIXES)))
    candidates = [renaming("", "")]
    candidates += [renaming(prefix, "") for prefix in familiar]
    candidates += [renaming("", prefix) for prefix in prefixes]
    for off, on in _prefixes_in(sorted(required, key=by_bytes), tuple(plain.values()), prefixes):
        found = renaming(off, on)
        whole = found.score[0] == len(required)
        if (_is_chain(off, familiar) and on in ("", *prefixes)) or (whole and not (off and on)):
            candidates.append(found)
    best = max(candidates, key=lambda each: each.score)  # the first of equals: plain names win
    rivals = [each for each in candidates if each.score[0] == best.score[0]]
    rivals = [each for each in rivals if each.pairs != best.pairs]
    if rivals and best.score[0]:
        raise CannotJoin(
            "the finetuned tensors match the base's in more than one way",
            expected="one common prefix on either side",
            found="; ".join(_examples(best, rivals)),
            hint="save the finetuned model with the tensor names of its base",
        )
    return best


def without_wrappers(known: frozenset[str], theirs: Sequence[str]) -> dict[str, str]:
    """Each finetuned name without the components of wrappers, unless the base has them too."""
    components = {part for name in known for part in name.split(".")}
    wrappers = frozenset(WRAPPERS) - components
    return {
        name: ".".join(part for part in name.split(".") if part not in wrappers) for name in theirs
    }


def _prefixes_in(
    required: Sequence[str], theirs: Sequence[str], prefixes: Sequence[str]
) -> list[tuple[str, str]]:
    """Prefixes to take off the finetuned names and to put on, by some of the required names."""
    found: dict[tuple[str, str], None] = {}
    for name in {required[0], required[len(required) // 2], required[-1]} if required else ():
        for on in ("", *(prefix for prefix in prefixes if name.startswith(prefix))):
            rest = name.removeprefix(on)
            found |= {
                (each.removesuffix(rest), on): None for each in theirs if each.endswith(f".{rest}")
            }
        found |= {
            ("", name.removesuffix(each)): None for each in theirs if name.endswith(f".{each}")
        }
    return sorted(found)


def wrapped_names(names: Sequence[str]) -> list[str]:
    """The names that wrappers have changed, which transformers does not find in a base."""
    starts = [f"{wrapper}." for wrapper in WRAPPERS] + ["base_model.model."]
    if any(all(name.startswith(start) for name in names) for start in starts):
        return list(names)
    return [name for name in names if not _WRAPPERS_ALONE.isdisjoint(name.split("."))]


def _layers_of(name: str) -> str:
    """The start of the names in the same stack of layers, or in the same module."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return "".join(f"{part}." for part in parts[:at])


def _is_chain(prefix: str, familiar: Iterable[str]) -> bool:
    """True if a prefix consists of familiar ones alone."""
    while prefix:
        head = next((each for each in familiar if prefix.startswith(each)), None)
        if head is None:
            return False
        prefix = prefix.removeprefix(head)
    return True


def _examples(best: _Renaming, rivals: Iterable[_Renaming]) -> list[str]:
    """A required tensor under each of the renamings, in which they differ."""
    pairs = {min(best.pairs, key=_by_base)}
    pairs |= {min(each.pairs - best.pairs or each.pairs, key=_by_base) for each in rivals}
    return [f"{theirs} as {ours}" for theirs, ours in sorted(pairs)]


def _by_base(pair: tuple[str, str]) -> tuple[str, str]:
    return pair[1], pair[0]


def _injective(mapping: Mapping[str, str]) -> Mapping[str, str]:
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


def _alternating(one: list[str], other: list[str]) -> list[str]:
    """Both lists in one, so that the first lines show both sides."""
    shorter = min(len(one), len(other))
    pairs = [line for pair in zip(one, other, strict=False) for line in pair]
    return [*pairs, *one[shorter:], *other[shorter:]]
