"""The layer, component and tower of a tensor, by its name.

Names follow transformers (CLIP, ViT, BERT, RoBERTa, DistilBERT, MPNet, ALBERT, T5 encoders, GPT-2,
Llama and related models). An unknown name is `other`, never an error: locations are for reports and
proposals, and no merge depends on them. The components are those of the papers' figures: a bias of
attention or MLP counts as bias, one of a layer norm as layer norm.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

COMPONENTS = ("layer norm", "attention", "mlp", "bias", "embedding", "other")

_COUNTED = re.compile(r"(?:^|_)(?:layers?|blocks?|resblocks|groups?|h)$")
_NORM = re.compile(r"norm|layrnorm|^ln(?:_|$)")  # CLIP has a `pre_layrnorm`
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^cls_token$|^mask_token$|^class_token$")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|moe|ffn|ff$|feed_?forward|densereludense|intermediate|^(?:fc|lin)\d?$")


@dataclass(frozen=True)
class Place:
    """The location of a tensor in its model.

    Attributes:
        layer: the number of its transformer block; None outside the blocks.
        component: one of `COMPONENTS`.
        tower: "vision" or "text" in a model with both, else None.
    """

    layer: int | None
    component: str
    tower: str | None = None


def place_of(name: str) -> Place:
    """The location of the tensor with this name."""
    parts = name.lower().split(".")
    layer = _layer(parts)
    return Place(layer, _component(parts[:-1], parts[-1], inside=layer is not None), _tower(parts))


def _layer(parts: list[str]) -> int | None:
    # The first number counts the blocks: T5 numbers the parts of a block too, experts are numbered.
    for before, part in pairwise(parts):
        if part.isascii() and part.isdigit() and _COUNTED.search(before):
            return int(part)
    return None


def _tower(parts: list[str]) -> str | None:
    for part in parts:
        if part in ("vision_model", "visual", "visual_projection"):
            return "vision"
        if part in ("text_model", "text_projection"):
            return "text"
    return None


def _component(modules: list[str], leaf: str, *, inside: bool) -> str:
    path = [*modules, leaf]
    # Only the innermost module decides on norms: attention and embeddings contain norms.
    if _NORM.search(path[-2] if modules else leaf):
        return "layer norm"
    if any(_EMBEDDING.search(part) for part in path):
        return "embedding"
    attention = any(_ATTENTION.search(part) for part in path)
    # BERT calls the second half of its MLP just `output`.
    mlp = any(_MLP.search(part) for part in path) or (inside and "output" in modules)
    if not (attention or mlp):
        return "other"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return "attention" if attention else "mlp"
