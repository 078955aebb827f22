"""Log-likelihoods of the answers of a batch, for families that read prompts.

`Answers.of` lists the answers of a batch that `questions.question_batch` made; a family gives the
log-likelihood of each, and `Answers.scores` compares them as the task says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restitch.registry.specs.head import Score

# Positions of which all of the vocabulary is scored at once.
SCORED = 128
# Tokens of padding for which one more pass is made on a CPU: it costs about as much time.
_PADDING = 32
# Positions of an answer or a text whose predictions localizers match.
_POSITIONS = 8


@dataclass(frozen=True)
class Answers:
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
    def of(cls, batch: Mapping[str, Tensor]) -> "Answers":
        """The answers that a preprocessor tokenized."""
        lengths = batch["answer_length"].reshape(len(batch["prompt"]), -1)
        return cls._chosen(batch["prompt"], batch["prompt_length"], batch["answers"], lengths)

    @classmethod
    def _chosen(
        cls, prompts: Tensor, prompt_lengths: Tensor, answers: Tensor, lengths: Tensor
    ) -> "Answers":
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

    def right(self, labels: Tensor) -> "Answers":
        """The right answer of each row alone."""
        places = torch.arange(len(labels), device=labels.device) * self.shape[1] + labels
        index = torch.searchsorted(self.places, places)
        kept = index.tolist()
        return Answers(
            self.prompts,
            self.prompt_lengths,
            self.tokens[index],
            [self.lengths[one] for one in kept],
            list(range(len(kept))),
            torch.arange(len(kept), device=labels.device),
            (len(kept), 1),
        )

    @property
    def of_rows(self) -> list[list[int]]:
        """The places of each row's answers."""
        places: list[list[int]] = [[] for _ in self.prompt_lengths]
        for place, row in enumerate(self.rows):
            places[row].append(place)
        return places

    def common_beginning(self) -> int:
        """The number of tokens with which all prompts begin, without the last of the shortest."""
        same = (self.prompts == self.prompts[:1]).all(0).long().cumprod(0).sum()
        return min(int(same), min(self.prompt_lengths) - 1)

    def together(self, most: int, *, padded: bool) -> Iterator[list[int]]:
        """The rows with answers, in parts that go through a model together, short prompts first.

        Args:
            most: tokens that go through the model at once, if no row alone has more.
            padded: prompts of different lengths may go together.
        """
        lengths, of_rows = self.prompt_lengths, self.of_rows
        padding = 0 if not padded else _PADDING if self.tokens.device.type == "cpu" else most
        rows = sorted((row for row, own in enumerate(of_rows) if own), key=lambda r: lengths[r])
        part: list[int] = []
        copies = 0  # answers of the part that need a copy of the prompt's keys and values
        after = 1  # tokens of the longest of them
        for row in rows:
            longer = [self.lengths[p] for p in of_rows[row] if self.lengths[p] > 1]
            more, longest = copies + len(longer), max(after, *longer, 1)
            cost = max((len(part) + 1) * lengths[row], more * (lengths[row] + longest))
            unused = len(part) * lengths[row] - sum(lengths[one] for one in part)
            if part and (cost > most or unused > padding):
                yield part
                part, more, longest = [], len(longer), max(1, *longer, 1)
            part.append(row)
            copies, after = more, longest
        if part:
            yield part

    def placed(self, likelihoods: Tensor) -> Tensor:
        """Likelihoods of the answers as a table, -inf elsewhere."""
        table = likelihoods.new_full((self.shape[0] * self.shape[1],), -torch.inf)
        return table.index_put((self.places,), likelihoods).view(self.shape)

    def alone(self, place: int) -> "Answers":
        """One answer alone."""
        row = self.rows[place]
        return Answers(
            self.prompts[row : row + 1],
            [self.prompt_lengths[row]],
            self.tokens[place : place + 1],
            [self.lengths[place]],
            [0],
            torch.zeros(1, dtype=torch.int64, device=self.tokens.device),
            (1, 1),
        )

    def scores(
        self, likelihoods: Tensor, batch: Mapping[str, Tensor], score: Score | None
    ) -> Tensor:
        """The scores of the choices, [rows, choices]; -inf where a row has no choice.

        Args:
            likelihoods: of the answers.
            batch: that they belong to.
            score: how answers are compared.
        """
        table = self.placed(likelihoods)
        if score == "per_token":
            return table / batch["answer_length"].clamp(min=1)
        if score == "per_character":
            return table / batch["characters"].clamp(min=1)
        return table


def matched(logits: Sequence[Tensor]) -> Tensor:
    """The predictions that localizers match, [rows, positions, vocabulary], in float32.

    Args:
        logits: of each row, [tokens, vocabulary]; evenly spaced ones are taken, and repeated where
            there are fewer.
    """
    steps = torch.arange(_POSITIONS)
    each = [one[(steps * len(one) // _POSITIONS).to(one.device)] for one in logits]
    return torch.stack(each).float()


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of tokens, in float32 even under autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float().log_softmax(-1)
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def summed(logits: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The log-likelihoods of the first `lengths` tokens of each row."""
    each = log_probabilities(logits, tokens)
    counts = torch.tensor(lengths, device=each.device).unsqueeze(1)
    counted = torch.arange(each.shape[1], device=each.device) < counts
    return each.masked_fill(~counted, 0.0).sum(1)
