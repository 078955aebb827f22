"""The k-th largest score without a list: the very coordinates that `top_k` writes down."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import restitch.merging.ranking.top_k as ranking
from restitch.merging.ranking.quantile import Cut, kth_largest
from restitch.merging.ranking.top_k import Scores, TensorScores, top_k


def kept(cut: Cut, scores: Scores, size: int = 7) -> dict[str, list[int]]:
    """All coordinates that a cut keeps, asked for in ranges of an odd size."""
    found: dict[str, list[int]] = {}
    for name in scores.names:
        flat = torch.cat([chunk.clone() for chunk in scores.chunks(name)]).numpy()
        for start in range(0, len(flat), size):
            places = np.flatnonzero(cut.keeps(name, start, flat[start : start + size])) + start
            found.setdefault(name, []).extend(places.tolist())
    return {name: places for name, places in found.items() if places}


def expected(scores: Scores, k: int) -> dict[str, list[int]]:
    positive = sum(int((c > 0).sum()) for n in scores.names for c in scores.chunks(n))
    mask = top_k(scores, min(k, positive))
    return {name: mask.coordinates(name).tolist() for name in mask.names}


class Floored:
    """Scores with the floor 0, whatever the smallest is."""

    floor = 0.0

    def __init__(self, tensors: dict[str, Tensor], size: int = 5) -> None:
        inner = TensorScores(tensors)
        self.names, self.score_dtype = inner.names, inner.score_dtype
        self.numel, self.sample = inner.numel, inner.sample
        self._inner, self._size = inner, size

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        for chunk in self._inner.chunks(name, start):
            yield from torch.split(chunk, self._size)


few = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=40)
many = st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40)


@settings(max_examples=150)
@given(tensors=st.lists(st.one_of(few, many), min_size=1, max_size=4), data=st.data())
def test_it_keeps_what_top_k_keeps(tensors: list[list[float]], data: st.DataObject) -> None:
    scores = Floored({f"t{i}": torch.tensor(values) for i, values in enumerate(tensors)})
    k = data.draw(st.integers(0, sum(map(len, tensors))))
    assert kept(kth_largest(scores, k), scores) == expected(scores, k)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "coarse", "mostly zero", "equal"])
def test_large_tensors_are_cut_with_a_partial_sample(
    monkeypatch: pytest.MonkeyPatch, kind: str, wide: torch.dtype
) -> None:
    for module in (ranking, __import__("restitch.merging.ranking.quantile", fromlist=["SAMPLE"])):
        monkeypatch.setattr(module, "SAMPLE", 2000)
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(60_000, generator=generator, dtype=wide).abs()
    if kind == "coarse":  # as the differences of bfloat16 weights are
        flat = (flat * 8).round() / 8
    if kind == "mostly zero":
        flat[torch.rand(60_000, generator=generator) < 0.95] = 0
    if kind == "equal":
        flat[:] = 0.25
    scores = Floored({"a": flat[:20_000], "b": flat[20_000:]}, size=501)
    for share in (0.0001, 0.02, 0.2, 0.9, 1.0):
        k = int(share * 60_000)
        assert kept(kth_largest(scores, k), scores, size=1007) == expected(scores, k)


@pytest.mark.parametrize("misled", ["all large", "all small"])
def test_a_misleading_sample_only_costs_a_pass(misled: str) -> None:
    scores = Floored({"a": torch.arange(1.0, 1001.0)})
    wrong = torch.full((500,), 990.0 if misled == "all large" else 3.0)
    scores.sample = lambda *_: wrong + torch.arange(500) / 1000
    assert kept(kth_largest(scores, 100), scores) == expected(scores, 100)


def test_nothing_and_everything() -> None:
    scores = Floored({"a": torch.tensor([0.0, 1.0, 2.0])})
    assert kept(kth_largest(scores, 0), scores) == {}
    assert kept(kth_largest(scores, 3), scores) == {"a": [1, 2]}
