"""Whole texts as tokens, for perplexity: every token of a text is predicted once.

The rules are those of lm-eval's `loglikelihood_rolling`: the text is tokenized without special
tokens, BOS (or else EOS) stands before its first token, and a text that is longer than the model
reads becomes windows that follow each other, each after the last token of the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example
from restitch.modeling.questions import integers, padded


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

    def by_row(self, losses: Tensor) -> Tensor:
        """The sums over the windows of each row, and the tokens of each row, [rows, 2]."""
        each = torch.stack((losses, self.lengths.to(losses.dtype)), dim=1)
        return each.new_zeros(self.count, 2).index_add(0, self.rows, each)

    def first(self) -> "Windows":
        """The first window of each row."""
        places = torch.searchsorted(self.rows, torch.arange(self.count, device=self.rows.device))
        return Windows(self.tokens[places], self.lengths[places], self.rows[places], self.count)


def text_batch(
    texts: Sequence[Sequence[int]], examples: Sequence[Example], before: int | None, limit: int
) -> dict[str, Tensor]:
    """The tensors of whole texts.

    Args:
        texts: the tokens of each text.
        examples: the rows, for errors.
        before: the token before the first one; None if the tokenizer has none.
        limit: the most tokens that go into the model at once.

    Raises:
        BadInput: a text has no tokens to predict.
    """
    windows: list[Sequence[int]] = []
    rows: list[int] = []
    for row, (tokens, example) in enumerate(zip(texts, examples, strict=True)):
        whole = [*([] if before is None else [before]), *tokens]
        if len(whole) < 2:
            raise BadInput(
                f"{example.where}: the text has no tokens to predict",
                expected="a text of one token or more",
                found=repr(example.inputs[0])[:80],
                hint="leave out the row",
            )
        for start in range(0, len(whole) - 1, limit):
            windows.append(whole[start : start + limit + 1])
            rows.append(row)
    return {
        "window": padded(windows),
        "window_length": integers([len(window) - 1 for window in windows]),
        "window_row": integers(rows),
        "cut": integers([0] * len(texts)),
    }
