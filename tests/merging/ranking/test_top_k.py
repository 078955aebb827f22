from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restitch.merging.files.mask import Mask
from restitch.merging.ranking import top_k as module
from restitch.merging.ranking.top_k import TensorScores, strided_positions, strided_sample, top_k


def slow_top_k(scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """The reference: a stable sort of everything."""
    names = sorted(scores)
    flat = np.concatenate([scores[name].double().numpy() for name in names])
    kept = np.zeros(len(flat), dtype=bool)
    kept[np.argsort(-flat, kind="stable")[:k]] = True
    found, start = {}, 0
    for name in names:
        stop = start + scores[name].numel()
        found[name] = np.flatnonzero(kept[start:stop]).tolist()
        start = stop
    return {name: value for name, value in found.items() if value}


def as_lists(mask: Mask) -> dict[str, list[int]]:
    found = {name: mask.coordinates(name).tolist() for name in mask.names}
    assert {name: len(value) for name, value in found.items()} == {
        name: mask.count(name) for name in mask.names
    }
    return found


TIES = [0.0, -0.0, 1e-45, 1.0, 1.0, 2.0, 3e38]
SIGNED = [-5.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 3.0]


@settings(max_examples=300)
@given(st.data())
def test_the_k_largest_are_kept_and_ties_go_to_the_lower_coordinate(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    values = data.draw(st.sampled_from([TIES, SIGNED]))
    scores = {
        name: torch.tensor(data.draw(st.lists(st.sampled_from(values), max_size=40)), dtype=dtype)
        for name in ("b", "a", "c.d")
    }
    total = sum(value.numel() for value in scores.values())
    k = data.draw(st.integers(0, total))
    assert as_lists(top_k(TensorScores(scores), k)) == slow_top_k(scores, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.05, 0.5, 0.999])
def test_many_scores_over_several_blocks(
    monkeypatch: pytest.MonkeyPatch, density: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1000)
    monkeypatch.setattr(module, "SAMPLE", 2000)
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randn(30_000, generator=generator).to(dtype),
        "b": torch.randn(7, generator=generator).to(dtype),
        "c": (torch.randn(30_000, generator=generator) * 8).round().to(dtype),
    }
    k = int(density * 60_007)
    assert as_lists(top_k(TensorScores(scores), k)) == slow_top_k(scores, k)


class Deceiving(TensorScores):
    """Scores whose sample promises more than there is."""

    passes = 0

    def sample(self, name: str, stride: int, block: int) -> Tensor:
        return torch.full((1000,), 9.0)

    def chunks(self, name: str, start: int = 0) -> Iterator[Tensor]:
        type(self).passes += name == "a"
        return super().chunks(name, start)


def test_a_misleading_sample_only_costs_a_pass() -> None:
    scores = {"a": torch.arange(100.0) / 50, "b": torch.zeros(50)}
    assert as_lists(top_k(Deceiving(scores), 30)) == slow_top_k(scores, 30)
    assert Deceiving.passes == 2


def test_fewer_positive_scores_than_k_are_filled_from_the_lowest_coordinate() -> None:
    scores = {"a": torch.tensor([0.0, 1, 0, 0]), "b": torch.zeros(5), "c": torch.ones(1)}
    assert as_lists(top_k(TensorScores(scores), 5)) == {"a": [0, 1, 2, 3], "c": [0]}
    assert as_lists(top_k(TensorScores(scores), 6)) == {"a": [0, 1, 2, 3], "b": [0], "c": [0]}


def test_nothing_and_everything() -> None:
    scores = TensorScores({"a": torch.rand(5), "b": torch.rand(2)})
    assert top_k(scores, 0).names == ()
    assert as_lists(top_k(scores, 7)) == {"a": [0, 1, 2, 3, 4], "b": [0, 1]}
    assert top_k(TensorScores({}), 0).total == 0
    for wrong in (-1, 8):
        with pytest.raises(ValueError):
            top_k(scores, wrong)


def test_scores_at_the_floor_are_not_written_to_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []
    monkeypatch.setattr(module, "_write", lambda _file, array: written.append(len(array)))
    top_k(TensorScores({"a": torch.full((5000,), -5.0)}), 100, scratch=tmp_path)
    assert sum(written) == 0


def test_scratch_files_leave_no_name(tmp_path: Path) -> None:
    mask = top_k(TensorScores({"a": torch.rand(5000)}), 100, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert mask.coordinates("a").numel() == 100


def test_progress_ends_with_all_scores() -> None:
    seen: list[tuple[int, int]] = []
    scores = TensorScores({"a": torch.rand(50), "b": torch.rand(20)})
    top_k(scores, 7, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70, 70)


def test_a_strided_sample_covers_the_whole_tensor() -> None:
    flat = torch.arange(11.0)
    assert strided_sample(flat, 5, 2).tolist() == [0, 1, 5, 6]
    assert strided_sample(flat, 100, 3).tolist() == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(1, 100), st.integers(1, 100))
def test_positions_are_those_of_the_sample(count: int, stride: int, block: int) -> None:
    block = min(block, stride)
    numbers = torch.arange(count, dtype=torch.int32)
    expected = strided_sample(numbers, stride, block).tolist()
    assert strided_positions(count, stride, block).tolist() == expected
