"""Read a mergekit file as a merge of ours, where both have the method.

mergekit merges all tensors, and trims each tensor alone. Everything that we lack is refused, and
all of it is listed at once. What changes only the memory that mergekit needs is not read.
"""

from collections.abc import Mapping
from typing import Any

from restitch.merging.errors import BadInput
from restitch.registry.specs.once import DTYPES

METHODS = {"linear": "averaging", "task_arithmetic": "task-arithmetic", "ties": "ties"}

# These have no influence on the merged weights.
_NEUTRAL = {"int8_mask", "name"}
_TYPES = ("dtype", "out_dtype")
_KNOWN = {"merge_method", "base_model", "models", "parameters", "tokenizer_source", *_TYPES}


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """True if the keys are those of a mergekit file."""
    return "merge_method" in values or "slices" in values


def from_mergekit(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The keys of our own form.

    Args:
        values: of the file.
        origin: its name in messages.

    Raises:
        BadInput: it uses a method or an option that we lack.
    """
    reader = _Reader(values)
    found = reader.read()
    if reader.problems:
        raise BadInput(
            f"{origin} is a mergekit file that restitch cannot merge",
            expected=f"merge_method {' or '.join(METHODS)}, one weight and one density for all "
            "models, and no other options",
            found=f"{len(reader.problems)} that restitch lacks",
            details=reader.problems,
            hint="use mergekit for it, or write the merge in restitch's own form",
        )
    return found


class _Reader:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def read(self) -> dict[str, Any]:
        name = self.values.get("merge_method")
        if name not in METHODS:
            self.problems.append(f"merge_method: {name}")
        for key in self.values.keys() - _KNOWN - _NEUTRAL:
            self.problems.append(f"{key}: {_short(self.values[key])}")
        source = self.values.get("tokenizer_source")
        if source not in (None, "base"):
            self.problems.append(f"tokenizer_source: {_short(source)}")
        base = self._model(self.values.get("base_model"), "base_model")
        models, own = self._models(str(name), base)
        common = self._mapping(self.values.get("parameters"), "parameters")
        settings = self._settings(str(name), common, own)
        self.problems.sort()
        return {
            "base": base,
            "models": models,
            "method": {"name": METHODS.get(str(name), ""), "settings": settings},
            "include": ["*"],
            "dtype": self._type(),
        }

    def _type(self) -> str | None:
        """The type of the written weights: `out_dtype`, or else `dtype`.

        mergekit computes in `dtype` and writes `out_dtype`; restitch computes in float32 at least.
        """
        given = {key: self.values.get(key) for key in _TYPES}
        for key, value in given.items():
            if value is not None and value not in DTYPES:
                self.problems.append(f"{key}: {_short(value)}: not {', '.join(DTYPES)}")
        dtype, out = given["dtype"], given["out_dtype"]
        if dtype in ("bfloat16", "float16") and out not in (None, dtype):
            self.problems.append(
                f"dtype: {dtype}, with out_dtype: {_short(out)}: restitch computes in float32"
            )
        return out or dtype

    def _models(self, name: str, base: str) -> tuple[dict[str, str], list[Mapping[str, Any]]]:
        models: dict[str, str] = {}
        own = []
        for number, each in enumerate(self.values.get("models") or (), 1):
            entry = self._mapping(each, f"models {number}")
            source = self._model(entry.get("model"), f"models {number}: model")
            for key in entry.keys() - {"model", "parameters"}:
                self.problems.append(f"models {number}: {key}: {_short(entry[key])}")
            if source == base:  # its task vector is zero
                if name == "linear":
                    self.problems.append(f"models {number}: the base as one of the models")
                continue
            models[f"m{number:02d}"] = source
            own.append(self._mapping(entry.get("parameters"), f"models {number}: parameters"))
        if not models:
            self.problems.append("models: none besides the base")
        return models, own

    def _settings(
        self, name: str, common: Mapping[str, Any], own: list[Mapping[str, Any]]
    ) -> dict[str, Any]:
        used = {"weight", "normalize", "lambda"} | ({"density"} if name == "ties" else set())
        for where, given in (
            ("parameters", common),
            *((f"models {n}", m) for n, m in enumerate(own, 1)),
        ):
            for key in given.keys() - used - _NEUTRAL:
                self.problems.append(f"{where}: {key}: {_short(given[key])}")
        weight = self._one("weight", common, own, 1.0)
        scale = self._one("lambda", common, [], 1.0)
        normalize = common.get("normalize", name in ("linear", "ties"))
        if name == "task_arithmetic":
            if normalize is not False:
                self.problems.append("parameters: normalize: true, with task_arithmetic")
            return {"alpha": weight * scale}
        if normalize is not True:
            self.problems.append(f"parameters: normalize: false, with {name}")
        if name == "ties":
            density = self._one("density", common, own, 1.0)
            return {"density": density, "alpha": scale, "trim": "tensor"}
        if scale != 1.0:
            self.problems.append(f"parameters: lambda: {scale:g}, with {name}")
        return {}

    def _one(
        self, key: str, common: Mapping[str, Any], own: list[Mapping[str, Any]], default: float
    ) -> float:
        """A number that is the same for all models."""
        values = [each.get(key, common.get(key, default)) for each in own or [{}]]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values) or isinstance(values[0], bool):
            self.problems.append(f"{key}: {_short(values)}: not one number per model")
            return default
        if len(set(numbers)) > 1:
            self.problems.append(f"{key}: {', '.join(map(str, numbers))}: not the same for all")
        return float(numbers[0])

    def _model(self, value: Any, where: str) -> str:
        """A model's path or hub id."""
        if isinstance(value, Mapping):
            value = value.get("model") if value.keys() <= {"model"} else None
        if not isinstance(value, str) or not value:
            self.problems.append(f"{where}: {_short(value)}: no path or hub id")
            return "-"
        if "+" in value:
            self.problems.append(f"{where}: {value}: a model with an adapter on it")
        return value

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f"{where}: {_short(value)}: no mapping of keys")
            return {}
        return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
