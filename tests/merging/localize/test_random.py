"""Coordinates by lot: one seed gives one ranking, whose masks are nested."""

from pathlib import Path

import pytest
import torch

from restitch.merging.files.mask import Mask
from restitch.merging.localize.random import random_scores
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import top_k
from tests import tiny


@pytest.fixture
def vector(tmp_path: Path) -> TaskVector:
    base = {"a": torch.zeros(40, 5), "b": torch.zeros(300)}
    other = {name: torch.ones_like(value) for name, value in base.items()}
    return TaskVector(tiny.save(tmp_path / "b", base), tiny.save(tmp_path / "f", other), ["a", "b"])


def cut(vector: TaskVector, seed: int, kept: int) -> Mask:
    return top_k(random_scores(vector, seed), kept)


def test_a_seed_gives_one_mask_and_another_seed_another(vector: TaskVector) -> None:
    assert cut(vector, 0, 50).digest() == cut(vector, 0, 50).digest()
    assert cut(vector, 0, 50).digest() != cut(vector, 1, 50).digest()


def test_masks_are_nested_and_every_tensor_has_its_share(
    vector: TaskVector,
) -> None:
    small, large = cut(vector, 3, 50), cut(vector, 3, 250)
    for name in small.names:
        inner, outer = small.coordinates(name).tolist(), large.coordinates(name).tolist()
        assert set(inner) < set(outer)
    assert 75 < large.count("a") < 125, "of 200 coordinates, and 250 of all 500 are kept"
