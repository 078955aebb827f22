"""Causal language models: the log-likelihoods of a question's answers, given its prompt.

Any decoder that `AutoModelForCausalLM` loads works. The score of a choice is the sum of the
log-probabilities of its tokens after the prompt, or that sum per token or per character. The rules
are those of lm-eval:

- The answer is a space and the choice, or the choice alone after a prompt that ends with white
  space. White space at the end of the prompt is tokenized with the answer.
- The tokens of the answer are those of prompt and answer together, without as many as the prompt
  alone has.
- The tokenizer's own first token (BOS) comes first if the tokenizer adds one by itself. A prompt
  without tokens begins with BOS, or else EOS.
- A prompt that is a turn of a chat goes through the tokenizer's chat template with its beginning of
  an answer; no space is added after that. BOS comes first once, from the template or from the
  tokenizer.
- A prompt that is too long loses its beginning, for all its choices alike; an answer is never cut.
- Texts are generated greedily. Prompts of different lengths are padded on the left, without an
  effect on positions.
- Perplexity predicts every token of a text, which is tokenized without special tokens; see
  `whole_texts`.

By default only the decoder blocks are localizable. Embeddings and head are the base's.
"""

from collections.abc import Iterator, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.modeling.answers import SCORED, Answers, log_probabilities, matched, summed
from restitch.modeling.configs import config_differences
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.generation import generated
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind
from restitch.modeling.language_model import LanguageModel
from restitch.modeling.pretrained import NamedModel
from restitch.modeling.pretrained_files import language_model_files, load_tokenizer
from restitch.modeling.questions import (
    PADDING,
    Question,
    QuestionText,
    check_answers,
    first_of_nothing,
    not_empty,
    prompt_limit,
    question_batch,
    special_tokens,
    tokens_of,
)
from restitch.modeling.whole_texts import Windows, mean_loss, text_batch, text_tokens
from restitch.registry.specs.metric import MetricName

# The blocks in the layouts that decoders have. Old files also hold buffers such as `attn.bias`, the
# causal mask, and `rotary_emb.inv_freq`, which are no weights: the ends of names leave them out.
_BLOCKS = ("layers.[0-9]*", "h.[0-9]*", "blocks.[0-9]*")
_ENDS = (".weight", "[!n].bias", "c_attn.bias", "ln_attn.bias", "fc_in.bias", ".experts.*_proj")
# Tokens that go through the model at once when no gradients are needed.
_TOKENS = 2048
# Tokens that must be saved before the common beginning of prompts goes through the model alone.
_WORTH_A_PASS = 64


class CausalLm(LanguageModel):
    """The family `causal-lm`."""

    name = "causal-lm"
    summary = "the likeliest answer after a prompt"
    version = 2
    prefixes = ("model.", "transformer.", "gpt_neox.")
    localizable = tuple(
        f"{start}{block}{end}" for start in ("", "*.") for block in _BLOCKS for end in _ENDS
    )
    auto_class = "AutoModelForCausalLM"
    chats = True
    metrics: tuple[MetricName, ...] = ("accuracy", "f1", "exact_match", "perplexity")
    kinds = (Kind.CAUSAL_LM,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass."""
        # Padding stands after all that counts.
        return config_differences(base, finetuned, ignore=frozenset({"pad_token_id"}))

    def load(
        self, folder: Path, dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> nn.Module:
        """Load the language model in a folder."""
        found = super().load(folder, dtype, empty=empty)
        head = NamedModel.of(found).inner.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_contiguous)
        return found

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and positions."""
        return prompt_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize prompts and choices, or whole texts, padded at the end."""
        encoder = _Encoder.of(folder, max_length or self.max_length(folder))

        def preprocess(examples: Sequence[Example]) -> Batch:
            if not any(example.choices for example in examples):
                return encoder.texts(examples)
            return question_batch(encoder.questions(examples), examples)

        return preprocess

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The log-likelihoods of the choices, [batch, choices]; -inf where a row has no choice."""
        inner, answers = NamedModel.of(model).inner, Answers.of(batch)
        # A cache grows with each pass, also with the second one of checkpointed gradients.
        likelihoods = _whole if torch.is_grad_enabled() else _shared
        return answers.scores(likelihoods(inner, answers), batch, head.spec.score)

    def predictions(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The scores of choices; or of the next tokens, at some positions of answers and texts."""
        inner = NamedModel.of(model).inner
        if head.spec.of_text:
            windows = Windows.of(batch).first()
            logits = _text_logits(inner, windows)
            each = [row[:length] for row, length in zip(logits, windows.lengths, strict=True)]
        elif head.spec.answer is not None:
            each = list(_answer_logits(inner, Answers.of(batch)))
        else:
            return self.logits(model, batch, head)
        return matched(each)

    def text_losses(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The negative log-likelihood of each text, and its tokens, [batch, 2]."""
        inner = NamedModel.of(model).inner
        return Windows.of(batch).losses(lambda windows: _text_logits(inner, windows))

    def generate(self, model: nn.Module, batch: Batch, head: Head) -> list[str]:
        """The text that the model writes after each prompt."""
        assert head.spec.generate is not None
        named, answers = NamedModel.of(model), Answers.of(batch)
        together = [list(range(len(answers.prompts)))]
        if _is_stateful(named.inner):
            together = [[row] for row in together[0]]
        beginning = _Beginning.of(named.inner, answers)
        texts: list[str] = []
        for rows in together:
            before = _Before.of(answers, rows, beginning.length)
            inputs = {"input_ids": before.tokens, "attention_mask": before.mask()}
            inputs |= beginning.copied(len(rows), kept=True)
            texts += generated(named, inputs, before.tokens.shape[1], head.spec.generate)
        return texts

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean negative log-likelihood of the right answers, or of all tokens of texts."""
        if head.spec.of_text:
            return mean_loss(self.text_losses(model, batch, head))
        right = Answers.of(batch).right(batch["labels"])
        return -_whole(NamedModel.of(model).inner, right).mean()

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        """Also the settings for generation."""
        return language_model_files(folder)


@dataclass(frozen=True)
class _Encoder:
    """Tokenizes questions.

    Attributes:
        limit: the most tokens that go into the model. The last one of an answer does not.
        first: the tokens that the tokenizer puts before every text by itself.
    """

    tokenizer: Any
    limit: int
    first: list[int]

    @classmethod
    def of(cls, folder: Path, limit: int) -> "_Encoder":
        """The encoder with the tokenizer of a folder."""
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, limit, special_tokens(tokenizer)[0])

    def questions(self, examples: Sequence[Example]) -> list[Question]:
        """The tokens of rows: all texts go through the tokenizer at once."""
        texts: list[str] = []
        for one in (QuestionText.of(example, self.tokenizer) for example in examples):
            choices = (choice for choice in one.choices if choice is not None)
            texts += [one.prompt, *(one.prompt + choice for choice in choices)]
        encoded = iter(tokens_of(self.tokenizer, texts))
        return [self._question(example, encoded) for example in examples]

    def texts(self, examples: Sequence[Example]) -> Batch:
        """The tokens of whole texts."""
        texts = text_tokens(self.tokenizer, examples)
        return text_batch(texts, examples, first_of_nothing(self.tokenizer), self.limit)

    def _question(self, example: Example, encoded: Iterator[list[int]]) -> Question:
        context = next(encoded)
        answers = [
            [] if choice is None else next(encoded)[len(context) :] for choice in example.choices
        ]
        check_answers(example, answers, self.limit)
        longest = max(map(len, answers), default=0)
        prompt = [*self.first, *context]
        if self.first and context[: len(self.first)] == self.first:
            prompt = context  # the text has it itself
        tokens = not_empty(prompt, self.tokenizer, example)
        kept = tokens[-(self.limit + 1 - max(longest, 1)) :]
        return Question(kept, answers, len(tokens) - len(kept))


def _whole(inner: Any, answers: Answers) -> Tensor:
    """The log-likelihood of each answer, each after a prompt of its own."""
    if not answers.rows:
        return torch.zeros(0, device=answers.tokens.device)
    pairs = zip(_answer_logits(inner, answers), answers.tokens, strict=True)
    return torch.stack([log_probabilities(one, t[: len(one)]).sum() for one, t in pairs])


def _answer_logits(inner: Any, answers: Answers) -> Iterator[Tensor]:
    """The logits at the tokens of each answer, [tokens, vocabulary]."""
    starts = [answers.prompt_lengths[row] for row in answers.rows]
    lengths = [start + n - 1 for start, n in zip(starts, answers.lengths, strict=True)]
    longest = max(lengths, default=0)
    tokens = answers.tokens.new_full((len(starts), longest), PADDING)
    for place, (row, start, length) in enumerate(zip(answers.rows, starts, lengths, strict=True)):
        tokens[place, :start] = answers.prompts[row, :start]
        tokens[place, start:length] = answers.tokens[place, : length - start]
    first = min(starts) - 1
    logits = _logits(inner, tokens, longest - first)
    for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        yield logits[place, start - 1 - first : length - first]


def _text_logits(inner: Any, windows: Windows) -> Tensor:
    """The logits at the tokens of windows."""
    return _logits(inner, windows.tokens[:, :-1], windows.tokens.shape[1] - 1)


def _shared(inner: Any, answers: Answers) -> Tensor:
    """The log-likelihood of each answer; a prompt goes through the model once.

    Prompts end at the same place, so that nothing stands between a prompt and its answers: shorter
    ones are padded on the left. The first token of an answer follows from the prompt; the others
    need the prompt's keys and values. Tokens with which all prompts begin go through once for all.
    """
    of_row = answers.of_rows
    found = torch.zeros(len(answers.rows), device=answers.tokens.device)
    beginning = _Beginning.of(inner, answers)
    for rows in answers.together(_TOKENS, padded=_can_pad(inner)):
        before = _Before.of(answers, rows, beginning.length)
        places = [place for row in rows for place in of_row[row]]
        owners = [at for at, row in enumerate(rows) for _ in of_row[row]]
        longer = [at for at, place in enumerate(places) if answers.lengths[place] > 1]
        given = {**beginning.copied(len(rows), bool(longer)), **before.masked()}
        output = _forward(inner, before.tokens, 1, **given)
        ends = output.logits[:, -1].float().log_softmax(-1)
        found[places] = ends[owners, answers.tokens[places, 0]]
        if not longer:
            continue
        places, owners = [places[at] for at in longer], [owners[at] for at in longer]
        cache: Any = getattr(output, "past_key_values", None)
        if _can_select(cache):
            cache.batch_select_indices(torch.tensor(owners, device=answers.tokens.device))
            found[places] += _continued(inner, answers, places, cache, before.select(owners))
        else:
            for place in places:
                found[place] = _whole(inner, answers.alone(place))[0]
    return found


@dataclass(frozen=True)
class _Beginning:
    """The tokens with which all prompts of a batch begin: instructions, examples, a system prompt.

    Attributes:
        length: of them; 0 if each prompt goes through the model as a whole.
        cache: their keys and values, of one row.
    """

    length: int = 0
    cache: Any = None

    @classmethod
    def of(cls, inner: Any, answers: Answers) -> "_Beginning":
        """What the prompts share, if that saves more than one more pass costs.

        Padding stands between the beginning and the rest of a prompt, and would count in a window
        of the last places.
        """
        length = answers.common_beginning()
        if length * len(answers.prompts) < _WORTH_A_PASS or not _can_pad(inner):
            return cls()
        tokens = answers.prompts[:1, :length]
        cache = getattr(_forward(inner, tokens, 1, use_cache=True), "past_key_values", None)
        if not _can_select(cache) or _has_windows(inner, cache):
            return cls()
        return cls(length, cache)

    def copied(self, rows: int, kept: bool) -> dict[str, Any]:
        """What a pass over the rest of some prompts needs.

        Args:
            rows: the number of prompts.
            kept: their keys and values are needed after it.
        """
        if not self.length:
            return {"use_cache": kept}
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache, "use_cache": True}


@dataclass(frozen=True)
class _Before:
    """Prompts that end at the same place.

    Attributes:
        tokens: [rows, longest], without those that went through the model before.
        padding: the number of tokens before each prompt that are none of its own, [rows, 1].
        done: the number of tokens that went through the model before.
    """

    tokens: Tensor
    padding: Tensor
    done: int = 0

    @classmethod
    def of(cls, answers: Answers, rows: Sequence[int], done: int) -> "_Before":
        """The prompts of some rows, without as many tokens as are done."""
        prompts = answers.prompts[rows, done:]
        lengths = [answers.prompt_lengths[row] - done for row in rows]
        longest = max(lengths)
        padding = longest - torch.tensor(lengths, device=prompts.device).unsqueeze(1)
        places = torch.arange(longest, device=prompts.device) - padding
        return cls(prompts.gather(1, places.clamp(min=0)), padding, done)

    def mask(self, more: int = 0) -> Tensor:
        """1 at all tokens that count, and 0 at padding, [rows, done + longest + more]."""
        length = self.done + self.tokens.shape[1] + more
        places = torch.arange(length, device=self.tokens.device)
        return ((places < self.done) | (places - self.padding >= self.done)).long()

    def masked(self, more: int = 0) -> dict[str, Tensor]:
        """The mask and the positions of the prompts, or of `more` tokens after them.

        Empty if nothing is padded.
        """
        if not bool(self.padding.any()):
            return {}
        mask = self.mask(more)
        first = mask.shape[1] - more if more else self.done
        places = torch.arange(first, mask.shape[1], device=mask.device)
        return {"attention_mask": mask, "position_ids": (places - self.padding).clamp(min=0)}

    def select(self, rows: Sequence[int]) -> "_Before":
        """Some of the prompts, each as often as it is named."""
        return _Before(self.tokens[rows], self.padding[rows], self.done)


def _can_pad(inner: Any) -> bool:
    """True if padding before a prompt has no effect on it: the model takes a mask and positions."""
    return not _is_stateful(inner) and {"attention_mask", "position_ids"} <= _parameters(inner)


def _is_stateful(inner: Any) -> bool:
    """True if a model is recurrent: padding before a prompt can change its state."""
    return bool(getattr(inner, "_is_stateful", False))


def _can_select(cache: Any) -> bool:
    """True if a cache consists of keys and values of which rows can be taken."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer)
        for layer in layers
    )


def _has_windows(inner: Any, cache: Any) -> bool:
    """True if some layers see only the last places."""
    keys = (key for key, value in inner.config.to_dict().items() if value)
    return any(layer.is_sliding for layer in cache.layers) or any(
        key.endswith(("window", "window_size")) for key in keys
    )


def _parameters(inner: Any) -> Set[str]:
    return signature(inner.forward).parameters.keys()


def _continued(
    inner: Any, answers: Answers, places: list[int], cache: Any, before: _Before
) -> Tensor:
    """The log-likelihood of answers without their first tokens, after the prompts in a cache."""
    lengths = [answers.lengths[place] for place in places]
    longest = max(lengths)
    tokens = answers.tokens[places, :longest]
    given = {"past_key_values": cache, "use_cache": True, **before.masked(longest - 1)}
    hidden = _forward(inner, tokens[:, :-1], longest - 1, **given)
    found = []
    step = max(1, SCORED // (longest - 1))
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        counted = [length - 1 for length in lengths[part]]
        found.append(summed(hidden.logits[part], tokens[part, 1:], counted))
    return torch.cat(found)


def _logits(inner: Any, tokens: Tensor, keep: int) -> Tensor:
    """The logits of the last positions, without a cache."""
    logits: Tensor = _forward(inner, tokens, keep, use_cache=False).logits
    return logits[:, -keep:]


def _forward(inner: Any, tokens: Tensor, keep: int, **given: Any) -> Any:
    """Run the model; the head is applied to the last positions only, if the model can."""
    if "logits_to_keep" in _parameters(inner):
        given["logits_to_keep"] = keep
    return inner(input_ids=tokens, **given)


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The states of some positions as one matrix.

    Otherwise torch multiplies them row by row: five times as slow in float32, and in bfloat16 it
    copies the head for each row.
    """
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in inputs)
