"""Refined rankings on a linear model, against autograd through the gate of every coordinate."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.localize.distilled import (
    DistilledResult,
    DistilledSettings,
    localize_distilled,
)
from restitch.merging.localize.fisher import FisherSettings, localize_fisher
from restitch.merging.localize.live_weights import LiveTensor
from restitch.merging.ranking.top_k import top_k
from tests.merging.linear import NAMES, ROWS, Linear, flat

SETTINGS = DistilledSettings(0.3, 0.3, epochs=3, batch_size=7, fisher=FisherSettings(batch_size=1))


@pytest.fixture
def linear(tmp_path: Path) -> Linear:
    return Linear(tmp_path)


def find(model: Linear, settings: DistilledSettings) -> DistilledResult:
    model.seen, model.orders = [], []
    return localize_distilled(model.live, model.vector, ROWS, model.batch, model.logits, settings)


def ranking(result: DistilledResult) -> Tensor:
    return torch.cat([chunk.clone() for name in NAMES for chunk in result.scores.chunks(name)])


def slow(model: Linear, settings: DistilledSettings) -> Tensor:
    """All steps with one gate per coordinate, whose gradient is taken by autograd."""
    base, tau = flat(model.base), flat(model.finetuned) - flat(model.base)
    first, _ = localize_fisher(
        model.live,
        model.vector,
        ROWS,
        list,
        lambda r: model.logits_at(model.live, r),
        settings.fisher,
    )
    scores = torch.cat([chunk.clone() for name in NAMES for chunk in first.chunks(name)])
    orders = [o for o in model.orders if len(o) != 1][1:]  # without sensitivities and targets
    steps = len(orders)
    kept = math.floor(settings.highest * len(base) + 0.5)
    unit = 0.0
    for step, rows in enumerate(orders):
        gate = (scores > torch.sort(scores, descending=True).values[kept]).double()
        assert int(gate.sum()) == kept
        gate.requires_grad_()
        found = model.logits_at(model.unflat(base + gate * tau), rows).log_softmax(1)
        wanted = model.logits_at(model.finetuned, rows).log_softmax(1)
        loss = (wanted.exp() * (wanted - found)).sum(1).mean()
        torch.autograd.backward(loss)
        assert gate.grad is not None
        if not step:
            largest = torch.sort(gate.grad.abs(), descending=True).values
            unit = float(torch.sort(scores, descending=True).values[kept] / largest[kept])
        size = settings.learning_rate * unit * (1 - step / steps) / math.sqrt(steps)
        scores = scores - size * gate.grad
    return scores


@pytest.mark.parametrize("density", [0.1, 0.3, 0.8])
def test_scores_are_those_of_the_slow_reference(linear: Linear, density: float) -> None:
    settings = replace(SETTINGS, lowest=density, highest=density)
    found = ranking(find(linear, settings))
    torch.testing.assert_close(found, slow(linear, settings))


def test_the_grafted_model_predicts_more_like_the_finetuned(tmp_path: Path) -> None:
    def divergence(model: Linear, scores: Tensor) -> float:
        kept = torch.argsort(-scores)[: round(0.3 * len(scores))]
        gate = torch.zeros(len(scores), dtype=torch.float64)
        gate[kept] = 1
        base, tau = flat(model.base), flat(model.finetuned) - flat(model.base)
        rows = list(range(ROWS))
        found = model.logits_at(model.unflat(base + gate * tau), rows).log_softmax(1)
        wanted = model.logits_at(model.finetuned, rows).log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum(1).mean())

    for seed in range(3):
        model = Linear(tmp_path / str(seed), seed=seed)
        first, _ = localize_fisher(
            model.live, model.vector, ROWS, model.batch, model.logits, SETTINGS.fisher
        )
        start = torch.cat([chunk.clone() for name in NAMES for chunk in first.chunks(name)])
        refined = ranking(find(model, replace(SETTINGS, epochs=10)))
        assert divergence(model, refined) < divergence(model, start)


def test_at_most_one_gradient_exists_at_a_time(linear: Linear) -> None:
    alive = linear.count_gradients()
    find(linear, SETTINGS)
    steps = SETTINGS.epochs * math.ceil(ROWS / SETTINGS.batch_size)
    assert alive == [1] * len(NAMES) * (ROWS + 1 + steps)


def test_labels_are_never_used(linear: Linear) -> None:
    found = ranking(find(linear, SETTINGS))
    linear.y = (linear.y + 1) % 6
    assert torch.equal(found, ranking(find(linear, SETTINGS)))


def test_every_step_has_another_density_if_it_is_not_known_yet(linear: Linear) -> None:
    settings = replace(SETTINGS, lowest=0.05, highest=0.4)
    found = find(linear, settings)
    base = flat(linear.base)
    count = len(linear.seen) - ROWS - 2  # without sensitivities, targets and the step's unit
    kept = [int((weights != base).sum()) for weights in linear.seen[-count:]]
    assert count == 3 * math.ceil(ROWS / 7)
    assert len(set(kept)) == count
    assert min(kept) >= math.floor(0.05 * len(base))
    assert max(kept) <= math.ceil(0.4 * len(base))
    assert len(found.losses) == 3


def test_the_same_seed_gives_the_same_scores_and_the_base_is_restored(linear: Linear) -> None:
    settings = replace(SETTINGS, lowest=0.05, highest=0.4)
    first = find(linear, settings)
    assert torch.equal(ranking(first), ranking(find(linear, settings)))
    assert not torch.equal(ranking(first), ranking(find(linear, replace(settings, seed=1))))
    assert all(torch.equal(linear.live[n], linear.base[n]) for n in linear.base)
    assert top_k(first.scores, 7).total == 7


def test_bad_settings_and_losses_are_explained(linear: Linear) -> None:
    with pytest.raises(BadInput, match="no rows"):
        localize_distilled(linear.live, linear.vector, 0, linear.batch, linear.logits, SETTINGS)

    calls = [0]

    def breaking(rows: list[int]) -> Tensor:
        calls[0] += 1
        return linear.logits(rows) * (math.nan if calls[0] > ROWS + 1 else 1.0)

    with pytest.raises(CannotJoin, match="divergence is not finite"):
        localize_distilled(linear.live, linear.vector, ROWS, linear.batch, breaking, SETTINGS)
    assert all(torch.equal(linear.live[n], linear.base[n]) for n in linear.base)
    with pytest.raises(ValueError):
        DistilledSettings(0.4, 0.3)


def test_a_score_moves_by_the_gradient_times_the_difference() -> None:
    base, finetuned = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    live = torch.zeros(2, requires_grad=True)
    live.grad = torch.tensor([3.0, 5.0])
    score = torch.tensor([10.0, 10.0])
    LiveTensor("w", live, base, finetuned).add_pull(score, torch.empty(2), -0.5)
    assert score.tolist() == [10 - 0.5 * 3, 10 + 0.5 * 10]


def test_a_single_score_is_matched_itself(linear: Linear) -> None:
    """It has no probabilities that could be matched."""
    found = localize_distilled(
        linear.live,
        linear.vector,
        ROWS,
        linear.batch,
        lambda batch: linear.logits(batch)[:, :1],
        DistilledSettings(lowest=0.3, highest=0.3, epochs=3, learning_rate=0.3),
    )
    assert min(found.losses) > 0
