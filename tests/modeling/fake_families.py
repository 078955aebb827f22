"""Two families without label embeddings, which the Protocol must fit as well.

`PerTaskClassifier` has a linear head in each finetuned checkpoint. `LanguageModel` is trained
with next-token losses and scores a class by the logit of its label's first byte.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.progress import Progress
from restitch.modeling.data.task_data import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind
from restitch.modeling.task_heads import TaskHeads
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.metric import MetricName

WIDTH = 8
BYTES = 256


class _Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return hidden


class _Tokens:
    """What both fakes share: folders, bytes as tokens, a tower."""

    version = 1
    summary = "for tests"
    prefixes: tuple[str, ...] = ("model.",)
    localizable: tuple[str, ...] = ("blocks.*",)
    task_heads: TaskHeads | None = None
    modality: Literal["text", "image"] = "text"
    kinds: tuple[Kind, ...] = ()
    also: tuple[Kind, ...] = ()
    model_types: tuple[str, ...] = ()
    parts: tuple[Kind, ...] = ()
    reads_prompts = False
    metrics: tuple[MetricName, ...] = ("accuracy", "f1")
    fills_mask = False
    chats = False

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        ours, theirs = (json.loads((f / "config.json").read_text()) for f in (base, finetuned))
        return [
            f"{key}: base {ours.get(key)!r}, finetuned {theirs.get(key)!r}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]

    def lacks(self, folder: Path) -> str | None:
        return None

    def load(self, folder: Path) -> nn.Module:
        tower = _Tower(json.loads((folder / "config.json").read_text())["width"])
        tower.load_state_dict(
            {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
        )
        return tower.requires_grad_(False).eval()

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(model.named_parameters())

    def max_length(self, folder: Path) -> int | None:
        return 32

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        def preprocess(examples: Sequence[Example]) -> Batch:
            texts = [e.inputs[0].encode()[: max_length or 32] for e in examples]
            longest = max(len(text) for text in texts)
            tokens = torch.tensor([list(text.ljust(longest, b"\0")) for text in texts])
            batch = {"tokens": tokens}
            if all(e.label is not None for e in examples):
                batch["labels"] = torch.tensor([e.label for e in examples])
            return batch

        return preprocess

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        return spec.model_copy(update={"max_length": spec.max_length or self.max_length(folder)})

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        return ("config.json",)

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        raise NotImplementedError

    def predictions(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        return self.logits(model, batch, head)

    def text_losses(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        raise NotImplementedError

    def generate(self, model: nn.Module, batch: Batch, head: Head) -> list[str]:
        raise NotImplementedError


class _Heads:
    """The tensors `classifier.*`; their classes have no names."""

    def tensors(self, folder: Path, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(name for name in names if name.startswith("classifier.")))

    def labels(self, folder: Path) -> tuple[str, ...]:
        return ("LABEL_0", "LABEL_1")

    def check(self, folder: Path, checkpoint: Checkpoint, labels: Sequence[str]) -> tuple[str, ...]:
        return ()

    def count_classes(self, folder: Path, checkpoint: Checkpoint) -> int | None:
        return 2

    def whole_names(self, folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
        return {name: name for name in checkpoint.names}

    def whole_config(self, folder: Path, labels: Sequence[str]) -> dict[str, Any]:
        return {}


class PerTaskClassifier(_Tokens):
    name = "fake-classifier"
    task_heads = _Heads()

    def load(self, folder: Path) -> nn.Module:
        tower = _Tower(json.loads((folder / "config.json").read_text())["width"])
        tensors = load_file(folder / "model.safetensors")
        tower.load_state_dict(
            {n: t.float() for n, t in tensors.items() if not n.startswith("classifier.")}
        )
        return tower.requires_grad_(False).eval()

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        if finetuned is None:
            raise BadInput("this family's heads lie in finetuned checkpoints")
        tensors = load_file(finetuned / "model.safetensors")
        return Head(
            {"weight": tensors["classifier.weight"], "bias": tensors["classifier.bias"]},
            self.resolve(folder, spec),
        )

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        pooled = model(batch["tokens"]).mean(1)
        return nn.functional.linear(pooled, head.tensors["weight"], head.tensors["bias"])

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        return nn.functional.cross_entropy(self.logits(model, batch, head), batch["labels"])


class LanguageModel(_Tokens):
    name = "fake-language-model"

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        first = torch.tensor([label.encode()[0] for label in spec.classes])
        return Head({"tokens": first}, self.resolve(folder, spec))

    def _next(self, model: nn.Module, batch: Batch) -> Tensor:
        tower = cast("Any", model)
        scores: Tensor = tower(batch["tokens"]) @ tower.embed.weight.T
        return scores

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        return self._next(model, batch)[:, -1, head.tensors["tokens"]]

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """Of the text's own next bytes; labels play no part."""
        scores = self._next(model, batch)
        return nn.functional.cross_entropy(
            scores[:, :-1].reshape(-1, BYTES), batch["tokens"][:, 1:].reshape(-1)
        )


def fake_folder(folder: Path, *, seed: int = 0, classes: int | None = None) -> Path:
    """A checkpoint folder of the fakes; with `classes` it has a task's own head."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = dict(_Tower(WIDTH).state_dict())
    if classes is not None:
        tensors["classifier.weight"] = torch.randn(classes, WIDTH)
        tensors["classifier.bias"] = torch.randn(classes)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": WIDTH}))
    return folder
