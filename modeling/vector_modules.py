"""The modules that have a vector in (IA)^3 adapters, by architecture: the defaults of PEFT."""

from collections.abc import Mapping
from pathlib import Path

from restitch.merging.errors import BadInput
from restitch.modeling.configs import read_config
from restitch.registry.specs.line import SpaceSpec

# Target modules, and those of them that are feedforward modules, by `model_type`.
_MODULES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta"), ("key value output.dense", "output.dense")),
    **dict.fromkeys(("llama", "mistral"), ("k_proj v_proj down_proj", "down_proj")),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        ("q_proj v_proj down_proj", "down_proj"),
    ),
    "bart": ("q_proj v_proj fc2", "fc2"),
    "bloom": ("query_key_value mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "falcon": ("query_key_value dense_4h_to_h", "dense_4h_to_h"),
    "gpt2": ("c_attn mlp.c_proj", "mlp.c_proj"),
    "gpt_neo": ("q_proj v_proj c_proj", "c_proj"),
    "gpt_neox": ("query_key_value dense_4h_to_h", "dense_4h_to_h"),
    "gptj": ("q_proj v_proj fc_out", "fc_out"),
    "mt5": ("k v wi_1", ""),
    "opt": ("q_proj k_proj fc2", "fc2"),
    "phi": ("q_proj v_proj fc2", "fc2"),
    "t5": ("k v wo", "wo"),
}


def usual_modules(folder: Path, where: str) -> SpaceSpec:
    """The modules that PEFT gives a vector by default.

    Args:
        folder: of the base.
        where: its name in messages.

    Raises:
        BadInput: PEFT has no default for its architecture.
    """
    model_type = str(getattr(read_config(folder), "model_type", None))
    if model_type not in _MODULES:
        raise BadInput(
            f"the modules of `space: adapter` are not known for the base {where}",
            expected="a base of the architecture " + ", ".join(sorted(_MODULES)),
            found=f"model_type: {model_type}",
            hint="name them: `space: {target_modules: [NAME, ...], feedforward_modules: [NAME]}`, "
            "as in the adapter_config.json of the line's adapters",
        )
    targets, feedforward = (tuple(names.split()) for names in _MODULES[model_type])
    return SpaceSpec(target_modules=targets, feedforward_modules=feedforward)
