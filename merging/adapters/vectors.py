"""The space of (IA)^3: a base whose tensors are the vectors of its modules, all of them ones.

The vector of a module scales its outputs, or its inputs in a feedforward module. A merge in this
space has the vectors as weights: `VectorSpace.ones` are its base's tensors, the vectors of an
adapter (`AdapterCheckpoint.vectors`) those of a finetuned model. `VectorEdits` applies merged
vectors to the base's own weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from restitch.merging.adapters.checkpoint import WEIGHTS, is_turned, updated
from restitch.merging.adapters.config import CONFIG
from restitch.merging.adapters.names import PEFT_PREFIX, VECTOR, vector_name
from restitch.merging.adapters.updates import Scale
from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.edits import Edits, edited
from restitch.merging.order import by_bytes


@dataclass(frozen=True)
class ScaledModule:
    """A module that a vector scales.

    Attributes:
        weight: the name of its matrix.
        bias: the name of its bias, if the vector scales it, too.
        shape: of the vector: [out, 1], or [1, in] in a feedforward module.
        turned: the matrix is [in, out].
    """

    weight: str
    bias: str | None
    shape: tuple[int, int]
    turned: bool


@dataclass(frozen=True)
class VectorSpace:
    """The vectors of some modules of a base.

    Attributes:
        weights: the base's own weights.
        modules: by the name of the vector, in name order.
    """

    weights: Checkpoint
    modules: Mapping[str, ScaledModule]

    @classmethod
    def of(
        cls, weights: Checkpoint, targets: Sequence[str], feedforward: Sequence[str], where: str
    ) -> "VectorSpace":
        """The vectors of the modules with some names.

        Args:
            weights: the base.
            targets: the names of modules, or their ends, as PEFT's `target_modules`.
            feedforward: those of them whose inputs are scaled.
            where: the base's name in messages.

        Raises:
            BadInput: a name matches no module with a matrix, or no target.
        """
        matrices = [
            name.removesuffix(".weight")
            for name in weights.names
            if name.endswith(".weight")
            and len(weights.info(name).shape) == 2
            and weights.info(name).dtype in FLOATING
        ]
        found = [module for module in matrices if _ends_with(module, targets)]
        missing = [name for name in targets if not any(_ends_with(m, [name]) for m in matrices)]
        missing += [name for name in feedforward if not any(_ends_with(m, [name]) for m in found)]
        if missing:
            raise BadInput(
                f"the space of the line names modules that {where} lacks",
                expected="names of modules with a weight matrix, such as "
                + shortlist(matrices[-3:]),
                found=shortlist(missing),
                hint="correct target_modules and feedforward_modules under `space`; a feedforward "
                "module is one of the target modules",
            )
        turned = is_turned(weights, otherwise=False)
        modules = {}
        for module in found:
            shape = weights.info(f"{module}.weight").shape
            out, inputs = shape[::-1] if turned else shape
            scaled = (1, inputs) if _ends_with(module, feedforward) else (out, 1)
            bias = f"{module}.bias"
            has_bias = scaled[1] == 1 and bias in weights and weights.info(bias).numel == out
            weight = f"{module}.weight"
            modules[vector_name(weight)] = ScaledModule(
                weight, bias if has_bias else None, scaled, turned
            )
        return cls(weights, dict(sorted(modules.items(), key=lambda item: by_bytes(item[0]))))

    def ones(self) -> dict[str, Tensor]:
        """The vectors that change nothing, by name."""
        return {name: torch.ones(module.shape) for name, module in self.modules.items()}

    def scale(self, name: str, weight: str, vector: Tensor) -> Scale:
        """How a vector changes the matrix or the bias of its module."""
        module = self.modules[name]
        if weight != module.weight:
            shape: tuple[int, ...] = self.weights.info(weight).shape
        else:
            shape = module.shape[::-1] if module.turned else module.shape
        return Scale(lambda: vector, shape)


class VectorEdits:
    """Edits of vectors as edits of the base's own weights.

    Args:
        space: the vectors.
        ones: the vectors of the base, as a checkpoint.
        edits: of `ones`.
    """

    def __init__(self, space: VectorSpace, ones: Checkpoint, edits: Edits) -> None:
        self._space, self._ones, self._edits = space, ones, edits
        self._vectors = {
            name: vector
            for vector in edits.names
            for name in (space.modules[vector].weight, space.modules[vector].bias)
            if name is not None
        }
        self.names = tuple(sorted(self._vectors, key=by_bytes))

    def apply(self, name: str, flat: Tensor) -> None:
        """Scale a flat copy of the base's tensor, in float32 and rounded once."""
        vector = self._vectors[name]
        scale = self._space.scale(vector, name, edited(self._ones, self._edits, vector))
        before = flat.view(self._space.weights.info(name).shape)
        flat.copy_(updated(before, scale, flat.dtype))


def write_vectors(
    folder: Path,
    space: VectorSpace,
    vectors: Mapping[str, Tensor],
    modules: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Write vectors as an adapter in the form of PEFT.

    Args:
        folder: an existing folder.
        space: the vectors' modules.
        vectors: all of them, by name.
        modules: the names of modules in the loaded model, by the names of their matrices.
        config: more keys of `adapter_config.json`, such as `task_type`.
    """
    named = {name: modules[module.weight] for name, module in space.modules.items()}
    forward = [named[name] for name, each in space.modules.items() if each.shape[0] == 1]
    values = {
        "peft_type": "IA3",
        "target_modules": list(named.values()),
        "feedforward_modules": forward,
        "fan_in_fan_out": any(module.turned for module in space.modules.values()),
        "inference_mode": True,
        **config,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"{PEFT_PREFIX}{named[name]}.{VECTOR}": vector.contiguous()
        for name, vector in vectors.items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _ends_with(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
