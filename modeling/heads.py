"""The head of a task: the tensors beside the base that turn features into class scores.

A `HeadSpec` is what a user describes, a `Head` what a family made of it. A head is a store
object: its bytes are the same for the same tensors and description, and `head_key` names all
that it was made from, so that it is made once.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import BadInput, Damage
from restitch.merging.progress import Progress
from restitch.modeling.data.imagenet import openai_imagenet as openai_imagenet

FORMAT_VERSION = 1
_METADATA = "restitch_head"


@dataclass(frozen=True)
class HeadSpec:
    """How a task's classes are described.

    Attributes:
        labels: the names of the classes in the order of their indices.
        templates: prompts in which `{}` stands for the label.
        scale: what cosines are multiplied with; None is the family's default.
        max_length: tokens per text; None is the family's default.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    scale: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise BadInput("a head needs labels", hint="list the classes under head: labels")
        if not self.templates:
            raise BadInput("a head needs at least one template", hint='the plain one is "{}"')
        for template in self.templates:
            if "{}" not in template:
                raise BadInput(f"template {template!r} has no place for the label", expected="{}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise BadInput(
                "the head's scale is no usable number", expected="above 0", found=self.scale
            )
        if self.max_length is not None and self.max_length < 1:
            raise BadInput(
                "the head's max_length is too small", expected="at least 1", found=self.max_length
            )

    def prompts(self) -> list[str]:
        """All texts, the templates of the first label first."""
        return [t.replace("{}", label) for label in self.labels for t in self.templates]

    def to_json(self) -> dict[str, object]:
        """The description as plain values."""
        return {
            "labels": list(self.labels),
            "templates": list(self.templates),
            "scale": self.scale,
            "max_length": self.max_length,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HeadSpec":
        """What `to_json` wrote."""
        values = dict(data)
        values["labels"] = tuple(values["labels"])
        values["templates"] = tuple(values["templates"])
        return cls(**values)


@dataclass(frozen=True)
class Head:
    """A head that a family built.

    Attributes:
        tensors: known to the family alone; `weight` is [classes, features] in label-embedding
            families.
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
        text = json.dumps(
            {"format": FORMAT_VERSION, "spec": self.spec.to_json()},
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )
        tensors = {n: self.tensors[n].detach().cpu().contiguous() for n in sorted(self.tensors)}
        data: bytes = save(tensors, metadata={_METADATA: text})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Head":
        """What `to_bytes` wrote.

        Raises:
            Damage: the bytes are no head, or one of a later format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA])
            if described["format"] != FORMAT_VERSION:
                raise Damage(
                    "a head has another format",
                    expected=FORMAT_VERSION,
                    found=described["format"],
                    hint="it was written by another version of restitch",
                )
            spec = HeadSpec.from_json(described["spec"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Damage("a stored head cannot be read", found=error) from error
        return cls(tensors, spec)


def head_key(
    *, family: str, version: int, base: str, assets: str, spec: HeadSpec, finetuned: str | None
) -> dict[str, object]:
    """All that a head is made from, as plain values to digest.

    Args:
        family: the family's name.
        version: the family's version.
        base: the digest of the base's weights.
        assets: the digest of its configuration, tokenizer and processor files.
        spec: the resolved description.
        finetuned: the digest of the finetuned weights where the head lies in them
            (`Family.head_tensors`), None otherwise.
    """
    return {
        "assets": assets,
        "base": base,
        "family": family,
        "family_version": version,
        "finetuned": finetuned,
        "spec": spec.to_json(),
    }


def scaled_cosines(features: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    """The scores of classes, [batch, classes]; in full precision, however features came about.

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
    of like length share a batch, so that little is padded; each distinct text is embedded once.

    Args:
        spec: labels and templates.
        embed: texts to features, [texts, features].
        batch_size: texts at once.
        progress: texts embedded, of how many.
    """
    prompts = spec.prompts()
    distinct = sorted(set(prompts), key=lambda text: (len(text), text))
    place = {text: index for index, text in enumerate(distinct)}
    features: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(distinct), batch_size):
            texts = distinct[start : start + batch_size]
            features.append(torch.nn.functional.normalize(embed(texts).float(), dim=-1).cpu())
            if progress is not None:
                progress(start + len(texts), len(distinct))
        table = torch.cat(features)
        classes = [
            table[[place[text] for text in texts]].mean(0)
            for texts in _chunks(prompts, len(spec.templates))
        ]
        weight = torch.nn.functional.normalize(torch.stack(classes), dim=-1)
    return weight.clone()  # outside of inference mode: losses are differentiated through it


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
