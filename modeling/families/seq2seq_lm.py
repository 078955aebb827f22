"""Encoder-decoder language models: the log-likelihoods of a question's answers, given its prompt.

Any model that `AutoModelForSeq2SeqLM` loads works: T5, Flan-T5, mT5, BART, Pegasus, ... The encoder
reads the prompt, once for all choices of a row; the choice is the target of the decoder. The score
of a choice is the sum of the log-probabilities of its tokens, or that sum per token or per
character. The rules are those of lm-eval:

- The prompt is tokenized with the tokenizer's own special tokens, such as T5's `</s>`, as it was in
  training. The answer is tokenized alone and without them: it is the beginning of a target, and
  whether the target ends there is not part of the question.
- The answer is a space and the choice, or the choice alone after a prompt that ends with white
  space. White space at the end of the prompt is tokenized with the answer.
- The decoder starts with `decoder_start_token_id`.
- A prompt that is a turn of a chat goes through the tokenizer's chat template with its beginning of
  an answer, and gets no other special tokens; no space is added after that.
- A prompt that is too long loses its beginning; an answer is never cut.
- Texts are generated greedily, from the decoder's first token on.
- Perplexity: the encoder reads BOS, or else EOS; the decoder predicts every token of the text, with
  the tokenizer's own special tokens. See `whole_texts`.

By default the blocks of encoder and decoder are localizable, with the position biases in T5's first
blocks, which all blocks of a stack share. Embeddings, head and the norms after the last blocks are
the base's.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.modeling.answers import Answers, log_probabilities, matched, summed
from restitch.modeling.configs import differences, known_keys, model_type_difference, read_config
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Preprocess
from restitch.modeling.generation import generated
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind
from restitch.modeling.language_model import LanguageModel
from restitch.modeling.pretrained import NamedModel, missing_outside_of_blocks
from restitch.modeling.pretrained_files import GENERATION, language_model_files, load_tokenizer
from restitch.modeling.questions import (
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

# The blocks in the layouts that these models have. Old files of T5 also hold position biases of the
# attention to the encoder, which no model reads: the ends of names leave them out.
_BLOCKS = (
    "encoder.block.[0-9]*",
    "decoder.block.[0-9]*[!s].weight",
    "decoder.block.[0-9]*.SelfAttention.relative_attention_bias.weight",
    "encoder.layers.[0-9]*",
    "decoder.layers.[0-9]*",
    "encoder.layer.[0-9]*",
)
# Of decoding alone, or of padding, which is masked.
_NO_SCORES = frozenset(
    {
        "early_stopping",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "num_beams",
        "pad_token_id",
    }
)
# Tokens that go through the model at once when no gradients are needed.
_TOKENS = 2048


class Seq2seqLm(LanguageModel):
    """The family `seq2seq-lm`."""

    name = "seq2seq-lm"
    summary = "the likeliest answer of the decoder to a prompt"
    version = 2
    prefixes = ("model.",)
    localizable = tuple(glob for block in _BLOCKS for glob in (block, f"*.{block}"))
    auto_class = "AutoModelForSeq2SeqLM"
    answers_apart = True
    chats = True
    metrics: tuple[MetricName, ...] = ("accuracy", "f1", "exact_match", "perplexity")
    kinds = (Kind.SEQ2SEQ_LM,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass, and the decoder's first token."""
        ours, theirs = read_config(base), read_config(finetuned)
        kind = model_type_difference(ours.model_type, theirs.model_type)
        if kind:
            return kind
        found = differences(
            ours.to_dict(), theirs.to_dict(), ignore=_NO_SCORES, known=known_keys(ours)
        )
        starts = decoder_start(base), decoder_start(finetuned)
        if starts[0] != starts[1]:
            found.append(f"decoder_start_token_id: base {starts[0]}, finetuned {starts[1]}")
        return found

    def lacks(self, folder: Path) -> str | None:
        """A head, or the first token of the decoder."""
        from transformers import AutoModelForSeq2SeqLM

        missing = missing_outside_of_blocks(folder, AutoModelForSeq2SeqLM, self.prefixes)
        if missing is None:
            return "a head that AutoModelForSeq2SeqLM of transformers loads"
        if missing:
            return f"the tensors of a language-model head ({', '.join(missing[:3])})"
        if decoder_start(folder) is None:
            return "a decoder_start_token_id in config.json"
        return None

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and positions, for a prompt and for an answer."""
        return prompt_limit(folder)

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize prompts and choices, or whole texts, padded at the end."""
        tokenizer = load_tokenizer(folder)
        limit = max_length or self.max_length(folder)
        start = decoder_start(folder)
        if start is None:
            raise BadInput(
                f"{folder} does not say with which token its decoder starts",
                expected="decoder_start_token_id in config.json",
                hint="add the value that the model was trained with",
            )

        def preprocess(examples: Sequence[Example]) -> Batch:
            first = torch.full((len(examples),), start, dtype=torch.int64)
            if any(example.choices for example in examples):
                batch = question_batch(_questions(tokenizer, limit, examples), examples)
            else:
                texts, before = text_tokens(tokenizer, examples), first_of_nothing(tokenizer)
                batch = text_batch(texts, examples, before, limit, special_tokens(tokenizer))
            return {**batch, "decoder_start": first}

        return preprocess

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The log-likelihoods of the choices, [batch, choices]; -inf where a row has no choice."""
        inner, answers = NamedModel.of(model).inner, Answers.of(batch)
        likelihoods = _whole if torch.is_grad_enabled() else _shared
        found = likelihoods(inner, answers, batch["decoder_start"])
        return answers.scores(found, batch, head.spec.score)

    def predictions(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The scores of choices; or of the next tokens, at some positions of answers and texts."""
        inner, start = NamedModel.of(model).inner, batch["decoder_start"]
        if head.spec.of_text:
            windows = Windows.of(batch).first()
            lengths, logits = windows.lengths.tolist(), _text_logits(inner, windows, start)
        elif head.spec.answer is not None:
            answers = Answers.of(batch)
            lengths, logits = answers.lengths, _answer_logits(inner, answers, start)
        else:
            return self.logits(model, batch, head)
        return matched([one[:length] for one, length in zip(logits, lengths, strict=True)])

    def text_losses(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The negative log-likelihood of each text, and its tokens, [batch, 2]."""
        inner, start = NamedModel.of(model).inner, batch["decoder_start"]
        return Windows.of(batch).losses(lambda windows: _text_logits(inner, windows, start))

    def generate(self, model: nn.Module, batch: Batch, head: Head) -> list[str]:
        """The text that the decoder writes for each prompt."""
        assert head.spec.generate is not None
        tokens = batch["prompt"]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inputs = {
            "input_ids": tokens,
            "attention_mask": (places < batch["prompt_length"].unsqueeze(1)).long(),
            "decoder_input_ids": batch["decoder_start"].unsqueeze(1),
        }
        return generated(NamedModel.of(model), inputs, 1, head.spec.generate)

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean negative log-likelihood of the right answers, or of all tokens of texts."""
        if head.spec.of_text:
            return mean_loss(self.text_losses(model, batch, head))
        right = Answers.of(batch).right(batch["labels"])
        return -_whole(NamedModel.of(model).inner, right, batch["decoder_start"]).mean()

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        """Also the settings for generation."""
        return language_model_files(folder)


def decoder_start(folder: Path) -> int | None:
    """The token that the decoder starts with, as transformers generates: or else its BOS."""
    config = read_config(folder)
    try:
        generation = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        generation = {}
    for key in ("decoder_start_token_id", "bos_token_id"):
        for value in (getattr(config, key, None), generation.get(key)):
            if isinstance(value, int):
                return value
    return None


def _questions(tokenizer: Any, limit: int, examples: Sequence[Example]) -> list[Question]:
    """The tokens of rows: all texts go through the tokenizer at once."""
    texts = [QuestionText.of(example, tokenizer) for example in examples]
    # A chat template says itself what stands around a turn. All rows of a task are chats, or none.
    special = not any(example.chat for example in examples)
    prompts = tokens_of(tokenizer, [text.prompt for text in texts], special=special)
    encoded = iter(
        tokens_of(tokenizer, [one for text in texts for one in text.choices if one is not None])
    )
    questions = []
    for example, tokens in zip(examples, prompts, strict=True):
        answers = [[] if choice is None else next(encoded) for choice in example.choices]
        check_answers(example, answers, limit)
        prompt = not_empty(tokens, tokenizer, example)
        kept = prompt[-limit:]
        questions.append(Question(kept, answers, len(prompt) - len(kept)))
    return questions


def _whole(inner: Any, answers: Answers, start: Tensor) -> Tensor:
    """The log-likelihood of each answer, each with a pass of the decoder of its own."""
    if not answers.rows:
        return torch.zeros(0, device=answers.tokens.device)
    tokens = answers.tokens[:, : max(answers.lengths)]
    return summed(_answer_logits(inner, answers, start), tokens, answers.lengths)


def _answer_logits(inner: Any, answers: Answers, start: Tensor) -> Tensor:
    """The logits at the tokens of each answer, [answers, longest, vocabulary]."""
    hidden, mask = _encoded(inner, answers, range(len(answers.prompts)))
    longest = max(answers.lengths)
    tokens = answers.tokens[:, :longest]
    given = torch.cat([start[answers.rows, None], tokens[:, :-1]], dim=1)
    output = _decoded(inner, hidden[answers.rows], mask[answers.rows], given, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _text_logits(inner: Any, windows: Windows, start: Tensor) -> Tensor:
    """The logits at the tokens of windows; the encoder reads the token before each window."""
    given = torch.cat([start[windows.rows, None], windows.tokens[:, 1:-1]], dim=1)
    before = windows.tokens[:, :1]
    hidden = inner.get_encoder()(input_ids=before).last_hidden_state
    output = _decoded(inner, hidden, torch.ones_like(before), given, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _shared(inner: Any, answers: Answers, start: Tensor) -> Tensor:
    """The log-likelihood of each answer; a prompt goes through the encoder once.

    The first token of an answer follows from the decoder's start alone; the others need the keys
    and values of the start and of the prompt.
    """
    of_row = answers.of_rows
    found = torch.zeros(len(answers.rows), device=answers.tokens.device)
    for rows in answers.together(_TOKENS, padded=True):
        hidden, mask = _encoded(inner, answers, rows)
        output = _decoded(inner, hidden, mask, start[rows, None], use_cache=True)
        places = [place for row in rows for place in of_row[row]]
        owners = [at for at, row in enumerate(rows) for _ in of_row[row]]
        found[places] = log_probabilities(output.logits[owners, -1], answers.tokens[places, 0])
        longer = [at for at, place in enumerate(places) if answers.lengths[place] > 1]
        if not longer:
            continue
        places, owners = [places[at] for at in longer], [owners[at] for at in longer]
        lengths = [answers.lengths[place] for place in places]
        tokens = answers.tokens[places, : max(lengths)]
        cache: Any = getattr(output, "past_key_values", None)
        if hasattr(cache, "batch_select_indices"):
            cache.batch_select_indices(torch.tensor(owners, device=tokens.device))
            given = {"past_key_values": cache, "use_cache": True}
            output = _decoded(inner, hidden[owners], mask[owners], tokens[:, :-1], **given)
            found[places] += summed(output.logits, tokens[:, 1:], [one - 1 for one in lengths])
        else:
            for place in places:
                one = answers.alone(place)
                found[place] = _whole(inner, one, start[answers.rows[place], None])[0]
    return found


def _encoded(inner: Any, answers: Answers, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The hidden states of the prompts of rows, and the mask of their tokens."""
    lengths = [answers.prompt_lengths[row] for row in rows]
    tokens = answers.prompts[list(rows), : max(lengths)]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    mask = (places < torch.tensor(lengths, device=tokens.device).unsqueeze(1)).long()
    output = inner.get_encoder()(input_ids=tokens, attention_mask=mask)
    return output.last_hidden_state, mask


def _decoded(inner: Any, hidden: Tensor, mask: Tensor, tokens: Tensor, **given: Any) -> Any:
    """Run the decoder and the head on tokens of the decoder."""
    from transformers.modeling_outputs import BaseModelOutput

    return inner(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask,
        decoder_input_ids=tokens,
        **given,
    )
