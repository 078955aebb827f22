"""A family says what a kind of model is: how it loads, what may be localized, how it scores.

`Family` is the whole surface that the rest of restitch uses; nothing outside of this package
knows an architecture. A family is stateless: whatever belongs to one model lies in the
`torch.nn.Module` that `load` returned or in the `Head` of a task. The Protocol knows nothing
about label embeddings: a head is a set of tensors that only its family understands, so a
family with a classifier per task, or one with a language-model loss, fits as well.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.data.rows import Example
from restitch.modeling.heads import Head, HeadSpec

Batch = dict[str, Tensor]
Preprocess = Callable[[Sequence[Example]], Batch]


@runtime_checkable
class Family(Protocol):
    """A kind of model.

    Attributes:
        name: as users write it.
        version: raised when the same inputs would give other features, logits or losses.
        prefixes: what one of two checkpoints may carry before all of its tensor names.
        localizable: globs on the base's tensor names that masks select from by default.
        head_tensors: globs on tensor names of a finetuned checkpoint that are its task's own
            head and have no counterpart in the base. Empty where heads come from the base;
            otherwise `build_head` reads them from the finetuned folder.
        modality: what a row's input is, a text (or several) or one image.
    """

    name: str
    version: int
    prefixes: tuple[str, ...]
    localizable: tuple[str, ...]
    head_tensors: tuple[str, ...]
    modality: Literal["text", "image"]

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """All configuration keys that change the forward pass, `key: base x, finetuned y`."""

    def load(self, folder: Path) -> nn.Module:
        """The model in a folder: float32, evaluation mode, from safetensors only."""

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors of a loaded model by their names in the folder's own file.

        Ask after moving the model to its device: moving replaces buffers.
        """

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """What turns examples into a batch; it has `labels` where the examples have them."""

    def max_length(self, folder: Path) -> int | None:
        """The longest text that tokenizer and positions allow, None without a tokenizer."""

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """The head's description with this family's defaults filled in."""

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The head of a task.

        Args:
            model: the loaded base.
            folder: the base's folder.
            spec: labels, templates, scale and length; defaults are filled in.
            finetuned: the finetuned folder, for families with `head_tensors`.
            progress: texts embedded, of how many.
        """

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The scores of the classes, [batch, classes]."""

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean loss that the task is trained with, a scalar."""

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        """The names of configuration, tokenizer and processor files, sorted."""


_BUILT_IN = {
    "clip": ("restitch.modeling.families.clip", "Clip"),
    "text-encoder": ("restitch.modeling.families.text_encoder", "TextEncoder"),
}
_ADDED: dict[str, Family] = {}


def family_names() -> tuple[str, ...]:
    """All families that a line may name, sorted."""
    return tuple(sorted({*_BUILT_IN, *_ADDED}))


def get_family(name: str) -> Family:
    """The family of that name; its module is imported only now.

    Raises:
        BadInput: there is none; the message has the nearest name.
    """
    if name in _ADDED:
        return _ADDED[name]
    if name not in _BUILT_IN:
        near = get_close_matches(name, family_names(), n=1)
        raise BadInput(
            f"unknown family {name!r}",
            expected=f"one of {', '.join(family_names())}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    module, attribute = _BUILT_IN[name]
    family: Family = getattr(import_module(module), attribute)()
    return family


def add_family(family: Family) -> None:
    """Make one more family known in this process."""
    if family.name in _BUILT_IN:
        raise ValueError(f"family {family.name!r} is built in")
    _ADDED[family.name] = family
