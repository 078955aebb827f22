"""A model whose blocks lie on several devices; a CPU stands for each of them here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from restitch.modeling.gradients import checkpointed
from restitch.modeling.spread import Room, plan, spread

CPU = torch.device("cpu")
BLOCK, OTHERS = 4 * (16 + 4), 4 * (28 + 10)


class Plain(nn.Module):
    """Three blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.first(tokens)
        for block in self.blocks:
            x = x + block(x).tanh()
        found: torch.Tensor = self.last(x)
        return found


def models() -> tuple[Plain, Plain, dict[str, torch.Tensor]]:
    """A model, the same without weights, and the weights."""
    torch.manual_seed(0)
    whole = Plain()
    with torch.device("meta"):
        empty = Plain()
    return whole, empty, {name: one.detach().clone() for name, one in whole.named_parameters()}


def rooms(*sizes: int) -> list[Room]:
    return [Room(CPU, size) for size in sizes]


@given(
    sizes=st.lists(st.integers(0, 600), min_size=1, max_size=4),
    share=st.sampled_from([1.0, 1.5, 3.0]),
)
def test_blocks_fill_the_rooms_in_order_and_none_is_overfull(
    sizes: list[int], share: float
) -> None:
    model = models()[1]
    places = plan(model, rooms(*sizes), share)
    sizes[0] -= OTHERS
    block = int(share * BLOCK)
    fits = [max(0, size) // block for size in sizes]
    if places is None:
        assert sizes[0] < 0 or sum(fits) < 3
        return
    assert places == sorted(places)
    assert len(places) == 3
    assert all(places.count(place) <= fits[place] for place in places)


def test_a_model_without_blocks_is_not_spread() -> None:
    assert plan(nn.Sequential(nn.Linear(2, 2)), rooms(10**6, 10**6), 1.0) is None


@pytest.mark.parametrize("fewer", [False, True])
def test_scores_and_gradients_are_those_of_the_whole_model(fewer: bool) -> None:
    whole, empty, weights = models()
    two = rooms(OTHERS + BLOCK, 2 * BLOCK)
    places = plan(empty, two, 1.0)
    assert places == [0, 1, 1]
    spread(empty, dict(empty.named_parameters()), weights.__getitem__, two, places)
    moved = ["_hf_hook" in vars(block) for block in empty.blocks]
    assert moved == [False, True, True], "only blocks that are elsewhere bring their inputs there"
    tokens = torch.tensor([1, 5, 2])
    for model in (whole, empty):
        model.requires_grad_(True)
    torch.autograd.backward(whole(tokens).sum())
    if fewer:
        with checkpointed(empty):
            torch.autograd.backward(empty(tokens).sum())
        assert ["forward" in vars(block) for block in empty.blocks] == moved, "as before"
    else:
        torch.autograd.backward(empty(tokens).sum())
    live = dict(empty.named_parameters())
    for name, one in whole.named_parameters():
        found = live[name].grad
        assert one.grad is not None
        assert found is not None
        assert live[name].equal(one)
        assert one.grad.equal(found), name
