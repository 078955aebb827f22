"""The configuration of an adapter: what of `adapter_config.json` changes the weights.

A key is used, or has no effect on the weights, or must have its default: everything else is
refused by name, so that no adapter is read as something else than it is.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import read_limited
from restitch.merging.files.shards import MERGE_ADAPTER

CONFIG = "adapter_config.json"

_MOST_CONFIG = 1 << 24
# Keys that choose where factors are trained, or how; the names of the tensors say where they are.
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_USED = {
    "LORA": {
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    },
    "IA3": set[str](),
}
# Ways to start that leave the base's weights as they are; others subtract the first product.
_INITIALS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MOST_PATTERN, _MOST_REPEATS = 1000, 3
_REPEATED_GROUP = re.compile(r"\)[*+?{]")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """The keys of an adapter's configuration that are used.

    Attributes:
        kind: of adapter, as `peft_type` names it.
        base: the name or path of the base that it was trained on, if it is known.
        revision: of that base.
        rank: of factors that no pattern matches.
        alpha: of factors that no pattern matches.
        ranks: by pattern.
        alphas: by pattern.
        rslora: scale by the square root of the rank.
        dora: factors have magnitudes.
        transposed: the trained layers store their weights as [in, out]; a hint only, see `names`.
    """

    kind: Literal["LORA", "IA3"]
    base: str | None = None
    revision: str | None = None
    rank: int = 8
    alpha: float = 8
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    transposed: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return self.ranks.get(_pattern(self.ranks, module) or "", self.rank)

    def scaling(self, module: str) -> float:
        """The number that the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alphas.get(_pattern(self.alphas, module) or "", self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def used(self) -> dict[str, object]:
        """The keys that the weights depend on, for a digest."""
        if self.kind == "IA3":
            return {"peft_type": self.kind}
        return {
            "peft_type": self.kind,
            "r": self.rank,
            "lora_alpha": self.alpha,
            # The first pattern that matches counts, so their order does.
            "rank_pattern": list(self.ranks.items()),
            "alpha_pattern": list(self.alphas.items()),
            "use_rslora": self.rslora,
            "use_dora": self.dora,
        }


def read_config(folder: Path, where: str) -> AdapterConfig:
    """Read the configuration of an adapter.

    Args:
        folder: the adapter's folder.
        where: its name in messages.

    Raises:
        BadInput: the file is missing or no valid JSON, the adapter is of a kind that is not
            supported, or a key has a value that would change the weights in an unknown way.
    """
    values = _read(folder, where)
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in _USED:
        raise BadInput(
            f"{where} is an adapter of a kind that is not supported",
            expected="peft_type: LORA (with or without DoRA) or IA3",
            found=f"peft_type: {kind}",
            hint=MERGE_ADAPTER,
        )
    _check_others(values, kind, where)
    base, revision = _text(values, "base_model_name_or_path"), _text(values, "revision")
    turned = values.get("fan_in_fan_out") is True
    if kind == "IA3":
        return AdapterConfig("IA3", base, revision, transposed=turned)
    return AdapterConfig(
        "LORA",
        base,
        revision,
        rank=_rank("r", values.get("r", 8), where),
        alpha=_number("lora_alpha", values.get("lora_alpha", 8), where),
        ranks=_patterns("rank_pattern", values, _rank, where),
        alphas=_patterns("alpha_pattern", values, _number, where),
        rslora=_flag("use_rslora", values, where),
        dora=_flag("use_dora", values, where),
        transposed=turned,
    )


def _read(folder: Path, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(read_limited(folder / CONFIG, _MOST_CONFIG))
        if not isinstance(values, dict):
            raise TypeError("not an object")  # noqa: TRY301
    except (OSError, ValueError, TypeError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise BadInput(
            f"{where} has no {CONFIG}" if missing else f"the {CONFIG} of {where} is not valid",
            expected="the JSON that PEFT's save_pretrained writes next to the adapter's weights",
            found=None if missing else f"{type(error).__name__}: {error}",
            hint="give the whole folder of the adapter",
        ) from error
    return values


def _check_others(values: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse values of keys that would change the weights in a way that is not computed here."""
    known = _NO_EFFECT | _USED[kind]
    # A key of a later version is off if it is empty.
    bad = [
        f"{key}: {json.dumps(value)[:80]}"
        for key, value in sorted(values.items())
        if key not in known and value not in (None, False, "", [], {})
    ]
    if kind == "LORA" and values.get("init_lora_weights", True) not in _INITIALS:
        start = values["init_lora_weights"]
        bad.append(f"init_lora_weights: {json.dumps(start)} (training changed the base's weights)")
    if bad:
        raise BadInput(
            f"{where} is an adapter with options that are not supported",
            expected="options that leave the change of a weight to its factors",
            found=", ".join(each.partition(":")[0] for each in bad),
            details=bad,
            hint=MERGE_ADAPTER,
        )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None


def _flag(key: str, values: Mapping[str, Any], where: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false", where)
    return value


def _number(key: str, value: object, where: str) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not math.isfinite(_float(value)):
        raise _wrong(key, value, "a finite number", where)
    return _float(value)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _rank(key: str, value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(key, value, "a rank of at least 1", where)
    return value


def _patterns(
    key: str, values: Mapping[str, Any], check: Callable[[str, object, str], Value], where: str
) -> dict[str, Value]:
    given = values.get(key) or {}
    if not isinstance(given, dict):
        raise _wrong(key, given, "values by the names of modules", where)
    for pattern in given:
        _check_pattern(key, pattern, where)
    return {pattern: check(f"{key} of {pattern}", value, where) for pattern, value in given.items()}


def _check_pattern(key: str, pattern: str, where: str) -> None:
    """Refuse a pattern that is no regular expression, or that could take for ever to match."""
    repeats = sum(pattern.replace("(?", "(").count(sign) for sign in "*+?{")
    slow = _REPEATED_GROUP.search(pattern) or repeats > _MOST_REPEATS
    if slow or len(pattern) > _MOST_PATTERN:
        raise _wrong(
            key, pattern, f"names, or patterns with at most {_MOST_REPEATS} repetitions", where
        )
    try:
        re.compile(_whole(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise _wrong(key, f"{pattern} ({error})", "names, or regular expressions", where) from error


def _pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first of the patterns that matches the end of a module's name, as PEFT finds it."""
    return next((each for each in patterns if re.match(_whole(each), module)), None)


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _wrong(key: str, value: object, expected: str, where: str) -> BadInput:
    return BadInput(
        f"{key} in the {CONFIG} of {where} is not valid",
        expected=expected,
        found=str(value)[:200],
        hint="save the adapter again with PEFT's save_pretrained",
    )
