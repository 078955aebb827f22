"""The common part of families that read prompts: the head is the model's own.

A family adds how rows become tokens, and how answers are scored.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.families.family import Family
from restitch.modeling.heads import Head
from restitch.modeling.kinds import model_kind
from restitch.modeling.pretrained import NamedModel, load_pretrained
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.questions import user_turn
from restitch.registry.specs.data import Modality
from restitch.registry.specs.head import HeadSpec


class LanguageModel(Family):
    """A family whose tasks have prompts.

    Attributes:
        auto_class: the name of the class of transformers that loads its models.
        answers_apart: true if answers have positions of their own, in a decoder.
    """

    auto_class: ClassVar[str]
    answers_apart: ClassVar[bool] = False
    modality: Modality = "text"
    reads_prompts = True

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the language model in a folder."""
        import transformers

        model = model_kind(folder)
        if model.kind not in self.kinds:
            raise BadInput(
                f"{folder} is not a model of the family {self.name}",
                expected=f"a model that {self.auto_class} loads",
                found=model,
            )
        return load_pretrained(
            folder,
            getattr(transformers, self.auto_class),
            prefixes=self.prefixes,
            required=self.localizable,
            dtype=dtype,
            empty=empty,
        )

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors by their names in the folder's file."""
        return NamedModel.of(model).tensors()

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in the length and how answers are compared.

        Raises:
            BadInput: there is no room for a prompt before the longest generated answer, or no chat
                template for a prompt that needs one.
        """
        if spec.chat:
            user_turn(load_tokenizer(folder), "")
        update: dict[str, Any] = {"max_length": spec.max_length or self.max_length(folder)}
        if not spec.of_text:
            update |= {"score": spec.score or "sum"}
        if spec.generate is not None and self.answers_apart:
            update |= {"apart": True}
        spec = spec.model_copy(update=update)
        if spec.generate is not None and spec.generate.max_new_tokens >= (spec.max_length or 0):
            raise BadInput(
                "generate: max_new_tokens leaves no room for a prompt",
                expected=f"less than the {spec.max_length} tokens that the model reads",
                found=spec.generate.max_new_tokens,
                hint="lower max_new_tokens in the task's file (max_gen_toks in lm-eval's)",
            )
        return spec

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The description alone."""
        return Head({}, self.resolve(folder, spec))
