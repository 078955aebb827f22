"""Passes that go through a model part by part compute what they compute in the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.modeling import part_by_part
from restitch.modeling.part_by_part import PartByPart

CPU = torch.device("cpu")


class Block(nn.Module):
    """A layer that remembers which other layers had weights when it ran."""

    def __init__(self, seen: list[int], others: list[nn.Linear]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        others.append(self.inner)
        self._seen, self._others = seen, others

    def forward(self, x: Tensor, *, cache: list[Tensor]) -> Tensor:
        own: Tensor = self.inner(sum([*cache, x]))
        self._seen.append(sum(bool(one.weight.isfinite().all()) for one in self._others))
        cache.append(x)
        return x + own.tanh()


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.seen: list[int] = []
        others: list[nn.Linear] = []
        self.first = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block(self.seen, others) for _ in range(blocks))
        self.last = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.first(tokens)
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        for _ in range(1 + int(tokens.sum()) % 3):  # some rows go through the blocks again
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache=cache)
        found: Tensor = self.last(x)
        return found


def stacks(seed: int = 0) -> tuple[Stack, Stack, dict[str, Tensor]]:
    """A model, the same without weights, and the weights."""
    torch.manual_seed(seed)
    whole = Stack().requires_grad_(False)
    with torch.device("meta"):
        empty = Stack()
    return whole, empty, {name: one.clone() for name, one in whole.named_parameters()}


def run(empty: Stack, parts: PartByPart, weights: dict[str, Tensor], *given: Any) -> None:
    parts.run(given[0], dict(empty.named_parameters()), weights.__getitem__, *given[1:])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=6),
    kept=st.sampled_from([0, 300, 10**9]),
)
def test_passes_compute_the_same_bits_with_one_part_in_memory(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], kept: int
) -> None:
    whole, empty, weights = stacks()
    parts = PartByPart(empty, CPU)
    found: dict[int, Tensor] = {}
    passes = [
        lambda i=i, row=row: found.update({i: empty(torch.tensor(row))})
        for i, row in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(part_by_part, "_KEPT", kept)
        patch.setattr(part_by_part, "_SMALL", 0)
        run(empty, parts, weights, passes, tmp_path_factory.mktemp("scratch"))
    assert all(found[i].equal(whole(torch.tensor(row))) for i, row in enumerate(rows))
    assert set(empty.seen) == {1}, "of all blocks only the running one had weights"
    assert all(one.isnan().all() for one in empty.parameters())
    assert not any("forward" in vars(block) for block in empty.blocks)


def test_many_suspended_tensors_lie_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, empty, weights = stacks()
    monkeypatch.setattr(part_by_part, "_KEPT", 3000)
    monkeypatch.setattr(part_by_part, "_SMALL", 0)
    files: list[str | None] = []

    def look(_: nn.Module, given: tuple[Tensor]) -> None:
        files.append(given[0].untyped_storage().filename)

    for block in empty.blocks:
        block.register_forward_pre_hook(look, prepend=True)
    inputs: list[Tensor] = []
    inner: Any = empty.blocks[1].inner
    inner.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    passes = [lambda: empty(torch.zeros(100, dtype=torch.int64))] * 4
    run(empty, PartByPart(empty, CPU), weights, passes, tmp_path)
    assert not any(files), "before a pass stops"
    assert len(inputs) == 4
    assert not list(tmp_path.iterdir()), "the files have no names left"


def test_large_layers_outside_of_the_blocks_are_parts_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, empty, _ = stacks()
    assert PartByPart(empty, CPU).parts == list(empty.blocks)
    block, others = 4 * (16 + 4), 4 * (28 + 10)
    assert PartByPart(stacks()[1], CPU).largest == block + others
    monkeypatch.setattr(part_by_part, "_LARGE", 80)
    parts = PartByPart(empty, CPU)
    assert parts.parts == [empty.first, *empty.blocks]
    assert parts.largest == 4 * 28 + 4 * 10


def test_a_failing_pass_ends_all_others(tmp_path: Path) -> None:
    _, empty, weights = stacks()
    ended = []

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(name)

    def one(name: str, *, fails: bool = False) -> None:
        with watched(name):
            empty(torch.tensor([1, 2]))
            assert not fails

    passes = [lambda: one("a"), lambda: one("b", fails=True), lambda: one("c")]
    with pytest.raises(AssertionError):
        run(empty, PartByPart(empty, CPU), weights, passes, tmp_path)
    assert sorted(ended) == ["a", "b", "c"]
    assert not any("forward" in vars(block) for block in empty.blocks)
    assert all(each.isnan().all() for each in empty.parameters())


def test_progress_ends_at_what_was_done(tmp_path: Path) -> None:
    _, empty, weights = stacks()
    steps: list[tuple[int, int]] = []
    # The first row goes once through the three blocks, the second twice.
    passes = [lambda n=n: empty(torch.tensor([n])) for n in (0, 1)]
    PartByPart(empty, CPU).run(
        passes,
        dict(empty.named_parameters()),
        weights.__getitem__,
        tmp_path,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(2, 6), (4, 6), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_a_model_without_repeated_layers_is_refused() -> None:
    with pytest.raises(BadInput, match="no repeated layers"):
        PartByPart(nn.Sequential(nn.Linear(2, 2)), CPU)
