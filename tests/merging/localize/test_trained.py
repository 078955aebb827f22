"""Learned masks on a linear model, against autograd through W0 + sigmoid(S) * tau."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.localize.trained import (
    PRESETS,
    TrainedResult,
    TrainedSettings,
    localize_trained,
)
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.ranking.task_vector import TaskVector
from tests import tiny
from tests.merging.linear import NAMES, ROWS, Linear, flat


@pytest.fixture
def linear(tmp_path: Path) -> Linear:
    return Linear(tmp_path)


def chosen(result: TrainedResult, model: Linear) -> Tensor:
    """The mask as one boolean vector."""
    parts = []
    for name in NAMES:
        kept = torch.zeros(model.base[name].numel(), dtype=torch.bool)
        kept[result.mask.coordinates(name)] = True
        parts.append(kept)
    return torch.cat(parts)


def start_of(model: Linear, settings: TrainedSettings) -> Tensor:
    size = (flat(model.finetuned) - flat(model.base)).abs()
    scores = torch.full_like(size, settings.start_elsewhere)
    largest = torch.argsort(-size, stable=True)
    scores[largest[: math.floor(settings.start_share * len(size) + 0.5)]] = settings.start
    return scores


Oracle = Callable[[Linear, TrainedSettings], tuple[list[Tensor], Tensor]]


def slow_paper(model: Linear, settings: TrainedSettings) -> tuple[list[Tensor], Tensor]:
    """Weights at every loss, and the mask: all of Eq. 1 by autograd."""
    base, tau = flat(model.base), flat(model.finetuned) - flat(model.base)
    scores, seen = start_of(model, settings), []
    for rows in model.orders:
        s = scores.clone().requires_grad_()
        weights = base + torch.sigmoid(s) * tau
        loss = model.loss_at(model.unflat(weights), rows)
        torch.autograd.backward(loss + settings.penalty * torch.sigmoid(s).sum())
        seen.append(weights.detach())
        assert s.grad is not None
        scores = scores - settings.learning_rate * s.grad
    return seen, torch.round(torch.sigmoid(scores)).bool()


def slow_official(model: Linear, settings: TrainedSettings) -> tuple[list[Tensor], Tensor]:
    """One step per epoch: summed gradient, and the regulariser outside of the step size."""
    base, tau = flat(model.base), flat(model.finetuned) - flat(model.base)
    scores, seen = start_of(model, settings), []
    per_epoch = len(model.orders) // settings.epochs
    for epoch in range(settings.epochs):
        s = scores.clone().requires_grad_()
        weights = base + torch.sigmoid(s) * tau
        batches = model.orders[epoch * per_epoch : (epoch + 1) * per_epoch]
        total = sum(model.loss_at(model.unflat(weights), rows) for rows in batches)
        assert isinstance(total, Tensor)
        torch.autograd.backward(total)
        seen += [weights.detach()] * per_epoch
        assert s.grad is not None
        gate = torch.sigmoid(scores)
        push = settings.penalty * gate * (1 - gate) * torch.sign(scores)
        scores = scores - settings.learning_rate * s.grad + push
    return seen, scores > 0


def slow_grafting(model: Linear, settings: TrainedSettings) -> tuple[list[Tensor], Tensor]:
    """Eq. 2 by autograd: a soft exchange of what the largest differences keep."""
    base, tau = flat(model.base), flat(model.finetuned) - flat(model.base)
    largest = torch.argsort(-tau.abs(), stable=True)
    begun = torch.zeros_like(tau)
    begun[largest[: math.floor(settings.density * len(tau) + 0.5)]] = 1
    scores, seen = torch.full_like(tau, settings.start), []
    for rows in model.orders:
        s = scores.clone().requires_grad_()
        gamma = begun * (1 - torch.sigmoid(s)) + (1 - begun) * torch.sigmoid(s)
        weights = base + gamma * tau
        torch.autograd.backward(model.loss_at(model.unflat(weights), rows))
        seen.append(weights.detach())
        assert s.grad is not None
        scores = scores - settings.learning_rate * s.grad
    gamma = begun * (1 - torch.sigmoid(scores)) + (1 - begun) * torch.sigmoid(scores)
    return seen, gamma > 0.5


@pytest.mark.parametrize(
    ("preset", "oracle"),
    [("paper", slow_paper), ("official", slow_official), ("grafting", slow_grafting)],
)
@pytest.mark.parametrize("rate", [0.3, 30.0, None])
def test_presets_follow_autograd_through_the_interpolation(
    linear: Linear, preset: str, oracle: Oracle, rate: float | None
) -> None:
    settings = TrainedSettings.of(preset, epochs=4, batch_size=7)
    if rate is not None:
        settings = replace(settings, learning_rate=rate, start=1.0, start_elsewhere=-0.5)
    result = linear.run(settings)
    seen, mask = oracle(linear, settings)
    assert len(linear.seen) == len(seen) == 16
    torch.testing.assert_close(torch.stack(linear.seen), torch.stack(seen))
    assert torch.equal(chosen(result, linear), mask)
    assert result.density == mask.double().mean()
    assert result.steps == (4 if preset == "official" else 16)


def slow_budget(model: Linear, settings: TrainedSettings, kept: int) -> tuple[list[Tensor], Tensor]:
    """Root mean squares at the base, then straight through the mask of the k largest."""
    base, tuned = flat(model.base), flat(model.finetuned)
    per_epoch, seen = len(model.orders) // settings.epochs, []

    def pull(mask: Tensor, rows: Sequence[int]) -> Tensor:
        """The gradient by the mask itself, at the mask."""
        gate = mask.double().requires_grad_()
        seen.append(torch.where(mask, tuned, base))
        weights = base + gate * (tuned - base)
        return torch.autograd.grad(model.loss_at(model.unflat(weights), rows), gate)[0]

    def largest(values: Tensor) -> Tensor:
        mask = torch.zeros(len(values), dtype=torch.bool)
        mask[torch.argsort(-values, stable=True)[:kept]] = True
        return mask

    nothing = torch.zeros(len(base), dtype=torch.bool)
    pulls = [pull(nothing, rows) for rows in model.orders[:per_epoch]]
    scores = torch.stack(pulls).square().mean(0).sqrt()
    unit = None
    for rows in model.orders[per_epoch:]:
        change = pull(largest(scores), rows)
        if unit is None:
            next_score, next_pull = (x.sort().values[-kept - 1] for x in (scores, change.abs()))
            unit = next_score / next_pull
        scores = scores - settings.learning_rate / (settings.epochs - 1) * unit * change
    return seen, largest(scores)


@pytest.mark.parametrize("kept", [1, 3, 40, 159])
def test_budget_follows_autograd_through_the_hard_mask(linear: Linear, kept: int) -> None:
    settings = TrainedSettings.of(density=kept / 160, epochs=4, batch_size=7)
    result = linear.run(settings)
    seen, mask = slow_budget(linear, settings, kept)
    first = len(linear.orders) // settings.epochs
    assert linear.seen.pop(first).equal(linear.seen[first]), "twice, the first time for the unit"
    torch.testing.assert_close(torch.stack(linear.seen), torch.stack(seen))
    assert torch.equal(chosen(result, linear), mask)
    assert result.steps == 12


@pytest.mark.parametrize("preset", ["budget", "grafting", "paper"])
def test_one_gradient_is_in_memory_at_a_time(linear: Linear, preset: str) -> None:
    alive = linear.count_gradients()
    linear.run(TrainedSettings.of(preset, epochs=3, batch_size=7))
    assert len(alive) >= 2 * 12
    assert set(alive) == {1}
    assert all(tensor.grad is None for tensor in linear.live.values())


def test_weights_that_the_loss_does_not_reach_are_penalized_all_the_same(tmp_path: Path) -> None:
    base = {"unused": torch.zeros(2), "w": torch.zeros(1)}
    vector = TaskVector(
        tiny.save(tmp_path / "base", base),
        tiny.save(tmp_path / "finetuned", {name: one + 1 for name, one in base.items()}),
        ("unused", "w"),
    )
    live = {name: one.clone() for name, one in base.items()}
    settings = replace(
        TrainedSettings.of("paper", epochs=1, batch_size=1),
        learning_rate=1.0,
        penalty=4.0,
        start=0.5,
        start_elsewhere=0.5,
    )
    found = localize_trained(live, vector, 1, list, lambda _: live["w"].sum() * 0, settings)
    # The slope at 0.5 is 0.235: a step of 4 times that makes the score negative.
    assert found.mask.total == 0


def test_one_step_of_each_by_hand(tmp_path: Path) -> None:
    """W0 = 1, tau = 2, loss = 3 W: at S = 0 the gradient of S is 3 * 2 * 1/4 = 1.5."""
    base, finetuned = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    vector = TaskVector(
        tiny.save(tmp_path / "b", base), tiny.save(tmp_path / "f", finetuned), ["w"]
    )
    live = {"w": base["w"].clone()}
    seen: list[float] = []

    def loss(_: Sequence[int]) -> Tensor:
        seen.append(float(live["w"].detach()))
        return 3 * live["w"].sum()

    def run(settings: TrainedSettings) -> int:
        return localize_trained(live, vector, 1, list, loss, settings).mask.total

    # S = 0 - 0.1 * (1.5 + 0.4 * 1/4) = -0.16, so the second loss is at 1 + 2 sigmoid(-0.16).
    paper = replace(TrainedSettings.of("paper"), epochs=2, learning_rate=0.1, penalty=0.4)
    assert run(paper) == 0
    assert seen == [2.0, pytest.approx(1 + 2 / (1 + math.exp(0.16)))]
    seen.clear()
    # S = ln 3, s = 3/4, slope 3/16: S' = ln 3 - 0.1 * 3 * 2 * 3/16 + 0.4 * 3/16 * (+1).
    official = replace(TrainedSettings.of("official"), epochs=2, learning_rate=0.1, penalty=0.4)
    official = replace(official, start=math.log(3), start_share=1.0)
    assert run(official) == 1
    after = math.log(3) - 0.1 * 3 * 2 * 3 / 16 + 0.4 * 3 / 16
    assert seen == [pytest.approx(2.5), pytest.approx(1 + 2 / (1 + math.exp(-after)))]


def test_paper_freezes_what_starts_at_zero(linear: Linear) -> None:
    """One step of the regulariser is lr * lambda / 4 = 25, however small the gradient."""
    linear.x.mul_(1e-9)
    settings = TrainedSettings.of("paper", epochs=3)
    result = linear.run(settings)
    assert settings.learning_rate * settings.penalty / 4 == pytest.approx(25)
    share = (linear.seen[2] - flat(linear.base)) / (flat(linear.finetuned) - flat(linear.base))
    assert float(share.sort().values[:-2].max()) < 1e-10
    assert result.mask.total <= 2


def test_presets_are_those_of_the_paper_and_its_code() -> None:
    paper, official = TrainedSettings.of("paper"), TrainedSettings.of("official")
    assert (paper.learning_rate, paper.penalty, paper.batch_size) == (1e7, 1e-5, 16)
    assert (paper.start, paper.start_elsewhere, paper.start_share) == (3, 0, 0.01)
    assert (official.learning_rate, official.penalty, official.batch_size) == (1e7, 10, 8)
    assert (official.start, official.start_elsewhere, official.start_share) == (5, -5, 1e-5)
    image = TrainedSettings.of("official", modality="image")
    assert (image.penalty, image.batch_size) == (1, 128)
    assert {TrainedSettings.of(preset).epochs for preset in PRESETS} == {10}
    assert TrainedSettings.of().density == 0.01


@pytest.mark.parametrize("kept", [0, 1, 2, 57, 159, 160])
def test_budget_keeps_exactly_k(linear: Linear, kept: int) -> None:
    result = linear.run(TrainedSettings.of(density=kept / 160, epochs=3, batch_size=9))
    assert result.mask.total == kept
    assert result.density == kept / 160


def test_the_scale_of_the_loss_does_not_change_what_budget_keeps(linear: Linear) -> None:
    settings = TrainedSettings.of(density=0.2, epochs=3)
    plain = linear.run(settings)
    louder = localize_trained(
        linear.live,
        linear.vector,
        ROWS,
        linear.batch,
        lambda rows: 1024 * linear.loss(rows),
        settings,
    )
    assert louder.mask.digest() == plain.mask.digest()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_task_vector_of_zeros_keeps_the_lowest_coordinates(tmp_path: Path, preset: str) -> None:
    model = Linear(tmp_path, spread=0.0)
    result = model.run(TrainedSettings.of(preset, density=0.3, epochs=2))
    if preset == "budget":
        assert result.mask.coordinates("head.weight").tolist() == list(range(48))
        assert result.mask.total == 48


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_bytes(linear: Linear, preset: str) -> None:
    settings = TrainedSettings.of(preset, density=0.2, epochs=3, batch_size=5)
    first, orders = linear.run(settings), linear.orders
    again = linear.run(settings)
    assert first.mask.digest() == again.mask.digest()
    assert (first.density, first.steps, first.history) == (
        again.density,
        again.steps,
        again.history,
    )
    assert linear.orders == orders
    linear.run(replace(settings, seed=1))
    assert linear.orders != orders


def test_each_epoch_uses_all_rows_once_in_another_order(linear: Linear) -> None:
    linear.run(TrainedSettings.of(epochs=3, batch_size=7))
    epochs = [list(chain(*linear.orders[i : i + 4])) for i in range(0, 12, 4)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_s_weights_are_restored_bit_for_bit(
    linear: Linear, tmp_path: Path, preset: str, dtype: torch.dtype
) -> None:
    stored = [{n: w.to(dtype) for n, w in x.items()} for x in (linear.base, linear.finetuned)]
    base, finetuned = (tiny.save(tmp_path / str(i), w) for i, w in enumerate(stored))
    linear.vector = TaskVector(base, finetuned, NAMES)
    linear.live = {name: value.float() for name, value in stored[0].items()}
    linear.x = linear.x.float()
    linear.base = {name: value.float() for name, value in linear.base.items()}
    before = {name: value.clone() for name, value in linear.live.items()}
    result = linear.run(TrainedSettings.of(preset, density=0.3, epochs=2))
    assert result.mask.total <= 160
    for name, value in linear.live.items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32))
        assert value.grad is None
        assert not value.requires_grad


@pytest.mark.parametrize("preset", PRESETS)
def test_the_base_s_weights_are_restored_after_an_error(linear: Linear, preset: str) -> None:
    linear.live["bias"].requires_grad_(True)
    linear.live["trunk.weight"].requires_grad_(True)
    calls = iter([False] * 5 + [True])

    def loss(rows: Sequence[int]) -> Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return linear.loss(rows)

    settings = TrainedSettings.of(preset, density=0.3, batch_size=6)
    with pytest.raises(KeyboardInterrupt):
        localize_trained(linear.live, linear.vector, ROWS, linear.batch, loss, settings)
    assert all(torch.equal(linear.live[name], linear.base[name]) for name in linear.base)
    asked = {name for name, value in linear.live.items() if value.requires_grad}
    assert asked == {"bias", "trunk.weight"}
    assert all(value.grad is None for value in linear.live.values())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("preset", PRESETS)
def test_only_localizable_tensors_get_gradients(linear: Linear, preset: str) -> None:
    linear.live["bias"].requires_grad_(True)

    def loss(rows: Sequence[int]) -> Tensor:
        assert [n for n, v in linear.live.items() if v.requires_grad] == list(NAMES)
        return linear.loss(rows)

    settings = TrainedSettings.of(preset, epochs=2)
    localize_trained(linear.live, linear.vector, ROWS, linear.batch, loss, settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tensor_that_the_loss_does_not_use_is_allowed(linear: Linear, preset: str) -> None:
    def loss(rows: Sequence[int]) -> Tensor:
        return F.cross_entropy(linear.x[rows] @ linear.live["head.weight"].T, linear.y[rows])

    settings = TrainedSettings.of(preset, density=0.1, epochs=2)
    result = localize_trained(linear.live, linear.vector, ROWS, list, loss, settings)
    if preset == "budget":
        assert result.mask.names == ("head.weight",)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_infinite_loss_is_explained(linear: Linear, preset: str) -> None:
    linear.x[3, 3] = math.nan
    with pytest.raises(CannotJoin, match="not finite"):
        linear.run(TrainedSettings.of(preset))
    assert torch.equal(flat(linear.live), flat(linear.base))


def test_progress_counts_every_batch(linear: Linear) -> None:
    for preset in PRESETS:
        calls: list[tuple[int, int]] = []
        localize_trained(
            linear.live,
            linear.vector,
            ROWS,
            linear.batch,
            linear.loss,
            TrainedSettings.of(preset, epochs=2, batch_size=7),
            progress=lambda *call, calls=calls: calls.append(call),
        )
        assert calls == [(i + 1, 8) for i in range(8)]


def test_bad_settings_are_explained(linear: Linear) -> None:
    with pytest.raises(BadInput, match="did you mean 'official'"):
        TrainedSettings.of("oficial")
    with pytest.raises(BadInput, match="density"):
        TrainedSettings.of(density=1.5)
    with pytest.raises(ValueError, match="0 epochs"):
        TrainedSettings.of(epochs=0)
    with pytest.raises(BadInput, match="no rows"):
        localize_trained(linear.live, linear.vector, 0, list, linear.loss, TrainedSettings())
    del linear.live["trunk.weight"]
    with pytest.raises(BadInput, match=r"trunk\.weight"):
        linear.run(TrainedSettings())


def test_settings_and_fingerprint_are_plain_values() -> None:
    assert TrainedSettings.of("paper", seed=3).to_json()["seed"] == 3
    assert fingerprint("cuda:1")["device"] == "cuda"
    assert set(fingerprint()) == {"torch", "device", "threads"}
