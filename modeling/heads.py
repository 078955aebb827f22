"""The head of a task: the tensors, in addition to the base, that turn features into class scores.

A `HeadSpec` is the description in the task file, a `Head` what a family builds from it. A head is
stored: equal tensors and descriptions give equal bytes, and `head_key` names everything that the
head is built from, so each head is built once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restitch.merging.digests import canonical_json
from restitch.merging.errors import Damage
from restitch.merging.progress import Progress
from restitch.modeling.data.imagenet import openai_imagenet
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.task import PROMPT_KEYS

FORMAT_VERSION = 1
_METADATA = "restitch_head"


def listed(spec: HeadSpec) -> HeadSpec:
    """List the labels and templates that the word `openai` stands for.

    Raises:
        BadInput: the package that has them is not installed.
    """
    if "openai" not in (spec.labels, spec.templates):
        return spec
    labels, templates = openai_imagenet()
    update = {
        "labels": labels if spec.labels == "openai" else spec.labels,
        "templates": templates if spec.templates == "openai" else spec.templates,
    }
    return spec.model_copy(update=update)


def _described(spec: HeadSpec) -> dict[str, Any]:
    """All of a listed head's description; keys of prompts only in heads with a prompt."""
    values = spec.model_dump(mode="json", exclude={"labels_from"})
    return {k: v for k, v in values.items() if v is not None or k not in PROMPT_KEYS}


@dataclass(frozen=True)
class Head:
    """A head that a family built.

    Attributes:
        tensors: known only to the family; `weight` is [classes, features] in families that embed
            labels.
        spec: the resolved description.
    """

    tensors: Mapping[str, Tensor]
    spec: HeadSpec

    def to(self, device: torch.device | str) -> "Head":
        """The same head on another device."""
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()})

    def to_bytes(self) -> bytes:
        """A safetensors file; equal heads give equal bytes."""
        from safetensors.torch import save

        # One metadata entry only: safetensors does not order several.
        text = canonical_json({"format": FORMAT_VERSION, "spec": _described(self.spec)}).decode()
        tensors = {n: self.tensors[n].detach().cpu().contiguous() for n in sorted(self.tensors)}
        data: bytes = save(tensors, metadata={_METADATA: text})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Head":
        """Read what `to_bytes` wrote.

        Raises:
            Damage: the bytes are not a head, or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA])
            if described["format"] != FORMAT_VERSION:
                raise Damage(
                    "a stored head has an unknown format",
                    expected=FORMAT_VERSION,
                    found=described["format"],
                    hint="it was written by another version of restitch",
                )
            spec = HeadSpec.from_json(described["spec"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Damage("a stored head cannot be read", found=error) from error
        return cls(tensors, spec)


def head_key(
    *,
    family: str,
    version: int,
    base: str,
    assets: str,
    spec: HeadSpec,
    finetuned: str | None,
    compute: str = "float32",
) -> dict[str, object]:
    """Everything that a head is built from, as plain values to digest.

    `base`, `assets` and `finetuned` are digests: of the base's weights, of its configuration,
    tokenizer and processor files, and of the finetuned model where the head lies in it
    (`Family.task_heads`). `compute` is the type of the weights of the model that builds and uses
    it.
    """
    return {
        **({} if compute == "float32" else {"compute": compute}),
        "assets": assets,
        "base": base,
        "family": family,
        "family_version": version,
        "finetuned": finetuned,
        "spec": _described(spec),
    }


def scaled_cosines(features: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    """The scores of the classes, [batch, classes]; in full precision, even under autocast.

    Args:
        features: normalized, [batch, features].
        weight: of the classes, normalized, [classes, features].
        scale: of the cosines.
    """
    with torch.autocast(features.device.type, enabled=False):
        return scale * features.float() @ weight.T


def embed_prompts(
    spec: HeadSpec,
    embed: Callable[[list[str]], Tensor],
    *,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Class weights by the zero-shot convention, [classes, features].

    Each text embedding is normalized, averaged over the templates and normalized again. Texts
    of similar length share a batch to save padding; each distinct text is embedded once.

    Args:
        spec: labels and templates.
        embed: texts to features, [texts, features].
        batch_size: texts at once.
        progress: texts embedded, of how many.
    """
    prompts = spec.prompts()
    distinct = sorted(set(prompts), key=lambda text: (len(text), text))
    place = {text: index for index, text in enumerate(distinct)}
    size = len(spec.templates)
    features: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(distinct), batch_size):
            texts = distinct[start : start + batch_size]
            features.append(torch.nn.functional.normalize(embed(texts).float(), dim=-1).cpu())
            if progress is not None:
                progress(start + len(texts), len(distinct))
        table = torch.cat(features)
        classes = [
            table[[place[text] for text in prompts[start : start + size]]].mean(0)
            for start in range(0, len(prompts), size)
        ]
        weight = torch.nn.functional.normalize(torch.stack(classes), dim=-1)
    return weight.clone()  # outside of inference mode: losses are differentiated through it
