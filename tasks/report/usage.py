"""A few lines of Python in a model card that load the model and ask it something."""

from pathlib import Path

from restitch.modeling.kinds import model_kind

_TEXT = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
"""
_IMAGE = """\
from PIL import Image
from transformers import {auto}, AutoImageProcessor

model = {auto}.from_pretrained({name!r})
processor = AutoImageProcessor.from_pretrained({name!r})
image = Image.new("RGB", (224, 224))  # your image
inputs = processor(images=image, return_tensors="pt")
"""
_GENERATE = """\
inputs = tokenizer("Question: What is red? Answer:", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""
_HIDDEN = """\
inputs = tokenizer("A sentence to embed.", return_tensors="pt")
print(model(**inputs).last_hidden_state.mean(1))
"""
_LABEL = "print(model.config.id2label[int(model(**inputs).logits.argmax())])\n"
_FILL = """\
inputs = tokenizer(f"It was {tokenizer.mask_token}.", return_tensors="pt")
place = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode(model(**inputs).logits[0, place].argmax()))
"""
_CLIP = """\
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({name!r})
processor = AutoProcessor.from_pretrained({name!r})
image = Image.new("RGB", (224, 224))  # your image
texts = ["a photo of a cat", "a photo of a dog"]
length = model.config.text_config.max_position_embeddings
inputs = processor(
    text=texts, images=image, return_tensors="pt", padding="max_length", max_length=length
)
print(model(**inputs).logits_per_image.softmax(-1))
"""

_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}), {name!r})
"""

_LANGUAGE_MODELS = {
    "causal-lm": ("AutoModelForCausalLM", _GENERATE),
    "masked-lm": ("AutoModelForMaskedLM", _FILL),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", _GENERATE),
}


def usage(family: str, folder: Path, name: str, *, classifier: bool) -> str | None:
    """The lines for a model of a family; None for a family of another package.

    Args:
        family: the name of the family.
        folder: holds the model's configuration.
        name: what `from_pretrained` takes.
        classifier: whether the model has the head of a task.
    """
    auto = _auto_class(family, folder, classifier=classifier)
    if family == "clip":
        return _CLIP.format(name=name)
    if family == "image-classifier":
        asks = _LABEL if classifier else "print(model(**inputs).last_hidden_state.shape)\n"
        return _IMAGE.format(auto=auto, name=name) + asks
    if family == "text-classifier" and classifier:
        asks = _HIDDEN.splitlines(keepends=True)[0] + _LABEL
    elif family in ("text-classifier", "text-encoder"):
        asks = _HIDDEN
    elif family in _LANGUAGE_MODELS:
        asks = _LANGUAGE_MODELS[family][1]
    else:
        return None
    return _TEXT.format(auto=auto, name=name) + asks


def adapter_usage(family: str, folder: Path, base: str, name: str) -> str | None:
    """The lines that load an adapter of a base; None for a family of another package.

    Args:
        family: the name of the family.
        folder: holds the base's configuration.
        base: what `from_pretrained` takes for the base.
        name: the same for the adapter.
    """
    auto = _auto_class(family, folder, classifier=False)
    return None if auto is None else _ADAPTER.format(auto=auto, base=base, name=name)


def _auto_class(family: str, folder: Path, *, classifier: bool) -> str | None:
    """The class of transformers that loads a model of a family."""
    if family in _LANGUAGE_MODELS:
        return _LANGUAGE_MODELS[family][0]
    if family == "image-classifier":
        return "AutoModelForImageClassification" if classifier else "AutoModel"
    if family == "text-classifier" and classifier:
        return "AutoModelForSequenceClassification"
    if family in ("text-classifier", "text-encoder"):
        half = model_kind(folder).encoder_half
        return "AutoModelForTextEncoding" if half else "AutoModel"
    return "AutoModel" if family == "clip" else None
