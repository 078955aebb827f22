"""Whole texts as tokens, for perplexity: every token of a text is predicted once.

The rules are those of lm-eval's `loglikelihood_rolling`: BOS (or else EOS) stands before a text's
first token, and a text that is longer than the model reads becomes windows that follow each other,
each after the last token of the one before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.modeling.answers import SCORED, log_probabilities
from restitch.modeling.data.rows import Example
from restitch.modeling.questions import integers, padded, tokens_of

# Tokens of texts that go through the model at once: each has logits over the vocabulary.
_TOKENS = 512


@dataclass(frozen=True)
class Windows:
    """The windows of a batch of texts.

    Attributes:
        tokens: [windows, longest + 1]: the token before a window, and its tokens.
        lengths: the number of tokens to predict, by window.
        rows: the row of each window.
        count: the number of rows.
    """

    tokens: Tensor
    lengths: Tensor
    rows: Tensor
    count: int

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Windows":
        """The windows that `text_batch` made."""
        return cls(batch["window"], batch["window_length"], batch["window_row"], len(batch["cut"]))

    def losses(self, logits_of: Callable[["Windows"], Tensor]) -> Tensor:
        """The negative log-likelihood of each row, and its tokens, [rows, 2].

        Args:
            logits_of: the logits at the tokens of some windows, [windows, longest, vocabulary].
        """
        losses: list[Tensor] = []
        order: list[int] = []
        for places in self._in_parts():
            part = self._chosen(places)
            each = _log_probabilities(logits_of(part), part.tokens[:, 1:])
            all_places = torch.arange(each.shape[1], device=each.device)
            counted = all_places < part.lengths.unsqueeze(1)
            losses.append(-each.masked_fill(~counted, 0.0).sum(1))
            order += places
        sorted_again = torch.tensor(order, device=self.lengths.device).argsort()
        return self._by_row(torch.cat(losses)[sorted_again])

    def first(self) -> "Windows":
        """The first window of each row."""
        places = torch.searchsorted(self.rows, torch.arange(self.count, device=self.rows.device))
        return self._chosen(places.tolist())

    def _chosen(self, places: Sequence[int]) -> "Windows":
        """Some of the windows, as long as the longest of them."""
        lengths = self.lengths[places]
        tokens = self.tokens[places, : int(lengths.max()) + 1]
        return Windows(tokens, lengths, self.rows[places], self.count)

    def _in_parts(self) -> Iterator[list[int]]:
        """The places of windows that go through the model together, the shortest first."""
        lengths = self.lengths.tolist()
        part: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda one: lengths[one]):
            if part and (len(part) + 1) * lengths[place] > _TOKENS:
                yield part
                part = []
            part.append(place)
        if part:
            yield part

    def _by_row(self, losses: Tensor) -> Tensor:
        """The sums over the windows of each row, and the tokens of each row, [rows, 2]."""
        each = torch.stack((losses, self.lengths.to(losses.dtype)), dim=1)
        return each.new_zeros(self.count, 2).index_add(0, self.rows, each)


def mean_loss(losses: Tensor) -> Tensor:
    """The mean loss of a token, of the losses and tokens of texts, [rows, 2]."""
    totals = losses.sum(0)
    return totals[0] / totals[1]


def text_tokens(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of whole texts, without special tokens.

    Raises:
        BadInput: a row has more than one text.
    """
    for example in examples:
        if len(example.inputs) != 1:
            raise BadInput(
                f"{example.where}: a whole text is one column",
                expected="one column under data: input",
                found=f"{len(example.inputs)} columns",
            )
    return tokens_of(tokenizer, [example.inputs[0] for example in examples])


def text_batch(
    texts: Sequence[Sequence[int]],
    examples: Sequence[Example],
    before: int | None,
    limit: int,
    around: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> dict[str, Tensor]:
    """The tensors of whole texts.

    Args:
        texts: the tokens of each text.
        examples: the rows, for errors.
        before: the token before the first one; None if the tokenizer has none.
        limit: the most tokens that go into the model at once.
        around: tokens at the beginning and the end of each text, which are predicted as well.

    Raises:
        BadInput: a text has no tokens to predict.
    """
    windows: list[Sequence[int]] = []
    rows: list[int] = []
    for row, (tokens, example) in enumerate(zip(texts, examples, strict=True)):
        start = [] if before is None else [before]
        if len(start) + len(tokens) < 2:
            raise BadInput(
                f"{example.where}: the text has no tokens to predict",
                expected="a text of one token or more",
                found=repr(example.inputs[0])[:80],
                hint="leave out the row",
            )
        whole = [*start, *around[0], *tokens, *around[1]]
        for first in range(0, len(whole) - 1, limit):
            windows.append(whole[first : first + limit + 1])
            rows.append(row)
    return {
        "window": padded(windows),
        "window_length": integers([len(window) - 1 for window in windows]),
        "window_row": integers(rows),
        "cut": integers([0] * len(texts)),
    }


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of all tokens, [windows, tokens], of some positions at a time."""
    starts = range(0, tokens.shape[1], SCORED)
    parts = [slice(start, start + SCORED) for start in starts]
    return torch.cat([log_probabilities(logits[:, part], tokens[:, part]) for part in parts], 1)
