"""The kind of a model: what it reads, and which way its attention looks.

The kind follows from `architectures` and `model_type` in config.json and from what transformers
maps them to: the class that saved the model says what it reads, and its attention layers say
whether they are causal. No architecture is listed here, so one that is new to transformers is
judged as well. The model is built without weights, and nothing in the folder is run.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from restitch.modeling.configs import read_config
from restitch.modeling.remembered import recall, remember

# More layers than any model has: a configuration that asks for them is not built.
_MOST_LAYERS = 1000
# Tasks of transformers for which a text encoder is finetuned, for attention that does not say.
_ENCODER_TASKS = (
    "MASKED_LM",
    "TEXT_ENCODING",
    "TOKEN_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING",
)
_SPEECH_TASKS = ("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM")


class Kind(StrEnum):
    """The kinds of models; the value is the name in messages."""

    TEXT_ENCODER = "a text encoder"
    CAUSAL_LM = "a decoder language model"
    SEQ2SEQ_LM = "an encoder-decoder language model"
    IMAGE_TEXT = "an image-text model with two towers"
    IMAGE = "an image model"
    MULTIMODAL = "a model of several modalities"
    AUDIO = "an audio model"
    OTHER = "a model of another kind"


@dataclass(frozen=True)
class ModelKind:
    """The kind of one model, and what says so.

    Attributes:
        architecture: the class that saved it, or the one that transformers loads.
        encoder_half: it is the encoder alone of an encoder-decoder architecture.
    """

    kind: Kind
    model_type: str
    architecture: str
    encoder_half: bool = False

    def __str__(self) -> str:
        """The evidence with the kind."""
        return f"{self.architecture} (model_type {self.model_type!r}), {self.kind}"


def model_kind(folder: Path) -> ModelKind:
    """The kind of the model in a folder.

    Raises:
        BadInput: the configuration is missing, unreadable, or of an unknown architecture.
    """
    if (known := recall("kind", folder)) is not None:
        return ModelKind(**{**known, "kind": Kind(known["kind"])})
    config = read_config(folder)
    found = _model_kind(folder, config.to_json_string(use_diff=False))
    if found.kind is not Kind.OTHER:  # which may lack a package that is installed later
        remember("kind", folder, asdict(found))
    return found


@lru_cache(maxsize=64)
def _model_kind(folder: Path, _config: str) -> ModelKind:
    config = read_config(folder)
    saved = _model_class(config)
    if saved is None:
        return ModelKind(Kind.OTHER, config.model_type, "no class of transformers")
    half = _is_encoder_half(config, saved)
    return ModelKind(_kind(config, saved, half), config.model_type, saved.__name__, half)


def _model_class(config: Any) -> Any:
    """The class that `architectures` names if it fits the configuration, or that AutoModel takes.

    Names of classes outside of transformers say nothing.
    """
    import transformers

    named = config.architectures if isinstance(config.architectures, list) else []
    for name in named:
        found = _attribute(transformers, str(name))
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and getattr(found, "config_class", None) is type(config)
        ):
            return found
    return _auto_class(config)


def _attribute(module: Any, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # a module whose requirements are not installed
        return None


def _auto_class(config: Any) -> Any:
    from transformers import MODEL_MAPPING

    try:
        found = MODEL_MAPPING[type(config)]
    except Exception:  # none, or its requirements are not installed
        return None
    return found[0] if isinstance(found, list | tuple) else found


def _is_encoder_half(config: Any, saved: Any) -> bool:
    return (
        config.model_type in _tasks("SEQ_TO_SEQ_CAUSAL_LM")
        and saved.__name__ == _tasks("TEXT_ENCODING").get(config.model_type)
        and saved is not _auto_class(config)
    )


def _tasks(name: str) -> dict[str, Any]:
    """The classes that transformers has for a task, by model type."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}))


def _kind(config: Any, saved: Any, half: bool) -> Kind:
    # A head for texts alone may inherit what its whole architecture reads.
    loaded = _auto_class(config) or saved
    reads = _modalities(saved) & _modalities(loaded) or _modalities(saved)
    if reads == {"text"} and not any(config.model_type in _tasks(one) for one in _SPEECH_TASKS):
        return Kind.TEXT_ENCODER if half else _text_kind(config, saved)
    if reads == {"image"}:
        return Kind.IMAGE
    if reads == {"image", "text"} and _scores_zero_shot(config.model_type):
        return Kind.IMAGE_TEXT
    if reads <= {"audio", "text"} and reads:
        return Kind.AUDIO
    return Kind.MULTIMODAL if len(reads) > 1 else Kind.OTHER


def _modalities(saved: Any) -> set[str]:
    """What the class reads. `text` is the default, which classes for images may not change."""
    declared = saved.input_modalities
    reads = {declared} if isinstance(declared, str) else set(declared)
    if reads != {"text"} or saved.main_input_name == "input_ids":
        return reads
    if saved.main_input_name.startswith("pixel_values"):
        return {"image"}
    return {"audio"} if saved.main_input_name in ("input_values", "input_features") else set()


def _scores_zero_shot(model_type: str) -> bool:
    return model_type in _tasks("ZERO_SHOT_IMAGE_CLASSIFICATION") and model_type not in _tasks(
        "IMAGE_TEXT_TO_TEXT"
    )


def _text_kind(config: Any, saved: Any) -> Kind:
    """The kind of a model that reads texts only."""
    if getattr(config, "is_encoder_decoder", False):
        return Kind.SEQ2SEQ_LM
    if getattr(config, "is_decoder", False):
        return Kind.CAUSAL_LM
    known = any(config.model_type in _tasks(task) for task in _ENCODER_TASKS)
    if not hasattr(config, "vocab_size") and not known:  # a class that does not say what it reads
        return Kind.OTHER
    if getattr(config, "is_causal", None) is False or getattr(config, "attn_type", None) == "bi":
        return Kind.TEXT_ENCODER
    causal = _causal_layers(config, saved)
    if causal == {True, False}:
        return Kind.SEQ2SEQ_LM
    if causal:
        return Kind.CAUSAL_LM if True in causal else Kind.TEXT_ENCODER
    if config.model_type in _tasks("CAUSAL_LM") and config.model_type not in _tasks("MASKED_LM"):
        return Kind.CAUSAL_LM
    return Kind.TEXT_ENCODER if known else Kind.OTHER


def _causal_layers(config: Any, saved: Any) -> set[bool]:
    """Whether the attention layers are causal, for architectures whose layers say so."""
    counts = [v for key, v in config.to_dict().items() if "layers" in key and isinstance(v, int)]
    if max(counts, default=0) > _MOST_LAYERS:
        return set()
    try:
        with torch.device("meta"):
            model = saved(config)
    except Exception:  # a configuration of somebody else can raise any error
        return set()
    return {bool(m.is_causal) for m in model.modules() if hasattr(m, "is_causal")}
