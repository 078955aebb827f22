"""A family describes a kind of model: how it loads, what is localizable, how a row is scored.

`Family` is the whole interface that restitch uses; no other room knows an architecture. A family
is one file of this folder (`text_encoder.py` holds the class `TextEncoder`, the family
`text-encoder`), or comes from another package through the entry point group `restitch.families`.

A family is stateless: the state of a model lies in the `torch.nn.Module` that `load` returned or
in the `Head` of a task. A head is a set of tensors that only its family understands, so a family
with a classifier per task, or with a language-model loss, fits as well.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.data.rows import Example
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind
from restitch.modeling.pretrained_files import asset_files
from restitch.modeling.task_heads import TaskHeads
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.metric import MetricName

GROUP = "restitch.families"
Batch = dict[str, Tensor]
Preprocess = Callable[[Sequence[Example]], Batch]


@runtime_checkable
class Family(Protocol):
    """A kind of model.

    Attributes:
        name: the name in line files.
        summary: what the answer for a row is, in a few words that tell the family apart from
            others of the same kinds.
        version: raise it when the same inputs give other features, logits or losses.
        prefixes: what one of two checkpoints may carry before all of its tensor names.
        localizable: globs on the base's tensor names that masks select from by default.
        task_heads: reads the heads that lie in finetuned models; `build_head` builds from the
            finetuned folder then. None if heads come from the base.
        modality: the input of a row: one or more texts, or one image.
        kinds: the kinds of bases that it takes. Empty if `config_differences` decides alone; such a
            family is never proposed.
        also: more kinds of bases that it takes if a line names it; it is not proposed for them.
        model_types: the model types among these kinds; empty for all.
        parts: kinds of finetuned models that hold only a part of the base.
        reads_prompts: true for language models: tasks have a prompt instead of a head.
        fills_mask: true if a prompt has one `{mask}`, the place of the answer: a row has two texts,
            the prompt before it and after it.
        chats: true if a prompt may be a turn of the user in a chat.
        metrics: those that its tasks may have. `exact_match` needs `generate`, `perplexity` needs
            `text_losses`, and `squared_error` needs `logits` with one column for a head
            `of_number`.
    """

    name: str
    summary: str
    version: int
    prefixes: tuple[str, ...]
    localizable: tuple[str, ...]
    task_heads: TaskHeads | None = None
    modality: Modality
    kinds: tuple[Kind, ...] = ()
    also: tuple[Kind, ...] = ()
    model_types: tuple[str, ...] = ()
    parts: tuple[Kind, ...] = ()
    reads_prompts: bool = False
    fills_mask: bool = False
    chats: bool = False
    metrics: tuple[MetricName, ...] = ("accuracy", "f1")

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The differing configuration keys that change the forward pass.

        Each as `key: base x, finetuned y`.
        """

    def lacks(self, folder: Path) -> str | None:
        """What a base of a right kind lacks for this family, such as a head; None if nothing.

        A folder without weights lacks nothing that only they could show.
        """
        return None

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """The model in a folder: evaluation mode, from safetensors only.

        Args:
            folder: the folder.
            dtype: the type of all weights, float32 or bfloat16; normalized features, losses and
                scores are float32 nevertheless. A family without this argument is used in float32
                only.
            empty: leave the weights out: they are on the meta device, and `parameters` lists them.
                A family without this argument is always loaded as a whole.
        """

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors of a loaded model by their names in the folder's own file.

        Call it after moving the model to its device: moving replaces buffers.
        """

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """A function that turns examples into a batch, with `labels` if the examples have them.

        A family that reads prompts adds `cut`, the number of tokens that each row loses.
        """

    def max_length(self, folder: Path) -> int | None:
        """The most tokens that tokenizer and positions allow; None without a tokenizer."""

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
            spec: labels, templates, scale and length; `build_head` fills in defaults.
            finetuned: the finetuned folder, for families with `task_heads`; None takes the base's
                own head.
            progress: texts embedded, of how many.
        """

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The scores of the classes, [batch, classes]; -inf for a choice that a row lacks."""

    def predictions(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """What localizers match and method statistics read: scores without normalization.

        Returns:
            [batch, classes], or [batch, positions, tokens] where a row has several predictions.
        """
        return self.logits(model, batch, head)

    def text_losses(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The negative log-likelihood of each whole text, and its tokens, [batch, 2]."""
        raise BadInput(f"the family {self.name} does not score whole texts")

    def generate(self, model: nn.Module, batch: Batch, head: Head) -> list[str]:
        """The text that the model writes after each prompt, without the text that ends it."""
        raise BadInput(f"the family {self.name} does not generate texts")

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean training loss of the batch, a scalar: the cross-entropy of the scores."""
        return nn.functional.cross_entropy(self.logits(model, batch, head), batch["labels"])

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        """The names of configuration, tokenizer and processor files, sorted."""
        return asset_files(folder)


_SURFACE = {*Family.__annotations__, *(name for name in vars(Family) if name[0] != "_")}


def family_names() -> tuple[str, ...]:
    """All families that a line may name, sorted."""
    return tuple(sorted({*_files(), *(entry.name for entry in entry_points(group=GROUP))}))


@cache
def get_family(name: str) -> Family:
    """The family with this name; its module is imported only now.

    Raises:
        BadInput: there is none, two packages offer it, or its package is broken.
    """
    files = _files()
    entries = list(entry_points(group=GROUP, name=name))
    if len(entries) + (name in files) > 1:
        owners = sorted({_package(entry) for entry in entries})
        raise BadInput(
            f"several packages offer the family {name!r}",
            found=", ".join(["restitch"] * (name in files) + owners),
            hint="uninstall all but one, or rename the family in its package",
        )
    if entries:
        return _load(entries[0])
    if name in files:
        stem = files[name]
        kind = "".join(part.capitalize() for part in stem.split("_"))
        family: Family = getattr(import_module(f"{__package__}.{stem}"), kind)()
        return family
    near = get_close_matches(name, family_names(), n=1)
    raise BadInput(
        f"unknown family {name!r}",
        expected=f"one of {', '.join(family_names())}",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def loads_in_any_type(family: Family) -> bool:
    """True if a family loads models in other types than float32, too."""
    return "dtype" in signature(family.load).parameters


def loads_without_weights(family: Family) -> bool:
    """True if a family makes models whose weights are read later."""
    return "empty" in signature(family.load).parameters


def _files() -> dict[str, str]:
    """The modules of this folder by the family that each holds."""
    stems = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    return {stem.replace("_", "-"): stem for stem in stems if stem != Path(__file__).stem}


def _load(entry: EntryPoint) -> Family:
    """The family that another package offers, as a class or as an object."""
    problem = f"the family {entry.name!r} of the package {_package(entry)} cannot be used"
    hint = f"fix or uninstall {_package(entry)}; its entry point is {entry.value!r}"
    try:
        family = entry.load()
        family = family() if isinstance(family, type) else family
    except Exception as error:  # code of somebody else
        found = f"{type(error).__name__}: {error}"
        raise BadInput(
            problem, expected="a class or an object that can be imported", found=found, hint=hint
        ) from error
    missing = sorted(name for name in _SURFACE if not hasattr(family, name))
    if missing:
        raise BadInput(
            problem, expected="all members of Family", found=f"no {', '.join(missing)}", hint=hint
        )
    if family.name != entry.name:
        raise BadInput(
            problem, expected=f"name = {entry.name!r}", found=f"name = {family.name!r}", hint=hint
        )
    known: Family = family
    return known


def _package(entry: EntryPoint) -> str:
    return "?" if entry.dist is None else entry.dist.name
