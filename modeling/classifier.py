"""The common part of classifier families: a base without the head, and each task's own head.

The base loads as the classification class of its architecture; it may have no head, or a head of
another kind. Weights are set and merged in the base model alone. The head's tensors, among them a
pooler, take the place of those of the class when rows are scored, so one loaded base serves every
task. The base scores a task with the head of the task's finetuned model.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.progress import Progress
from restitch.modeling.configs import differences, known_keys, model_type_difference, read_config
from restitch.modeling.families.family import Batch, Family
from restitch.modeling.heads import Head
from restitch.modeling.pretrained import NamedModel, load_pretrained
from restitch.modeling.task_heads import ClassifierHeads
from restitch.registry.specs.head import HeadSpec

# Keys for the backbone of another model.
_UNREAD = frozenset({"out_features", "out_indices", "stage_names"})


class Classifier(Family):
    """A family whose tasks have heads of their own, read from their finetuned models.

    A head with one output gives a number: the mean of a Gaussian with unit variance.
    """

    task_heads: ClassifierHeads
    unread: ClassVar[frozenset[str]] = frozenset()

    def lacks(self, folder: Path) -> str | None:
        """A classifier in transformers, or normalization that merging leaves valid."""
        try:
            self.task_heads.model_class(folder)
        except BadInput:
            kind = read_config(folder).model_type
            return f"a class with a classifier ({self.task_heads.auto_class} loads no {kind!r})"
        try:
            statistics = self.task_heads.layout(folder).statistics
        except BadInput as error:
            return f"an encoder apart from its head ({error.summary})"
        if statistics:
            return (
                "normalization that merging leaves valid (BatchNorm keeps statistics of the"
                f" unmerged weights: {shortlist(statistics)})"
            )
        return None

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass, and another class of classifiers."""
        ours, theirs = read_config(base), read_config(finetuned)
        if other := model_type_difference(ours.model_type, theirs.model_type):
            return other
        classes = [self.task_heads.model_class(each).__name__ for each in (base, finetuned)]
        kind = (
            []
            if classes[0] == classes[1]
            else [f"class: base {classes[0]}, finetuned {classes[1]}"]
        )
        return kind + differences(
            ours.to_dict(), theirs.to_dict(), ignore=_UNREAD | self.unread, known=known_keys(ours)
        )

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the classification class; its head has no values that are used."""
        lacking = self.lacks(folder)
        if lacking is not None:
            raise BadInput(f"{folder} lacks {lacking}")
        layout = self.task_heads.layout(folder)
        loaded = load_pretrained(
            folder,
            self.task_heads.model_class(folder),
            prefixes=(f"{layout.body}.", *self.prefixes),
            required=self.localizable,
            optional=layout.shapes,
            dtype=dtype,
            empty=empty,
        )
        body = {name: own for name, own in loaded.names.items() if own not in layout.shapes}
        return NamedModel(loaded.inner, body, folder, loaded.joined).eval()

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors of the base model but its pooler, by their names in the file."""
        return NamedModel.of(model).tensors()

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The head of the finetuned model, or the base's own, in the order of the task's labels."""
        own = folder if finetuned is None else finetuned
        spec = self.resolve(folder, spec)
        return Head(self.task_heads.read(own, Checkpoint.open(own), spec.classes), spec)

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The outputs of the classifier, [batch, classes]."""
        inner = NamedModel.of(model).inner
        # Heads are stored in float32.
        own = {name: tensor.to(inner.dtype) for name, tensor in head.tensors.items()}
        inputs = _inputs(inner, batch)
        scores: Tensor = functional_call(inner, own, (), inputs).logits
        return scores.float()

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Embeddings without a head: the mean of the last hidden states, [batch, features]."""
        inner = NamedModel.of(model).inner
        inputs = _inputs(inner, batch)
        hidden = inner.base_model(**inputs).last_hidden_state.float()
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            # Some image models keep the height and the width: [batch, features, height, width].
            pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
        return pooled

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The cross-entropy of the classes; of a number half the squared error."""
        if not head.spec.of_number:
            return super().loss(model, batch, head)
        found = self.logits(model, batch, head)[:, 0]
        return nn.functional.mse_loss(found, batch["labels"].to(found)) / 2


def _inputs(inner: Any, batch: Batch) -> Batch:
    """What the model reads of a batch; images are float32, and get its type."""
    return {
        name: tensor.to(inner.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in batch.items()
        if name != "labels"
    }
