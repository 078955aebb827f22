"""The tensors of an adapter's file: factors by module and part, and whole tensors.

`sort_names` takes the names apart; `fit_names` finds the base's tensors that they belong to. PEFT
puts `base_model.model.` before all names; wrappers of PyTorch and the head of another class can
add more, which is found by comparing with the base.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.comparison import without_wrappers
from restitch.merging.files.plain_weights import is_factor
from restitch.merging.files.shards import MERGE_ADAPTER
from restitch.merging.order import by_bytes

PEFT_PREFIX = "base_model.model."
A, B, EMBEDDING_A, EMBEDDING_B = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, VECTOR = "lora_magnitude_vector", "ia3_l"

# What may follow each part's name, but for the name of the adapter: layers have a weight.
_ENDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    A: (("weight",),),
    B: (("weight",),),
    EMBEDDING_A: ((),),
    EMBEDDING_B: ((),),
    MAGNITUDE: (("weight",), ()),
    VECTOR: ((),),
}
_BASE, _COPY, _FROZEN = "base_layer", "modules_to_save", "original_module"
_DEFAULT = "default"  # the name that PEFT gives to an adapter

# Other names of a base's tensors, with its own names for them.
Aliases = Callable[[], Mapping[str, str]]


@dataclass(frozen=True)
class AdapterNames:
    """The names in an adapter's file, taken apart; PEFT's prefix is removed.

    Attributes:
        parts: by module and part, the name in the file.
        whole: by the name of a tensor that the adapter replaces, the name in the file.
    """

    parts: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]


def sort_names(names: Sequence[str], base: Iterable[str], where: str) -> AdapterNames:
    """Take the names in an adapter's file apart.

    Args:
        names: the names in the file.
        base: the names of the base's tensors.
        where: the adapter's name in messages.

    Raises:
        BadInput: there are no factors, or other ones, or those of several adapters.
    """
    bare = without_wrappers(frozenset(base), names)
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    adapters: set[str] = set()
    other: list[str] = []
    for name, plain in bare.items():
        plain = plain.removeprefix(PEFT_PREFIX)
        if plain.startswith(PEFT_PREFIX):
            raise _on_an_adapter(where, name)
        split = _split(plain)
        if split is None:
            own = _without_copies(plain)
            if own is None:
                continue
            if any(map(is_factor, own.split("."))):
                other.append(name)
            else:
                _put(whole, own, name, where)
            continue
        module, part, rest = split
        end = next((e for e in _ENDS[part] if rest in (e, (*rest[:1], *e))), None)
        named = rest if end is None else rest[: len(rest) - len(end)]
        if end is None or any(map(is_factor, (*module.split("."), *named))):
            other.append(name)
            continue
        adapters.update(named)
        _put(parts.setdefault(module, {}), part, name, where)
    if other:
        raise BadInput(
            f"{where} holds factors that are not supported",
            expected="factors of LoRA, DoRA or (IA)^3",
            found=f"{len(other)} of {len(names)} tensors",
            details=other,
            hint=MERGE_ADAPTER,
        )
    if len(adapters) > 1:
        raise BadInput(
            f"{where} holds several adapters",
            expected="one adapter",
            found=shortlist(sorted(adapters, key=by_bytes)),
            hint="save each of them to a folder of its own: save_pretrained(OUT, "
            "selected_adapters=[NAME])",
        )
    if not parts:
        raise BadInput(
            f"{where} holds no factors of an adapter",
            expected="tensors such as base_model.model.NAME.lora_A.weight",
            found=shortlist(list(names)) or "no tensors",
            hint="save the adapter again with PEFT's save_pretrained",
        )
    return AdapterNames(parts, whole)


def vector_name(weight: str) -> str:
    """The name of the vector of (IA)^3 that scales a matrix, by the name of the matrix."""
    return f"{weight.removesuffix('.weight')}.{VECTOR}"


def _split(name: str) -> tuple[str, str, tuple[str, ...]] | None:
    """The module, the part and what follows it, if a name is that of a factor."""
    components = name.split(".")
    at = next((at for at, each in enumerate(components) if each in _ENDS), None)
    if at is None:
        return None
    return ".".join(components[:at]), components[at], tuple(components[at + 1 :])


def _without_copies(name: str) -> str | None:
    """The name in the model of a whole tensor; None for one that the adapter replaced."""
    components = name.split(".")
    if _FROZEN in components:
        return None
    if _COPY in components:
        at = components.index(_COPY)
        after = components[at + 1 :]
        components = components[:at] + (after[1:] if after[:1] == [_DEFAULT] else after)
    return ".".join(each for each in components if each != _BASE)


def _put(into: dict[str, str], key: str, name: str, where: str) -> None:
    if key in into:
        raise twice(where, key, f"{into[key]}, {name}")
    into[key] = name


def twice(where: str, key: str, found: str) -> BadInput:
    """The error for two tensors of an adapter that are the same part of it."""
    return BadInput(
        f"{where} holds the same part of an adapter twice",
        expected=f"one tensor for {key}",
        found=found,
        hint="save the adapter again with PEFT's save_pretrained",
    )


def _on_an_adapter(where: str, name: str) -> BadInput:
    return BadInput(
        f"{where} is an adapter on an adapter",
        expected="an adapter on the whole weights of the line's base",
        found=name,
        hint="merge the first adapter into its base, and the second one into the result: "
        f"{MERGE_ADAPTER}",
    )


def fit_names(
    names: AdapterNames,
    base: Iterable[str],
    prefixes: Sequence[str],
    where: str,
    aliases: Aliases | None = None,
) -> dict[str, str]:
    """Find the base's tensors that an adapter changes.

    Args:
        names: the names in the adapter's file.
        base: the names of the base's tensors.
        prefixes: what either side may have before all of its names.
        where: the adapter's name in messages.
        aliases: gives other names of the base's tensors; asked if the names alone do not match.

    Returns:
        The base's name of every tensor that the adapter changes or replaces; one that the base
        lacks, such as a head, keeps its name.

    Raises:
        BadInput: the base lacks a module that the adapter changes, or modules match in two ways.
    """
    known = {name: name for name in base}
    targets = [f"{module}.weight" for module in sorted(names.parts, key=by_bytes)]
    found = _renamings(targets, known, prefixes)
    if not found and aliases is not None:
        known = {**aliases(), **known}
        found = _renamings(targets, known, prefixes)
    if not found:
        raise _lacking(targets, known, prefixes, where)
    if len(found) > 1:
        raise BadInput(
            f"the modules of {where} match the base's in more than one way",
            expected="one common prefix on either side",
            found="; ".join(f"{targets[0]} as {renamed[0]}" for renamed in sorted(found)),
            hint="save the adapter from a model with the tensor names of the base",
        )
    (off, on), *_ = found.values()
    fitted = {}
    for name in (*targets, *names.whole, *(f"{module}.bias" for module in names.parts)):
        fitted[name] = known.get(on + name.removeprefix(off), name)
    return fitted


def _renamings(
    targets: Sequence[str], known: Mapping[str, str], prefixes: Sequence[str]
) -> dict[tuple[str, ...], tuple[str, str]]:
    """What to take off the targets' names and to put before them, by the base's names for them."""
    plain = tuple(targets)
    if known.keys() >= set(plain):
        return {plain: ("", "")}
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for off, on in _candidates(targets, known, prefixes):
        renamed = tuple(on + name.removeprefix(off) for name in targets)
        if known.keys() >= set(renamed):
            found.setdefault(renamed, (off, on))
    return found


def _lacking(
    targets: Sequence[str], known: Mapping[str, str], prefixes: Sequence[str], where: str
) -> BadInput:
    """The error for targets that the base lacks, by the best of the ways to rename them."""
    ways = [("", ""), *_candidates(targets, known, prefixes)]
    lacking = min(
        ([n for n in targets if on + n.removeprefix(off) not in known] for off, on in ways), key=len
    )
    return BadInput(
        f"the base has no weights for modules that {where} changes",
        expected=f"tensors of the base, such as {min(known, key=by_bytes, default='none')}",
        found=f"{len(lacking)} of {len(targets)} modules without one",
        details=[name.removesuffix(".weight") for name in lacking],
        hint="register an adapter that was trained on this base; one on the output layer of a base "
        f"that shares it with the embeddings has to be merged first: {MERGE_ADAPTER}",
    )


def _candidates(
    targets: Sequence[str], known: Iterable[str], prefixes: Sequence[str]
) -> list[tuple[str, str]]:
    """Prefixes to take off and to put on, under which the base has some of the targets."""
    found: dict[tuple[str, str], None] = {}
    names = sorted(known)
    for target in (targets[0], targets[len(targets) // 2], targets[-1]):
        components = target.split(".")
        for at in range(len(components) - 1):
            end = ".".join(components[at:])
            off = target.removesuffix(end)
            for name in names:
                if name == end or name.endswith(f".{end}"):
                    found.setdefault((off, name.removesuffix(end)))
    return [
        (off, on)
        for off, on in found
        if (not off or not on or off in prefixes or on in prefixes)
        # A prefix of all names is no part of one layer.
        and not any(map(str.isdigit, f"{off}{on}".split(".")))
    ]
