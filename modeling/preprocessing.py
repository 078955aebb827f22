"""Compare how two folders prepare inputs: tokenizer, image processor and chat template.

The merged model prepares the inputs of every task as its base does. A finetuned model that was
trained with other tokens or other pixels would be evaluated and merged as a different model than it
is. What a finetuned folder leaves out is the base's.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput, counted, shortlist
from restitch.modeling.pretrained_files import (
    asset_files,
    has_tokenizer,
    load_image_processor,
    load_tokenizer,
)

# Parts of a tokenizer's file that do not change the tokens of a text. Truncation and padding are
# left there by the last call before it was saved.
_NO_TOKENS = ("version", "truncation", "padding", "decoder", "added_tokens")
_VOCABULARY = ("vocab", "merges")
_SETTINGS = ("padding_side", "truncation_side")
_FLAGS = ("id", "lstrip", "rstrip", "single_word")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Keys of an image processor that name classes and tools.
_NO_PIXELS = frozenset(
    {
        "_processor_class",
        "auto_map",
        "backend",
        "data_format",
        "device",
        "feature_extractor_type",
        "image_processor_type",
        "input_data_format",
        "processor_class",
        "return_tensors",
    }
)
# Modules of Sentence Transformers that the families of text apply as well.
_APPLIED = ("Transformer", "Pooling", "Normalize")
_LONGEST = 60


@dataclass(frozen=True)
class Preprocessing:
    """The comparison of a finetuned folder with its base.

    Attributes:
        differences: what changes the inputs of the model.
        notes: sentences about what is left out or not compared.
    """

    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_preprocessing(base: Path, finetuned: Path) -> Preprocessing:
    """Compare tokenizer, image processor and chat template of a folder with those of its base."""
    if _files(base) == _files(finetuned):
        return Preprocessing()
    differences: list[str] = []
    notes: list[str] = []
    for compare in (_tokenizers, _chat_templates, _processors):
        for text, counts in compare(base, finetuned):
            (differences if counts else notes).append(text)
    return Preprocessing(tuple(differences), tuple(notes))


def unused_modules(folder: Path) -> list[str]:
    """The layers that Sentence Transformers adds after the encoder, which no family applies."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [kind for kind in kinds if kind not in _APPLIED]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in asset_files(folder) if name != "config.json"
    }


def _tokenizers(base: Path, finetuned: Path) -> Iterator[tuple[str, bool]]:
    """Each difference of the tokenizers, and whether it counts."""
    if not has_tokenizer(base):
        return
    if not has_tokenizer(finetuned):
        yield "it has no tokenizer: the base's is used", False
        return
    try:
        ours = load_tokenizer(base)
    except BadInput:  # a format of its own
        yield from _other_bytes(base, finetuned)
        return
    try:
        theirs = load_tokenizer(finetuned)
    except BadInput as error:
        yield f"{error.summary}: {error.found}", True
        return
    left, right = _rules(ours), _rules(theirs)
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            yield f"tokenizer {key}: {_both(left.get(key), right.get(key))}", True
    yield from _vocabularies(ours.get_vocab(), theirs.get_vocab())
    known = {token: flags for token, flags in _flags(theirs).items() if token in ours.get_vocab()}
    yield from _added(_flags(ours), known)
    for key in _SETTINGS:
        one, other = getattr(ours, key, None), getattr(theirs, key, None)
        if one != other:
            yield f"tokenizer {key}: {_both(one, other)}", True
    if ours.model_max_length != theirs.model_max_length:
        longest = _both(ours.model_max_length, theirs.model_max_length)
        yield f"tokenizer model_max_length: {longest}; the task's max_length counts", False


def _other_bytes(base: Path, finetuned: Path) -> Iterator[tuple[str, bool]]:
    """The files that differ, for folders whose files only their family can read."""
    ours, theirs = _files(base), _files(finetuned)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            yield f"{name}: other bytes than the base's", True


def _rules(tokenizer: Any) -> dict[str, Any]:
    """The rules of a tokenizer as flat keys, without its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its settings decide
        settings = tokenizer.init_kwargs
        return {"class": type(tokenizer).__name__} | {
            key: settings[key] for key in sorted(settings) if isinstance(settings[key], bool)
        }
    state = json.loads(backend.to_str())
    rules = {key: value for key, value in state.items() if key not in _NO_TOKENS}
    merges = rules["model"].get("merges")
    flat = dict(_flat({**rules, "model": _without(rules["model"], _VOCABULARY)}, ""))
    if merges is not None:
        flat["merges"] = merges
    return flat


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name in value:
            yield from _flat(value[name], f"{key}.{name}" if key else name)
    else:
        yield key, value


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _vocabularies(ours: dict[str, int], theirs: dict[str, int]) -> Iterator[tuple[str, bool]]:
    other = sorted(token for token in ours if ours[token] != theirs.get(token))
    if other:
        shown = shortlist([repr(token) for token in other])
        sizes = f"base {len(ours)} tokens, finetuned {len(theirs)}"
        yield f"tokenizer vocabulary: {counted(len(other), 'token')} ({sizes}): {shown}", True
    more = sorted(theirs.keys() - ours.keys())
    if more:
        shown = shortlist([repr(token) for token in more])
        count = counted(len(more), "token")
        yield f"texts are read without {count} that the base's tokenizer lacks: {shown}", False


def _flags(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The added tokens, each with what decides where it is found in a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    return {
        token["content"]: {key: token.get(key) for key in _FLAGS}
        for token in state.get("added_tokens", ())
    }


def _added(
    ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, bool]]:
    other = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    if other:
        yield f"tokenizer added tokens: {shortlist([repr(token) for token in other])}", True


def _chat_templates(base: Path, finetuned: Path) -> Iterator[tuple[str, bool]]:
    ours, theirs = _template(base), _template(finetuned)
    if theirs is None or ours == theirs:
        return
    if ours is None:
        yield "it has a chat template, the base has none: it is not used", False
    else:
        yield f"chat template: {_both(ours, theirs)}", True


def _template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("chat_template") if isinstance(values, dict) else None


def _processors(base: Path, finetuned: Path) -> Iterator[tuple[str, bool]]:
    if not _has_processor(base):
        return
    if not _has_processor(finetuned):
        yield "it has no image processor: the base's is used", False
        return
    try:
        ours = _pixels(load_image_processor(base))
    except BadInput:  # a format of its own
        yield from _other_bytes(base, finetuned)
        return
    try:
        theirs = _pixels(load_image_processor(finetuned))
    except BadInput as error:
        yield f"{error.summary}: {error.found}", True
        return
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            yield f"image processor {key}: {_both(ours.get(key), theirs.get(key))}", True


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _PROCESSOR_FILES)


def _pixels(processor: Any) -> dict[str, Any]:
    values = processor.to_dict()
    return dict(_flat({k: v for k, v in values.items() if k not in _NO_PIXELS}, ""))


def _both(ours: Any, theirs: Any) -> str:
    """Both values, cut to the parts in which they differ."""
    left, right = repr(ours), repr(theirs)
    start = next(
        (at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), 0
    )
    skip = max(0, start - 10) if max(len(left), len(right)) > _LONGEST else 0
    return f"base {_cut(left, skip)}, finetuned {_cut(right, skip)}"


def _cut(text: str, skip: int) -> str:
    cut = text[skip : skip + _LONGEST]
    return f"{'...' if skip else ''}{cut}{'...' if skip + _LONGEST < len(text) else ''}"
