"""Where in a model a tensor lies, by its name: layer, component and tower.

Names are read as transformers writes them (CLIP, ViT, BERT, RoBERTa, DistilBERT, MPNet, ALBERT,
T5 encoders, GPT-2, Llama and their kin). What no rule knows is `other`, never an error: places
are for reading, and nothing is decided by them. The components are those of the figures in the
papers: a bias of attention or MLP counts as a bias, one of a layer norm as layer norm.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

COMPONENTS = ("layer norm", "attention", "mlp", "bias", "embedding", "other")

_COUNTED = re.compile(r"(?:^|_)(?:layers?|blocks?|resblocks|groups?|h)$")
_NORM = re.compile(r"norm|layrnorm|^ln(?:_|$)")  # CLIP has a `pre_layrnorm`
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^cls_token$|^mask_token$|^class_token$")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|ff$|feed_?forward|densereludense|intermediate|^(?:fc|lin)\d?$")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        layer: the number of its transformer block; None outside of the blocks.
        component: one of `COMPONENTS`.
        tower: "vision" or "text" in a model that has both, else None.
    """

    layer: int | None
    component: str
    tower: str | None = None


def place_of(name: str) -> Place:
    """The place of the tensor with this name."""
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
    # The innermost module says whether it is a norm: attention and embeddings hold norms.
    if _NORM.search(path[-2] if modules else leaf):
        return "layer norm"
    if any(_EMBEDDING.search(part) for part in path):
        return "embedding"
    attention = any(_ATTENTION.search(part) for part in path)
    # BERT names the second half of its MLP only `output`.
    mlp = any(_MLP.search(part) for part in path) or (inside and "output" in modules)
    if not (attention or mlp):
        return "other"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return "attention" if attention else "mlp"
