"""Compare the configuration keys of two checkpoints that change the forward pass.

`AutoConfig` fills in defaults, so a key that one file leaves out equals the default written out.
Keys for training, generation, bookkeeping or file handling are ignored, and so are keys that the
architecture does not know, which tools write for themselves; `unknown_keys` names those.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular, read_limited
from restitch.modeling.remembered import MOST_CONFIG, recall, remember

_IGNORED = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "_output_attentions",
    "architectures",
    "attn_implementation",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cls_token_id",
    "decoder_start_token_id",
    "drop_path_rate",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "layerdrop",
    "logit_scale_init_value",
    "mask_token_id",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "sep_token_id",
    "seq_aux",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    "vocab_size",  # the tensors are compared, see `merging.files.comparison`
}
_QUANTIZATION = ("quantization_config", "compression_config")
# Keys that transformers 4 wrote and 5 dropped, with the value that their absence means.
_ONCE_DEFAULT = {"position_embedding_type": "absolute", "pruned_heads": {}}


def read_config(folder: Path) -> Any:
    """Read the configuration of a folder, with all defaults; never runs code from the folder.

    Raises:
        BadInput: it is missing, unreadable, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of ids of tokens, which no family reads from here
    file = folder / "config.json"
    try:
        with open_regular(file) as opened:
            json.loads(opened.read().decode("utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"{folder} has no config.json", hint="give the whole folder in Hugging Face's layout"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not valid JSON", found=error) from error
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a file of somebody else can raise any error
        raise BadInput(f"{file} does not describe a known architecture", found=error) from error
    # Not the file's choice, which may name a kernel to fetch and run.
    config._experts_implementation = None
    return config


def vocabulary_size(folder: Path) -> int | None:
    """The number of tokens of a model of texts by its configuration; None if it does not say."""
    if isinstance(known := recall("vocabulary", folder), int):
        return known
    try:
        config = read_config(folder).get_text_config()
    except (BadInput, ValueError):  # not in the layout of transformers, or of several parts
        return None
    found = getattr(config, "vocab_size", None)
    if not isinstance(found, int):
        return None
    remember("vocabulary", folder, found)
    return found


def config_differences(
    base: Path, finetuned: Path, *, ignore: frozenset[str] = frozenset()
) -> list[str]:
    """The differing keys of two folders' configurations of one architecture; see `differences`.

    Files that write the same have the same defaults, so these are compared without transformers.
    """
    if _writes_the_same(base, finetuned):
        return []
    ours, theirs = read_config(base), read_config(finetuned)
    return model_type_difference(ours.model_type, theirs.model_type) or differences(
        ours.to_dict(), theirs.to_dict(), ignore=ignore, known=known_keys(ours)
    )


def _writes_the_same(base: Path, finetuned: Path) -> bool:
    """True if two files have the same keys with the same values, but for those that are ignored."""
    try:
        ours, theirs = (
            _without_ignored(json.loads(read_limited(folder / "config.json", MOST_CONFIG)))
            for folder in (base, finetuned)
        )
    except (OSError, ValueError, RecursionError):
        return False  # `read_config` explains what is wrong
    return bool(ours == theirs)


def _without_ignored(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_ignored(inner)
        for key, inner in value.items()
        if key not in _IGNORED or key == "model_type"
    }


def differences(
    base: Mapping[str, Any],
    finetuned: Mapping[str, Any],
    *,
    ignore: frozenset[str] = frozenset(),
    known: Collection[str] | None = None,
    prefix: str = "",
) -> list[str]:
    """All differing keys as `key: base x, finetuned y`, sorted; nested keys are joined by dots.

    Both configurations have their defaults, and `prefix` is the key above both. `known` are the
    keys that the architecture knows; None compares all.
    """
    start = f"{prefix}." if prefix else ""
    if known is not None:
        compared = {*known, *_ONCE_DEFAULT}
        base, finetuned = (
            {key: value for key, value in each.items() if key in compared}
            for each in (base, finetuned)
        )
    left, right = _flat(base, ignore, start), _flat(finetuned, ignore, start)
    result = []
    for key in sorted({*left, *right}):
        default = _ONCE_DEFAULT.get(key.rsplit(".", 1)[-1])
        ours, theirs = left.get(key, default), right.get(key, default)
        if ours != theirs:
            result.append(f"{key}: base {ours!r}, finetuned {theirs!r}")
    return result


def known_keys(config: Any) -> frozenset[str]:
    """The keys that the class of a configuration knows."""
    try:
        return frozenset(type(config)().to_dict())
    except Exception:  # a class that needs arguments
        return frozenset(config.to_dict())


def unknown_keys(base: Path, finetuned: Path) -> list[str]:
    """The keys of a finetuned configuration that its architecture does not know, sorted.

    A key that the base has with the same value is left out.
    """
    if _writes_the_same(base, finetuned):
        return []
    try:
        ours, theirs = read_config(base), read_config(finetuned)
    except BadInput:  # not in the layout of transformers
        return []
    return sorted(_unknown(ours.to_dict(), theirs, ""))


def _unknown(base: Mapping[str, Any], config: Any, prefix: str) -> Iterator[str]:
    known = known_keys(config)
    for key, value in config.to_dict().items():
        own = getattr(config, key, None)
        if hasattr(own, "to_dict") and isinstance(value, Mapping):
            yield from _unknown(base.get(key) or {}, own, f"{prefix}{key}.")
        elif key not in known and key not in _IGNORED and base.get(key) != value:
            yield f"{prefix}{key}"


def check_not_quantized(folder: Path, where: str) -> None:
    """Refuse a model whose configuration says that its weights are quantized.

    Raises:
        BadInput: the configuration names a quantization.
    """
    try:
        values = json.loads(read_limited(folder / "config.json", MOST_CONFIG))
    except (OSError, ValueError, RecursionError):
        return  # `read_config` explains what is wrong with it
    found = [key for key in _QUANTIZATION if isinstance(values, dict) and values.get(key)]
    if found:
        settings = values[found[0]]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise BadInput(
            f"{where} is quantized, by its config.json",
            expected="weights in float32, bfloat16, float16 or float64",
            found=f"{found[0]}: {method or settings}",
            hint="use the model before quantization; if its weights are not quantized, remove the "
            "key from config.json",
        )


def model_type_difference(base: str, finetuned: str) -> list[str]:
    """The difference between two architectures, in the form of `differences`."""
    return [] if base == finetuned else [f"model_type: base {base!r}, finetuned {finetuned!r}"]


def _flat(config: Mapping[str, Any], ignore: frozenset[str], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _IGNORED or key in ignore or "dropout" in key:
            continue
        if isinstance(value, Mapping) and value and key not in _ONCE_DEFAULT:
            flat |= _flat(value, ignore, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
