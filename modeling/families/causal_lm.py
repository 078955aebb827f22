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
- A prompt that is too long loses its beginning, for all its choices alike; an answer is never cut.

By default only the decoder blocks are localizable. Embeddings and head are the base's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress
from restitch.modeling.configs import differences, known_keys, model_type_difference, read_config
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import Head
from restitch.modeling.kinds import Kind, model_kind
from restitch.modeling.pretrained import (
    NamedModel,
    asset_files,
    load_pretrained,
    load_tokenizer,
)
from restitch.registry.specs.task import HeadSpec, Modality

_GENERATION = "generation_config.json"
# Where nothing else limits them, as in lm-eval.
_POSITIONS = 2048
_POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
)
# The blocks in the layouts that decoders have. Old files also hold buffers such as `attn.bias`, the
# causal mask, and `rotary_emb.inv_freq`, which are no weights: the ends of names leave them out.
_BLOCKS = ("layers.[0-9]*", "h.[0-9]*", "blocks.[0-9]*")
_ENDS = (".weight", "[!n].bias", "c_attn.bias", "ln_attn.bias", "fc_in.bias", ".experts.*_proj")
# Tokens that go through the model at once when no gradients are needed, and positions of which all
# of the vocabulary is scored at once.
_TOKENS = 2048
_SCORED = 128
# The embedding at this index is read and has no effect: it stands after all tokens that count.
_PADDING = 0


class CausalLm(Family):
    """The family `causal-lm`."""

    name = "causal-lm"
    version = 1
    prefixes = ("model.", "transformer.", "gpt_neox.")
    localizable = tuple(
        f"{start}{block}{end}" for start in ("", "*.") for block in _BLOCKS for end in _ENDS
    )
    modality: Modality = "text"
    reads_prompts = True
    kinds = (Kind.CAUSAL_LM,)

    def config_differences(self, base: Path, finetuned: Path) -> list[str]:
        """The configuration keys that change the forward pass."""
        ours, theirs = read_config(base), read_config(finetuned)
        return model_type_difference(ours.model_type, theirs.model_type) or differences(
            ours.to_dict(),
            theirs.to_dict(),
            ignore=frozenset({"pad_token_id"}),  # padding stands after all that counts
            known=known_keys(ours),
        )

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Load the language model in a folder."""
        from transformers import AutoModelForCausalLM

        model = model_kind(folder)
        if model.kind is not Kind.CAUSAL_LM:
            raise BadInput(
                f"{folder} is not a causal language model",
                expected="a decoder that AutoModelForCausalLM loads",
                found=model,
            )
        return load_pretrained(
            folder,
            AutoModelForCausalLM,
            prefixes=self.prefixes,
            required=self.localizable,
            dtype=dtype,
        )

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors by their names in the folder's file."""
        return NamedModel.of(model).tensors()

    def max_length(self, folder: Path) -> int:
        """The smaller limit of tokenizer and positions."""
        return min(int(load_tokenizer(folder).model_max_length), _positions(folder))

    def preprocessor(self, folder: Path, max_length: int | None = None) -> Preprocess:
        """Tokenize prompts and choices, padded at the end."""
        encoder = _Encoder.of(folder, max_length or self.max_length(folder))

        def preprocess(examples: Sequence[Example]) -> Batch:
            questions = encoder.questions(examples)
            most = max((len(one.answers) for one in questions), default=0)
            answers = _padded([answer for one in questions for answer in one.answers])
            batch: Batch = {
                "prompt": _padded([one.prompt for one in questions]),
                "prompt_length": _integers([len(one.prompt) for one in questions]),
                "answers": answers.view(len(questions), most, answers.shape[1]),
                "answer_length": _integers([[len(a) for a in one.answers] for one in questions]),
                "characters": _integers([[len(c or "") for c in e.choices] for e in examples]),
                "cut": _integers([one.cut for one in questions]),
            }
            if all(example.label is not None for example in examples):
                batch["labels"] = torch.tensor([example.label for example in examples])
            return batch

        return preprocess

    def resolve(self, folder: Path, spec: HeadSpec) -> HeadSpec:
        """Fill in the length and how answers are compared."""
        return spec.model_copy(
            update={
                "max_length": spec.max_length or self.max_length(folder),
                "score": spec.score or "sum",
            }
        )

    def build_head(
        self,
        model: nn.Module,
        folder: Path,
        spec: HeadSpec,
        *,
        finetuned: Path | None = None,
        progress: Progress | None = None,
    ) -> Head:
        """The description alone: the head is the model's own."""
        return Head({}, self.resolve(folder, spec))

    def logits(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The log-likelihoods of the choices, [batch, choices]; -inf where a row has no choice."""
        inner, answers = NamedModel.of(model).inner, _Answers.of(batch)
        # A cache grows with each pass, also with the second one of checkpointed gradients.
        likelihoods = _whole if torch.is_grad_enabled() else _shared
        scores = answers.placed(likelihoods(inner, answers))
        if head.spec.score == "per_token":
            return scores / batch["answer_length"].clamp(min=1)
        if head.spec.score == "per_character":
            return scores / batch["characters"].clamp(min=1)
        return scores

    def loss(self, model: nn.Module, batch: Batch, head: Head) -> Tensor:
        """The mean negative log-likelihood of the right answers."""
        right = _Answers.of(batch).right(batch["labels"])
        return -_whole(NamedModel.of(model).inner, right).mean()

    def asset_files(self, folder: Path) -> tuple[str, ...]:
        """Also the settings for generation."""
        more = [_GENERATION] if (folder / _GENERATION).is_file() else []
        return tuple(sorted([*asset_files(folder), *more]))


@dataclass(frozen=True)
class _Question:
    """The tokens of a row.

    Attributes:
        prompt: its tokens, at least one.
        answers: the tokens of each choice; none for a choice that the row lacks.
        cut: the number of tokens that the prompt lost.
    """

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    cut: int


@dataclass(frozen=True)
class _Encoder:
    """Tokenizes questions.

    Attributes:
        limit: the most tokens that go into the model. The last one of an answer does not.
        first: the tokens that the tokenizer puts before every text by itself.
        alone: the token before an answer without a prompt; None if the tokenizer has none.
    """

    tokenizer: Any
    limit: int
    first: list[int]
    alone: int | None

    @classmethod
    def of(cls, folder: Path, limit: int) -> "_Encoder":
        """The encoder with the tokenizer of a folder."""
        tokenizer = load_tokenizer(folder)
        bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
        starts = range(len(whole) - len(bare) + 1)
        at = next((s for s in starts if whole[s : s + len(bare)] == bare), 0)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(tokenizer, limit, whole[:at], eos if bos is None else bos)

    def questions(self, examples: Sequence[Example]) -> list[_Question]:
        """The tokens of rows: all texts go through the tokenizer at once."""
        texts: list[str] = []
        for example in examples:
            if len(example.inputs) != 1:
                raise BadInput(
                    f"{example.where}: a language model reads one prompt per row",
                    found=f"{len(example.inputs)} input columns",
                )
            prompt = example.inputs[0]
            context = prompt.rstrip()
            # The space between prompt and answer is tokenized with the answer.
            space = prompt[len(context) :] or " "
            texts.append(context)
            texts += [context + space + choice for choice in example.choices if choice is not None]
        encoded = iter(
            self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
            if texts
            else ()
        )
        return [self._question(example, encoded) for example in examples]

    def _question(self, example: Example, encoded: Iterator[list[int]]) -> _Question:
        context = next(encoded)
        answers = [
            [] if choice is None else next(encoded)[len(context) :] for choice in example.choices
        ]
        for index, (choice, answer) in enumerate(zip(example.choices, answers, strict=True)):
            if choice is not None:
                self._check(example, choice, answer, answers[:index])
        longest = max(map(len, answers), default=0)
        prompt = [*self.first, *context]
        if self.first and context[: len(self.first)] == self.first:
            prompt = context  # the text has it itself
        if not prompt:
            if self.alone is None:
                raise BadInput(
                    f"{example.where}: the prompt has no tokens, and the tokenizer has no BOS",
                    expected="at least one token before the answer",
                    found=repr(example.inputs[0]),
                    hint="write a prompt with more than a column",
                )
            prompt = [self.alone]
        kept = prompt[-(self.limit + 1 - max(longest, 1)) :]
        return _Question(kept, answers, len(prompt) - len(kept))

    def _check(
        self, example: Example, choice: str, answer: list[int], before: list[list[int]]
    ) -> None:
        """Refuse an answer that cannot be scored."""
        if not answer or answer in before:
            problem = "has no tokens" if not answer else "has the tokens of another choice"
            raise BadInput(
                f"{example.where}: the choice {choice!r} {problem}",
                expected="choices with different tokens of the base's tokenizer",
                found=f"tokens {answer}",
                hint="write the choice with other characters, or leave out the row",
            )
        if len(answer) > self.limit:
            raise BadInput(
                f"{example.where}: the choice {choice[:40]!r} is longer than the model reads",
                expected=f"at most {self.limit} tokens; an answer is never cut",
                found=f"{len(answer)} tokens",
                hint="raise max_length if the model reads more, or leave out the row",
            )


def _integers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as a tensor, padded at the end."""
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[_PADDING] * (longest - len(row))] for row in rows]
    return _integers(padded).view(len(rows), longest)


@dataclass(frozen=True)
class _Answers:
    """All answers of a batch, one after the other; a row's answers share its prompt.

    Attributes:
        prompts: [rows, longest prompt].
        prompt_lengths: of each row.
        tokens: [answers, longest answer].
        lengths: of each answer.
        rows: the row of each answer.
        places: the places of the answers in a table of `shape`, [rows, choices].
    """

    prompts: Tensor
    prompt_lengths: list[int]
    tokens: Tensor
    lengths: list[int]
    rows: list[int]
    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: Batch) -> "_Answers":
        """The answers that a preprocessor tokenized."""
        lengths = batch["answer_length"].reshape(len(batch["prompt"]), -1)
        return cls._chosen(batch["prompt"], batch["prompt_length"], batch["answers"], lengths)

    @classmethod
    def _chosen(
        cls, prompts: Tensor, prompt_lengths: Tensor, answers: Tensor, lengths: Tensor
    ) -> "_Answers":
        rows, columns = lengths.nonzero(as_tuple=True)
        return cls(
            prompts,
            prompt_lengths.tolist(),
            answers[rows, columns],
            lengths[rows, columns].tolist(),
            rows.tolist(),
            rows * lengths.shape[1] + columns,
            (lengths.shape[0], lengths.shape[1]),
        )

    def right(self, labels: Tensor) -> "_Answers":
        """The right answer of each row alone."""
        places = torch.arange(len(labels), device=labels.device) * self.shape[1] + labels
        index = torch.searchsorted(self.places, places)
        kept = index.tolist()
        return _Answers(
            self.prompts,
            self.prompt_lengths,
            self.tokens[index],
            [self.lengths[one] for one in kept],
            list(range(len(kept))),
            torch.arange(len(kept), device=labels.device),
            (len(kept), 1),
        )

    def placed(self, likelihoods: Tensor) -> Tensor:
        """Likelihoods of the answers as a table, -inf elsewhere."""
        table = likelihoods.new_full((self.shape[0] * self.shape[1],), -torch.inf)
        return table.index_put((self.places,), likelihoods).view(self.shape)


def _whole(inner: Any, answers: _Answers) -> Tensor:
    """The log-likelihood of each answer, each after a prompt of its own."""
    starts = [answers.prompt_lengths[row] for row in answers.rows]
    lengths = [start + n - 1 for start, n in zip(starts, answers.lengths, strict=True)]
    longest = max(lengths, default=0)
    tokens = answers.tokens.new_full((len(starts), longest), _PADDING)
    for place, (row, start, length) in enumerate(zip(answers.rows, starts, lengths, strict=True)):
        tokens[place, :start] = answers.prompts[row, :start]
        tokens[place, start:length] = answers.tokens[place, : length - start]
    if not starts:
        return torch.zeros(0, device=tokens.device)
    first = min(starts) - 1
    logits = _logits(inner, tokens, longest - first)
    found = []
    for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        of_answer = logits[place, start - 1 - first : length - first]
        found.append(_log_probabilities(of_answer, answers.tokens[place, : len(of_answer)]).sum())
    return torch.stack(found)


def _shared(inner: Any, answers: _Answers) -> Tensor:
    """The log-likelihood of each answer; a prompt goes through the model once.

    Prompts of the same number of tokens go together, so that nothing stands between a prompt and
    its answers. The first token of an answer follows from the prompt; the others need the prompt's
    keys and values.
    """
    of_row: list[list[int]] = [[] for _ in answers.prompt_lengths]
    for place, row in enumerate(answers.rows):
        of_row[row].append(place)
    found = torch.zeros(len(answers.rows), device=answers.tokens.device)
    for rows in _together(answers, of_row):
        length = answers.prompt_lengths[rows[0]]
        output = _forward(inner, answers.prompts[rows, :length], 1, use_cache=True)
        places = [place for row in rows for place in of_row[row]]
        owners = [at for at, row in enumerate(rows) for _ in of_row[row]]
        ends = output.logits[:, -1].float().log_softmax(-1)
        found[places] = ends[owners, answers.tokens[places, 0]]
        longer = [at for at, place in enumerate(places) if answers.lengths[place] > 1]
        if not longer:
            continue
        places, owners = [places[at] for at in longer], [owners[at] for at in longer]
        cache: Any = getattr(output, "past_key_values", None)
        if _can_select(cache):
            cache.batch_select_indices(torch.tensor(owners, device=answers.tokens.device))
            found[places] += _continued(inner, answers, places, cache)
        else:
            for place in places:
                found[place] = _whole(inner, _one(answers, place))[0]
    return found


def _together(answers: _Answers, of_row: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The rows with answers, in parts that go through the model together."""
    lengths = answers.prompt_lengths
    rows = sorted((row for row, places in enumerate(of_row) if places), key=lambda r: lengths[r])
    for length, same in groupby(rows, key=lambda row: lengths[row]):
        part: list[int] = []
        size = 0
        for row in same:
            longer = [answers.lengths[p] for p in of_row[row] if answers.lengths[p] > 1]
            cost = max(length, len(longer) * (length + max(longer, default=0)))
            if part and size + cost > _TOKENS:
                yield part
                part, size = [], 0
            part.append(row)
            size += cost
        yield part


def _can_select(cache: Any) -> bool:
    """True if a cache consists of keys and values of which rows can be taken."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _continued(inner: Any, answers: _Answers, places: list[int], cache: Any) -> Tensor:
    """The log-likelihood of answers without their first tokens, after the prompts in a cache."""
    lengths = [answers.lengths[place] for place in places]
    longest = max(lengths)
    tokens = answers.tokens[places, :longest]
    hidden = _forward(inner, tokens[:, :-1], longest - 1, past_key_values=cache, use_cache=True)
    found = []
    step = max(1, _SCORED // (longest - 1))
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        each = _log_probabilities(hidden.logits[part], tokens[part, 1:])
        counts = torch.tensor(lengths[part], device=each.device).unsqueeze(1)
        counted = torch.arange(longest - 1, device=each.device) < counts - 1
        found.append(each.masked_fill(~counted, 0.0).sum(1))
    return torch.cat(found)


def _one(answers: _Answers, place: int) -> _Answers:
    """One answer alone."""
    row = answers.rows[place]
    return _Answers(
        answers.prompts[row : row + 1],
        [answers.prompt_lengths[row]],
        answers.tokens[place : place + 1],
        [answers.lengths[place]],
        [0],
        torch.zeros(1, dtype=torch.int64, device=answers.tokens.device),
        (1, 1),
    )


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of tokens, in float32 even under autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float().log_softmax(-1)
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _logits(inner: Any, tokens: Tensor, keep: int) -> Tensor:
    """The logits of the last positions, without a cache."""
    logits: Tensor = _forward(inner, tokens, keep, use_cache=False).logits
    return logits[:, -keep:]


def _forward(inner: Any, tokens: Tensor, keep: int, **given: Any) -> Any:
    """Run the model; the head is applied to the last positions only, if the model can."""
    if "logits_to_keep" in signature(inner.forward).parameters:
        given["logits_to_keep"] = keep
    return inner(input_ids=tokens, **given)


def _positions(folder: Path) -> int:
    """The most tokens that the positions allow."""
    config = read_config(folder).get_text_config()
    known = (getattr(config, key, None) for key in _POSITION_KEYS)
    return next((int(value) for value in known if value), _POSITIONS)
