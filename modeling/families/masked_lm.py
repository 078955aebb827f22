"""Masked language models: the log-probabilities of label words at the mask of a prompt.

Any text encoder that `AutoModelForMaskedLM` loads with its head works: RoBERTa, BERT, DeBERTa,
ModernBERT, ... A prompt has `{mask}` once, and the choices of a task are the words that stand
there, as in `{text} It was {mask}.` with `great` and `terrible`. The rules:

- A word is one token in its place: the prompt is tokenized with the word in it, and the token that
  covers the word is its label, with the space before it where the tokenizer joins them (RoBERTa).
  A word of several tokens is refused, and the message lists them: their joint probability at one
  mask is not defined, and several masks would compare words of different lengths.
- The mask takes the place of that token, as in pretraining. The tokenizer's own special tokens
  ([CLS], [SEP]) are added.
- The score is the log-probability of the word's token over the whole vocabulary, in float32. As
  each word is one token, `sum` and `per_token` are the same.
- A prompt that is too long loses its beginning. The mask and what follows it are kept, unless they
  alone are too long: then the prompt loses its end.

By default only the transformer blocks are localizable. Embeddings and head are the base's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.modeling.answers import Answers, log_probabilities
from restitch.modeling.configs import config_differences
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind
from restitch.modeling.language_model import LanguageModel
from restitch.modeling.pretrained import NamedModel, missing_outside_of_blocks
from restitch.modeling.pretrained_files import has_tokenizer, load_tokenizer
from restitch.modeling.questions import (
    Question,
    check_answers,
    question_batch,
    special_tokens,
)
from restitch.modeling.text_inputs import BLOCKS, PREFIXES, text_limit

_NEEDED = "a tokenizer with a mask token, in tokenizer.json"


class MaskedLm(LanguageModel):
    """The family `masked-lm`."""

    name = "masked-lm"
    summary = "the likeliest word at the mask of a prompt"
    version = 1
    prefixes = PREFIXES
    localizable = BLOCKS
    auto_class = "AutoModelForMaskedLM"
    fills_mask = True
    kinds = (Kind.TEXT_ENCODER,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass."""
        return config_differences(base, finetuned)

    def lacks(self, folder: Path) -> str | None:
        """A head, or a mask token."""
        from transformers import AutoModelForMaskedLM

        missing = missing_outside_of_blocks(folder, AutoModelForMaskedLM, self.prefixes)
        if missing is None:
            return "a head that AutoModelForMaskedLM of transformers loads"
        if missing:
            return f"the tensors of a masked-language-model head ({', '.join(missing[:3])})"
        if has_tokenizer(folder) and not _can_mask(load_tokenizer(folder)):
            return _NEEDED
        return None

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and position embeddings."""
        return text_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize prompts with their words, padded at the end."""
        tokenizer = load_tokenizer(folder)
        if not _can_mask(tokenizer):
            raise BadInput(f"{folder} has no mask", expected=_NEEDED)
        limit = max_length or self.max_length(folder)
        encoder = _Encoder(tokenizer, limit, *special_tokens(tokenizer))

        def preprocess(examples: Sequence[Example]) -> Batch:
            masked = [encoder.masked(example) for example in examples]
            batch = question_batch([one.question for one in masked], examples)
            return {**batch, "mask": torch.tensor([one.place for one in masked])}

        return preprocess

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The log-probabilities of the words, [batch, choices]; -inf where a row has no choice."""
        answers = Answers.of(batch)
        return answers.scores(_likelihoods(model, batch, answers), batch, head.spec.score)

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean negative log-likelihood of the right words."""
        return -_likelihoods(model, batch, Answers.of(batch).right(batch["labels"])).mean()


def _can_mask(tokenizer: Any) -> bool:
    return tokenizer.mask_token_id is not None and tokenizer.is_fast


@dataclass(frozen=True)
class _Masked:
    """A prompt with its mask.

    Attributes:
        question: the prompt with special tokens and the mask, and the token of each word.
        place: the place of the mask in the prompt.
    """

    question: Question
    place: int


@dataclass(frozen=True)
class _Encoder:
    """Tokenizes prompts with their words.

    Attributes:
        limit: the most tokens of a prompt, with special tokens.
        first: the tokens that the tokenizer puts before every text by itself.
        last: those that it puts after every text.
    """

    tokenizer: Any
    limit: int
    first: list[int]
    last: list[int]

    def masked(self, example: Example) -> _Masked:
        """The tokens of a row."""
        before, after = self._texts(example)
        choices = [word for word in example.choices if word is not None]
        words = choices or [self.tokenizer.mask_token]
        filled = self.tokenizer(
            [f"{before}{word}{after}" for word in words],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        each = zip(words, filled.input_ids, filled.offset_mapping, strict=True)
        found = {
            word: (tokens, self._place(example, word, tokens, offsets))
            for word, tokens, offsets in each
        }
        answers = [
            [] if word is None else [found[word][0][found[word][1]]] for word in example.choices
        ]
        check_answers(example, answers, 1)
        return self._cut(*self._agreed(example, found), answers)

    def _texts(self, example: Example) -> tuple[str, str]:
        if len(example.inputs) != 2:
            raise BadInput(
                f"{example.where}: a masked language model reads one prompt with one {{mask}}",
                found=f"{len(example.inputs)} texts",
            )
        before, after = example.inputs
        return before, after

    def _place(
        self, example: Example, word: str, tokens: list[int], offsets: list[tuple[int, int]]
    ) -> int:
        """The place of the one token that covers a word.

        Raises:
            BadInput: there are several, it is unknown, or it covers other text as well.
        """
        before, after = example.inputs
        text = f"{before}{word}{after}"
        start = len(before) + len(word) - len(word.lstrip())
        end = len(before) + len(word.rstrip())
        places = [at for at, (a, b) in enumerate(offsets) if b > start and a < end]
        names = self.tokenizer.convert_ids_to_tokens([tokens[at] for at in places])
        if len(places) != 1:
            raise BadInput(
                f"{example.where}: the choice {word!r} is not one token at the mask",
                expected="a word that is one token of the base's tokenizer in its place",
                found=f"{len(places)} tokens: {', '.join(map(repr, names))}",
                hint="choose another word; mind the space before {mask} in the prompt",
            )
        a, b = offsets[places[0]]
        if text[a:start].strip() or text[end:b].strip():
            raise BadInput(
                f"{example.where}: the choice {word!r} shares a token with the text around it",
                expected="a word that is a token alone",
                found=repr(text[a:b]),
                hint="write a space before and after {mask} in the prompt",
            )
        if tokens[places[0]] == self.tokenizer.unk_token_id:
            raise BadInput(
                f"{example.where}: the choice {word!r} is not in the vocabulary of the base",
                expected="a word that is one token of the base's tokenizer",
                found=repr(names[0]),
                hint="choose another word",
            )
        return places[0]

    def _agreed(
        self, example: Example, found: dict[str, tuple[list[int], int]]
    ) -> tuple[list[int], int]:
        """The tokens with the mask, which all words must give.

        Raises:
            BadInput: two words change the tokens around them in different ways.
        """
        masked: dict[tuple[int, ...], tuple[str, int]] = {}
        for word, (tokens, place) in found.items():
            each = (*tokens[:place], self.tokenizer.mask_token_id, *tokens[place + 1 :])
            masked.setdefault(each, (word, place))
        if len(masked) > 1:
            one, other, *_ = (word for word, _ in masked.values())
            raise BadInput(
                f"{example.where}: the text around {{mask}} has other tokens with {one!r} than with"
                f" {other!r}",
                expected="the same tokens before and after all words",
                found=repr(f"{example.inputs[0][-20:]}{{mask}}{example.inputs[1][:20]}"),
                hint="write a space before and after {mask} in the prompt",
            )
        agreed, (_, place) = next(iter(masked.items()))
        return list(agreed), place

    def _cut(self, tokens: list[int], place: int, answers: Sequence[Sequence[int]]) -> _Masked:
        """The prompt with its special tokens, no longer than the limit."""
        most = max(self.limit - len(self.first) - len(self.last), 1)
        lost = max(len(tokens) - most, 0)
        start = min(lost, place)
        kept = tokens[start : start + most]
        prompt = [*self.first, *kept, *self.last]
        return _Masked(Question(prompt, answers, lost), len(self.first) + place - start)


def _likelihoods(model: nn.Module, batch: Batch, answers: Answers) -> Tensor:
    """The log-probability of each word at the mask of its row."""
    inner = NamedModel.of(model).inner
    places, lengths = batch["mask"], batch["prompt_length"]
    tokens = batch["prompt"]
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    with _head_at(inner, tokens, places):
        logits = inner(input_ids=tokens, attention_mask=inside.long()).logits
    at_mask = logits[:, 0] if logits.shape[1] == 1 else logits[torch.arange(len(places)), places]
    return log_probabilities(at_mask[answers.rows], answers.tokens[:, 0])


@contextmanager
def _head_at(inner: Any, tokens: Tensor, places: Tensor) -> Iterator[None]:
    """Apply the head of a model at one place of each row of tokens only, within a block.

    Other tokens may go through the model at the same time.
    """
    encoder = inner.base_model
    if encoder is inner:
        yield
        return

    def select(
        _module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if not any(one is tokens for one in (*given, *named.values())):
            return output
        hidden = output[0]
        at_mask = hidden[torch.arange(len(places), device=hidden.device), places].unsqueeze(1)
        if isinstance(output, tuple):
            return (at_mask, *output[1:])
        output["last_hidden_state"] = at_mask
        return output

    handle = encoder.register_forward_hook(select, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
