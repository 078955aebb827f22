"""Which rows of a batch go through a model together."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from restitch.modeling.answers import Answers


def answers_after(lengths: list[int]) -> Answers:
    """One answer of one token after prompts of some lengths."""
    count = len(lengths)
    return Answers.of(
        {
            "prompt": torch.zeros(count, max(lengths), dtype=torch.int64),
            "prompt_length": torch.tensor(lengths),
            "answers": torch.zeros(count, 1, 1, dtype=torch.int64),
            "answer_length": torch.ones(count, 1, dtype=torch.int64),
        }
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.booleans())
def test_every_row_is_in_one_part_with_rows_of_like_length(
    lengths: list[int], padded: bool
) -> None:
    parts = list(answers_after(lengths).together(2048, padded=padded))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        own = [lengths[row] for row in part]
        assert len(part) == 1 or len(part) * max(own) <= 2048
        if not padded:
            assert len(set(own)) == 1
        assert own == sorted(own)


def test_a_part_ends_where_padding_costs_more_than_another_pass() -> None:
    def sizes(lengths: list[int]) -> list[int]:
        return [len(part) for part in answers_after(lengths).together(2048, padded=True)]

    assert sizes([10] * 16 + [12] * 3 + [40] * 2) == [19, 2], "32 tokens of padding"
    assert sizes([10] * 17 + [12] * 3) == [17, 3], "34 tokens of padding"
