"""The files of a checkpoint: one file, or shards with or without their index.

`choose_shards` decides by file names alone, so a folder and a bucket follow the same rules. What
is ambiguous is refused with every reading named; files that are left out are named in `notes`.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.safe_open import read_limited
from restitch.merging.order import by_bytes

# The limit of the safetensors library for a header; an index is no larger.
MAX_INDEX = 100_000_000

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d*[1-9]\d*)\.safetensors\Z")
# Copies of the weights for other tools or in other types, which transformers does not read either.
_COPIES = re.compile(r"consolidated.*|.*[.-](fp16|bf16|fp8|int8|non_ema|ema)\.safetensors\Z")
_WEIGHT_PICKLES = re.compile(
    r"(pytorch_model|model|consolidated).*\.(bin|pt|pth|ckpt)\Z|tf_model\.h5\Z|"
    r"flax_model\.msgpack\Z|.*\.gguf\Z"
)
# Files of one download or of one call of save_pretrained differ by less.
_LATER_SECONDS = 60
_ADAPTER = re.compile(r"adapter_(config\.json|model.*\.(safetensors|bin))\Z")
_CONVERT = (
    "if you trust the file, convert it: AutoModel.from_pretrained(FOLDER)"
    ".save_pretrained(OUT, safe_serialization=True), then use OUT"
)
MERGE_ADAPTER = (
    "merge it and use the folder OUT: PeftModel.from_pretrained(BASE_MODEL, FOLDER)"
    ".merge_and_unload().save_pretrained(OUT)"
)
CONVERT_ADAPTER = (
    "if you trust the file, convert it: PeftModel.from_pretrained(BASE_MODEL, FOLDER)"
    ".save_pretrained(OUT), and use the folder OUT"
)


@dataclass(frozen=True)
class Shards:
    """The files that hold the weights.

    Attributes:
        names: the file names, in order.
        index: the file that maps tensors to shards, if there is one.
        notes: sentences about files that are not read, and about what was inferred.
    """

    names: tuple[str, ...]
    index: str | None = None
    notes: tuple[str, ...] = ()


def choose_shards(where: str, folder: Path, names: Iterable[str]) -> Shards:
    """Choose the weights among the files of a folder.

    Args:
        where: the name of the folder in messages.
        folder: the folder from which index files can be read.
        names: the names of all files directly in the folder.

    Raises:
        BadInput: there is no checkpoint, more than one, an incomplete one, or an adapter.
    """
    names = sorted((name for name in names if not name.startswith(".")), key=by_bytes)
    _check_no_adapter(where, folder, names)
    files = [name for name in names if name.endswith(SUFFIX)]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    readings = _readings(where, folder, files, indexes)
    if not readings:
        raise _none(where, names)
    if len(readings) > 1:
        raise BadInput(
            f"{where} contains several checkpoints",
            expected="one checkpoint: model.safetensors, or shards with their index",
            found="; ".join(_described(each) for each in readings),
            hint="keep one of them in the folder, or give each a folder of its own",
        )
    (chosen,) = readings
    notes = list(chosen.notes)
    aside = [name for name in files if name not in chosen.names]
    aside += [name for name in names if _WEIGHT_PICKLES.match(name)]
    if aside:
        notes.append(f"read {_described(chosen)}; not read: {shortlist(aside)}")
    return Shards(chosen.names, chosen.index, tuple(notes))


def _readings(where: str, folder: Path, files: list[str], indexes: list[str]) -> list[Shards]:
    """Every way to read the folder as one checkpoint, without copies for other tools."""
    readings: list[Shards] = []
    for index in indexes:
        shards = tuple(index_shards(folder / index))
        missing = [shard for shard in shards if shard not in files]
        if _SINGLE in files and len(missing) == len(shards):
            continue  # left from before the weights were saved as one file
        if missing:
            raise BadInput(
                f"{where} lacks shards that its index lists",
                expected=shortlist(missing),
                found=f"{len(shards) - len(missing)} of the {len(shards)} shards in {index}",
                hint="fetch or save the whole checkpoint again",
            )
        readings.append(Shards(shards, index))
    known = {shard for reading in readings for shard in reading.names}
    rest = [name for name in files if name not in known and not _COPIES.match(name)]
    if _SINGLE in rest:
        readings.append(Shards((_SINGLE,)))
    sets = {(match["stem"], match["total"]) for match in map(_NUMBERED.match, rest) if match}
    readings += [_numbered(where, stem, total, rest) for stem, total in sorted(sets)]
    return readings or [Shards((name,)) for name in rest or files]


def _numbered(where: str, stem: str, total: str, files: list[str]) -> Shards:
    """The shards of one set without an index, which must be complete."""
    width = len(total)
    expected = [
        f"{stem}-{number:0{width}d}-of-{total}{SUFFIX}"
        for number in range(1, min(int(total), 10_000) + 1)
    ]
    missing = [name for name in expected if name not in files]
    if missing:
        raise BadInput(
            f"{where} lacks shards",
            expected=shortlist(missing),
            found=f"{len(expected) - len(missing)} of {int(total)} shards, and no index",
            hint="fetch or save the whole checkpoint again",
        )
    if len(expected) == 1:
        return Shards(tuple(expected))
    note = f"there is no index: the {len(expected)} shards were read together by their numbers"
    return Shards(tuple(expected), None, (note,))


def _described(reading: Shards) -> str:
    if len(reading.names) == 1:
        return reading.names[0]
    shards = f"{reading.names[0]} and {len(reading.names) - 1} more shards"
    return f"{reading.index} ({shards})" if reading.index else shards


def is_adapter_file(name: str) -> bool:
    """True if a file holds the weights of an adapter, or its configuration."""
    return _ADAPTER.match(name) is not None


def holds_adapter(names: Collection[str]) -> bool:
    """True if a folder with these files holds an adapter and no whole weights."""
    own = [name for name in names if is_adapter_file(name)]
    return bool(own) and not any(n.endswith((SUFFIX, INDEX_SUFFIX)) for n in names if n not in own)


def _check_no_adapter(where: str, folder: Path, names: Iterable[str]) -> None:
    """Refuse an adapter, alone or next to whole weights.

    Raises:
        BadInput: there are files of an adapter.
    """
    names = list(names)
    adapter = [name for name in names if is_adapter_file(name)]
    if not adapter:
        return
    whole = [n for n in names if n.endswith((SUFFIX, INDEX_SUFFIX)) and n not in adapter]
    if whole:
        raise BadInput(
            f"{where} holds an adapter next to whole weights",
            expected="whole weights alone: these may or may not contain the adapter's change",
            found=f"{', '.join(adapter)} next to {shortlist(whole)}",
            hint="if the weights were saved after merge_and_unload(), remove the files of the "
            f"adapter; otherwise {MERGE_ADAPTER}",
        )
    raise BadInput(
        f"{where} is an adapter, not a whole model",
        expected="the whole weights of a model",
        found=", ".join(adapter) + _about_adapter(folder),
        hint="to register it, name its folder with --model; a base has to be whole: "
        f"{MERGE_ADAPTER}",
    )


def _about_adapter(folder: Path) -> str:
    """The kind and the base of an adapter, as its configuration states them."""
    try:
        config = json.loads(read_limited(folder / "adapter_config.json", 1 << 20))
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    about = [f"kind {kind}"] * bool(kind) + [f"of {base}"] * bool(base)
    return f" ({', '.join(about)})" if about else ""


def _none(where: str, names: list[str]) -> BadInput:
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    deepspeed = any(name == "zero_to_fp32.py" or name.endswith("_states.pt") for name in names)
    if pickles and not deepspeed:
        return _pickled(where, pickles)
    hint = "check the path"
    if deepspeed:
        hint = "collect the weights of DeepSpeed: zero_to_fp32.py FOLDER OUT --safe_serialization"
    elif any(name.endswith(".gguf") for name in names):
        hint = "use the model before its conversion to GGUF"
    elif any(name.endswith(".distcp") for name in names):
        hint = "convert the distributed checkpoint: accelerate merge-weights FOLDER OUT"
    return BadInput(
        f"{where} contains no checkpoint",
        expected="model.safetensors, or shards with model.safetensors.index.json",
        found=shortlist(names) or "no file",
        hint=hint,
    )


def _pickled(where: str, names: list[str]) -> BadInput:
    """The error for weights in files that can run code."""
    return BadInput(
        f"{where} is not a safetensors checkpoint",
        expected="safetensors (opening a pickle can run code)",
        found=shortlist(names),
        hint=_CONVERT,
    )


def check_whole_file(path: Path) -> None:
    """Refuse a file that is only a part of a checkpoint.

    Raises:
        BadInput: it is a pickle, an adapter, or one of several shards.
    """
    if path.suffix.lower() in _PICKLES:
        raise _pickled(str(path), [path.name])
    if is_adapter_file(path.name):
        _check_no_adapter(str(path), path.parent, [path.name])
    part = _NUMBERED.match(path.name)
    if part and int(part["total"]) > 1:
        raise BadInput(
            f"{path} is one of {int(part['total'])} shards",
            expected="a whole checkpoint",
            found="one shard",
            hint=f"name the folder of the shards: {path.parent}",
        )


def index_shards(index: Path) -> list[str]:
    """The file names of the shards in an index.

    Raises:
        BadInput: the file is not an index, or names a file outside of its folder.
    """
    shards = sorted(set(weight_map(index).values()), key=by_bytes)
    for shard in shards:
        if Path(shard).name != shard or shard in {"", ".", ".."} or "\0" in shard:
            raise BadInput(
                f"{index} names a shard outside of its folder",
                expected="plain file names",
                found=repr(shard),
                hint="do not use this checkpoint: it may have been tampered with",
            )
    return shards


def weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, as an index lists them.

    Raises:
        BadInput: the file is not an index.
    """
    try:
        listed = json.loads(read_limited(index, MAX_INDEX))["weight_map"]
        if not all(isinstance(shard, str) for shard in listed.values()):
            raise TypeError("shards must be file names")  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise BadInput(
            f"{index} is not a valid index of shards",
            expected="JSON with weight_map: tensor name to file name",
            found=f"{type(err).__name__}: {err}",
            hint="fetch or save the checkpoint again",
        ) from err
    return dict(listed)


def newer_weights(folder: Path, chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """A note for each file of weights that is not read although it was written later."""
    read = max((folder / name).stat().st_mtime for name in chosen)
    return [
        f"{name} was written after the weights that are read: check which of them is the model"
        for name in sorted(names)
        if _WEIGHT_PICKLES.match(name)
        and (folder / name).is_file()
        and (folder / name).stat().st_mtime > read + _LATER_SECONDS
    ]


def folders_below(folder: Path) -> list[str]:
    """The folders with safetensors up to two levels below, in the order of their numbers."""
    found = []
    for pattern in ("*/*.safetensors", "*/*/*.safetensors"):
        found += [file.parent.relative_to(folder).as_posix() for file in folder.glob(pattern)]
    return sorted({name for name in found if not name.startswith(".")}, key=_by_numbers)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
