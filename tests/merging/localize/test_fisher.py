"""Sensitivities on a linear model, against gradients row by row; scores that are streamed."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.localize.fisher import (
    FisherScores,
    FisherSettings,
    Sensitivities,
    localize_fisher,
    sampled_loss,
)
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import top_k
from tests import tiny
from tests.merging.linear import NAMES, ROWS, Linear, flat

ONE_BY_ONE = FisherSettings(batch_size=1)


@pytest.fixture
def linear(tmp_path: Path) -> Linear:
    return Linear(tmp_path)


def find(model: Linear, settings: FisherSettings) -> tuple[FisherScores, Sensitivities]:
    model.seen, model.orders = [], []
    return localize_fisher(model.live, model.vector, ROWS, model.batch, model.logits, settings)


def slow_fisher(model: Linear, settings: FisherSettings) -> dict[str, Tensor]:
    """The mean squared gradient, batch by batch, with the labels drawn in the same order."""
    generator = torch.Generator().manual_seed(settings.seed)
    torch.randperm(ROWS, generator=generator)
    weights = {
        name: (model.base[name] + settings.at * (model.finetuned[name] - model.base[name]))
        for name in model.base
    }
    sums = {name: torch.zeros_like(model.base[name]) for name in NAMES}
    for rows in model.orders:
        asked = {n: w.clone().requires_grad_(n in NAMES) for n, w in weights.items()}
        logits = model.logits_at(asked, rows)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).view(-1)
        torch.autograd.backward(F.cross_entropy(logits, drawn, reduction="sum"))
        for name in NAMES:
            gradient = asked[name].grad
            assert gradient is not None
            sums[name] += gradient**2
    return {name: total / sum(map(len, model.orders)) for name, total in sums.items()}


def factored(fisher: Tensor, mean: float) -> Tensor:
    rows, columns = fisher.sum(1), fisher.sum(0)
    rows, columns = rows + 1e-6 * mean * len(columns), columns + 1e-6 * mean * len(rows)
    return torch.outer(rows, columns) / rows.sum()


@pytest.mark.parametrize(
    "settings",
    [
        ONE_BY_ONE,
        FisherSettings(batch_size=5, seed=3),
        FisherSettings(at=0.0, power=0.5, most_rows=10),
        FisherSettings(at=1.0),
    ],
)
def test_scores_are_those_of_the_slow_reference(linear: Linear, settings: FisherSettings) -> None:
    scores, worth = find(linear, settings)
    fisher = slow_fisher(linear, settings)
    mean = float(torch.cat([f.view(-1) for f in fisher.values()]).mean())
    for name in NAMES:
        expected = factored(fisher[name], mean)
        found = worth.spread(name, 1.0, fisher[name].shape)
        torch.testing.assert_close(found, expected)
        size = (linear.finetuned[name] - linear.base[name]).abs()
        chunks = torch.cat([chunk.clone() for chunk in scores.chunks(name)])
        torch.testing.assert_close(chunks, (expected**settings.power * size).view(-1))
        assert torch.equal(torch.cat(list(scores.chunks(name, 2))), chunks[2:])


def test_sensitivities_are_measured_at_the_chosen_point_and_the_base_is_restored(
    linear: Linear,
) -> None:
    find(linear, ONE_BY_ONE)
    half = (flat(linear.base) + flat(linear.finetuned)) / 2
    assert all(torch.allclose(seen, half) for seen in linear.seen)
    assert len(linear.orders) == ROWS
    assert all(torch.equal(linear.live[n], linear.base[n]) for n in linear.base)
    assert not any(linear.live[n].requires_grad for n in linear.base)


def test_a_case_by_hand(tmp_path: Path) -> None:
    # One row of ones, two classes, all logits equal: the gradient of either label is half of the
    # input for each class, up to sign. So every entry is a quarter, and scores halve twice.
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(2, 3)})
    tuned = torch.tensor([[1.0, -2.0, 0.0], [1.0, -2.0, 0.0]])
    vector = TaskVector(base, tiny.save(tmp_path / "tuned", {"w": tuned}), ["w"])
    live = {"w": torch.zeros(2, 3)}
    scores, worth = localize_fisher(
        live,
        vector,
        1,
        lambda rows: torch.ones(len(rows), 3),
        lambda x: x @ live["w"].T,
        FisherSettings(power=0.5),
    )
    quarters = torch.full((2, 3), 0.25, dtype=torch.float64)
    found = worth.spread("w", 1.0, tuned.shape)
    torch.testing.assert_close(found, quarters, rtol=1e-5, atol=0)  # but for the floor
    expected = torch.tensor([0.5, 1.0, 0.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(next(iter(scores.chunks("w"))), expected, rtol=1e-5, atol=0)
    assert top_k(scores, 3).coordinates("w").tolist() == [0, 1, 4]


def test_at_most_one_gradient_exists_at_a_time(linear: Linear) -> None:
    alive = linear.count_gradients()
    find(linear, ONE_BY_ONE)
    assert alive == [1] * (ROWS * len(NAMES))
    assert all(linear.live[name].grad is None for name in NAMES)


def test_coordinates_that_no_row_depends_on_are_ranked_by_their_difference(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"idle": torch.zeros(4), "w": torch.zeros(2, 3)})
    finetuned = {"idle": torch.tensor([1.0, 4.0, 2.0, 3.0]), "w": torch.zeros(2, 3)}
    vector = TaskVector(base, tiny.save(tmp_path / "tuned", finetuned), ["idle", "w"])
    live = {"idle": torch.zeros(4), "w": torch.zeros(2, 3)}
    scores, _ = localize_fisher(
        live,
        vector,
        8,
        lambda rows: torch.ones(len(rows), 3),
        lambda x: x @ live["w"].T,
        FisherSettings(),
    )
    assert top_k(scores, 2).coordinates("idle").tolist() == [1, 3]


def test_without_any_gradient_the_largest_differences_are_kept(linear: Linear) -> None:
    def sure(rows: list[int]) -> Tensor:
        return F.one_hot(torch.zeros(len(rows), dtype=torch.long), 6) * 1e4 + 0 * linear.logits(
            rows
        )

    scores, _ = localize_fisher(
        linear.live, linear.vector, ROWS, linear.batch, sure, FisherSettings()
    )
    assert top_k(scores, 30).digest() == top_k(linear.vector, 30).digest()


def test_a_sample_is_of_the_same_scores(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(50, 70, generator=generator), "v": torch.randn(30)}
    base = tiny.save(tmp_path / "base", {n: torch.zeros_like(t) for n, t in tensors.items()})
    vector = TaskVector(base, tiny.save(tmp_path / "tuned", tensors), ["v", "w"])
    draw = np.random.default_rng(0)
    worth = Sensitivities(
        {"w": (draw.random(50), draw.random(70)), "v": (draw.random(30), np.ones(1))}
    )
    scores = FisherScores(vector, worth, 0.5)
    for name in ("v", "w"):
        whole = torch.cat([chunk.clone() for chunk in scores.chunks(name)])
        for stride, block in ((7, 3), (640, 64), (10_000, 64)):
            rows = len(whole) // stride
            expected = whole[: rows * stride].view(rows, stride)[:, :block].reshape(-1)
            expected = expected if rows else whole[:block]
            assert torch.equal(scores.sample(name, stride, block), expected)
    whole = torch.cat([c.clone() for n in ("v", "w") for c in scores.chunks(n)])
    best = set(torch.argsort(-whole, stable=True)[:100].tolist())
    mask = top_k(scores, 100)
    found = {int(c) + start for n, start in (("v", 0), ("w", 30)) for c in mask.coordinates(n)}
    assert found == best


def test_the_same_seed_gives_the_same_scores_and_another_one_others(linear: Linear) -> None:
    def all_of(settings: FisherSettings) -> Tensor:
        scores, _ = find(linear, settings)
        return torch.cat([chunk.clone() for name in NAMES for chunk in scores.chunks(name)])

    first = all_of(ONE_BY_ONE)
    assert torch.equal(first, all_of(ONE_BY_ONE))
    assert not torch.equal(first, all_of(replace(ONE_BY_ONE, seed=1)))


def test_missing_rows_and_infinite_scores_are_explained(linear: Linear) -> None:
    with pytest.raises(BadInput, match="no rows"):
        localize_fisher(
            linear.live, linear.vector, 0, linear.batch, linear.logits, FisherSettings()
        )

    def broken(rows: list[int]) -> Tensor:
        return linear.logits(rows) * math.nan

    with pytest.raises(CannotJoin, match="not finite"):
        localize_fisher(linear.live, linear.vector, ROWS, linear.batch, broken, FisherSettings())
    assert all(torch.equal(linear.live[n], linear.base[n]) for n in linear.base)


def test_a_single_score_is_the_mean_of_a_gaussian_with_unit_variance() -> None:
    """Its Fisher information is 1 for every score."""
    scores = torch.linspace(-3, 3, 4000).unsqueeze(1).requires_grad_()
    torch.autograd.backward(sampled_loss(scores, torch.Generator().manual_seed(0)))
    assert scores.grad is not None
    assert float(scores.grad.mean()) == pytest.approx(0, abs=0.05)
    assert float(scores.grad.square().mean()) == pytest.approx(1, abs=0.1)
