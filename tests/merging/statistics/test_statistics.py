"""Statistics of members: what is measured, and what a file that holds one may be."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restitch.merging.errors import BadInput, Damage
from restitch.merging.statistics.fisher_diagonal import MOST_ROWS, mean_of, measure_fisher
from restitch.merging.statistics.gradient_grams import measure_gradient_grams, random_sum
from restitch.merging.statistics.grams import Run, gram_forms, measure_grams, packed, unpacked
from restitch.merging.statistics.statistic_file import (
    FISHER,
    GRAM,
    check_finite,
    check_fits,
    open_statistic,
    write_statistic,
)
from tests.merging.linear import NAMES, ROWS, Linear

BELONGS = {"base": "b" * 64, "delta": "d" * 64}


def written(folder: Path, name: str = "one") -> Path:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_statistic(folder / name, FISHER, tensors, {**BELONGS, "mean": "0.5"})
    return folder / name


def test_equal_statistics_are_equal_bytes_and_are_read_back(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert file.read_bytes() == written(tmp_path, "other").read_bytes()
    found = open_statistic(file, FISHER, BELONGS)
    assert found.names == ("a", "b")
    assert found.tensor("a").equal(torch.ones(2, 2, dtype=torch.bfloat16))
    assert found.tensor("b").equal(torch.arange(3.0))
    assert found.metadata["mean"] == "0.5"


def test_files_of_another_kind_or_member_and_other_files_are_damage(tmp_path: Path) -> None:
    file = written(tmp_path)
    for kind, belongs in (
        (GRAM, BELONGS),
        (FISHER, BELONGS | {"base": "c" * 64}),
        (FISHER, BELONGS | {"delta": "c" * 64}),
    ):
        with pytest.raises(Damage, match="belongs to another base or delta"):
            open_statistic(file, kind, belongs)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Damage, match="cannot be read"):
        open_statistic(file, FISHER, BELONGS)


def test_a_statistic_of_wrong_size_is_damage_and_infinite_entries_are_refused(
    tmp_path: Path,
) -> None:
    found = open_statistic(written(tmp_path), FISHER, BELONGS)
    check_fits(FISHER, found, {"a": 4, "b": 3})
    for sizes in ({"a": 5}, {"c": 1}):
        with pytest.raises(Damage, match="do not fit the member"):
            check_fits(FISHER, found, sizes)
    with pytest.raises(BadInput, match="not finite") as caught:
        check_finite(FISHER, {"a": torch.ones(2), "b": torch.tensor([torch.nan])})
    assert caught.value.details == ("b",)


def test_the_fisher_of_an_undecided_coin_by_hand() -> None:
    # Scores (w x, 0) at w = 0: whatever is drawn, the squared gradient is (x / 2)^2.
    weight, inputs = torch.zeros(1), torch.tensor([1.0, 2.0, 3.0])

    def logits(batch: dict[str, Tensor]) -> Tensor:
        scores = weight * batch["x"]
        return torch.stack([scores, torch.zeros_like(scores)], 1)

    found = measure_fisher({"w": weight}, ["w"], 3, lambda rows: {"x": inputs[list(rows)]}, logits)
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].item() == pytest.approx(0.25 * 14 / 3, rel=1 / 256)
    assert mean_of(found) == found["w"].item()


def test_the_fisher_is_the_mean_of_each_rows_own_squares(tmp_path: Path) -> None:
    model = Linear(tmp_path)
    live = {name: value.float() for name, value in model.base.items()}
    model.x, model.live = model.x.float(), live

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        assert len(rows) == 1, "the square of a sum is something else"
        return {"rows": torch.tensor(rows)}

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return model.logits_at(live, batch["rows"].tolist())

    found = measure_fisher(live, NAMES, ROWS, batch, logits, seed=3)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(ROWS, generator=generator).tolist()
    wanted = {name: torch.zeros_like(live[name]) for name in NAMES}
    for row in order:
        plain = {n: v.detach().clone().requires_grad_(n in NAMES) for n, v in live.items()}
        scores = model.logits_at(plain, [row])
        shares = scores.detach().double().softmax(1)
        drawn = torch.multinomial(shares, 1, generator=generator).view(-1)
        gradients = torch.autograd.grad(F.cross_entropy(scores, drawn), [plain[n] for n in NAMES])
        for name, gradient in zip(NAMES, gradients, strict=True):
            wanted[name] += gradient.square() / ROWS
    for name in NAMES:
        assert torch.allclose(found[name].float(), wanted[name], rtol=1 / 128, atol=1e-9)
        assert found[name].shape == live[name].shape


def test_the_fisher_uses_a_limited_number_of_rows() -> None:
    seen: list[int] = []

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        seen.extend(rows)
        return {}

    weight = torch.zeros(2)
    measure_fisher({"w": weight}, ["w"], 1000, batch, lambda _: weight[None, :])
    assert len(set(seen)) == len(seen) == MOST_ROWS
    with pytest.raises(BadInput, match="no rows"):
        measure_fisher({"w": weight}, ["w"], 0, batch, lambda _: weight[None, :])


def grams_of(layers: dict[str, nn.Linear], rows: int, run: Run) -> dict[str, Tensor]:
    grams = {name: torch.zeros(shape) for name, (_, shape) in gram_forms(layers).items()}
    return {name: grams[name] for name in measure_grams(layers, rows, run, grams)}


def test_gram_matrices_are_means_over_every_position_of_every_row() -> None:
    layer, other = nn.Linear(2, 3), nn.Linear(3, 2)
    rows = [torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 1.0]]])]

    def run(places: Sequence[int], _: Callable[[], None]) -> None:
        for place in places:
            other(layer(rows[place]))

    found = grams_of({"one": layer, "two": other, "unused": nn.Linear(2, 2)}, len(rows), run)
    assert found.keys() == {"one", "two"}
    inputs = torch.cat([row.view(-1, 2) for row in rows])
    assert found["one"].tolist() == pytest.approx([10 / 3, 14 / 3, 21 / 3])
    assert torch.allclose(unpacked(found["one"], 2), (inputs.T @ inputs / 3).double())
    between = layer(inputs).detach()
    assert torch.allclose(unpacked(found["two"], 3), (between.T @ between / 3).double(), atol=1e-6)
    assert not layer._forward_pre_hooks
    with pytest.raises(BadInput, match="no rows"):
        grams_of({"one": layer}, 0, run)


def test_matrices_that_are_stored_in_between_are_the_same() -> None:
    layer, rows = nn.Linear(4, 3), torch.randn(5, 1, 4).round(decimals=1)

    def run(places: Sequence[int], stored: Callable[[], None], every: int) -> None:
        for place in places:
            layer(rows[place])
            if place % every == every - 1:
                stored()

    often, once = (grams_of({"one": layer}, 5, partial(run, every=n))["one"] for n in (2, 5))
    assert torch.allclose(often, once, rtol=1e-6)
    assert once.equal(grams_of({"one": layer}, 5, partial(run, every=9))["one"])


def test_an_infinite_input_is_refused_with_its_layer() -> None:
    layer = nn.Linear(2, 2)

    def run(_places: Sequence[int], _: Callable[[], None]) -> None:
        layer(torch.tensor([[torch.inf, 0.0]]))

    with pytest.raises(BadInput, match="not finite") as caught:
        grams_of({"one": layer}, 1, run)
    assert caught.value.details == ("one",)


def test_gradient_matrices_are_sums_over_every_position_of_a_row() -> None:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 2), "unused": nn.Linear(2, 2)}
    first, second = layers["first"], layers["second"]
    parameters = {f"{n}.weight": layer.weight for n, layer in layers.items()}
    inputs = torch.randn(6, 5, 3)  # rows x positions x inputs

    def logits(batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = second(first(batch["x"]).tanh()).mean(1)
        return scores

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"x": inputs[list(rows)]}

    found = measure_gradient_grams(layers, parameters, 6, batch, logits, seed=3)
    assert found.keys() == {"first", "second"}
    generator = torch.Generator().manual_seed(3)
    wanted = {"first": torch.zeros(4, 4), "second": torch.zeros(2, 2)}
    for row in torch.randperm(6, generator=generator).tolist():
        hidden = first(inputs[[row]]).detach().requires_grad_()
        outputs = second(hidden.tanh())
        scores = outputs.mean(1)
        by = torch.autograd.grad(scores, [hidden, outputs], random_sum(scores, generator))
        for name, gradient in zip(wanted, by, strict=True):
            for position in gradient[0]:
                wanted[name] += torch.outer(position, position) / 6
    for name, matrix in wanted.items():
        assert torch.allclose(unpacked(found[name], len(matrix)).float(), matrix, atol=1e-6)
    assert all(tensor.grad is None and tensor.requires_grad for tensor in parameters.values())
    assert not first._forward_hooks
    with pytest.raises(BadInput, match="no rows"):
        measure_gradient_grams(layers, parameters, 0, batch, logits)


def test_random_sums_measure_the_squared_change_of_centred_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([random_sum(torch.zeros(4), generator) for _ in range(4000)])
    centred = torch.eye(4) - 1 / 4
    assert torch.allclose(drawn.mT @ drawn / 4000, centred, atol=0.06)
    assert random_sum(torch.zeros(2, 3, 1), generator).abs().equal(torch.ones(2, 3, 1))


def test_an_infinite_gradient_is_refused_with_its_layer() -> None:
    layer = nn.Linear(2, 2)

    def logits(_: dict[str, Tensor]) -> Tensor:
        scores: Tensor = layer(torch.zeros(1, 2)) * torch.inf
        return scores

    with pytest.raises(BadInput, match="not finite") as caught:
        measure_gradient_grams({"one": layer}, {}, 1, lambda _: {}, logits)
    assert caught.value.details == ("one",)


def test_a_symmetric_matrix_survives_packing() -> None:
    plain = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    gram = plain.T @ plain
    gram = (gram + gram.T) / 2
    assert packed(gram).shape == (28,)
    assert unpacked(packed(gram), 7).equal(gram.double())
    with pytest.raises(BadInput, match="does not fit its layer"):
        unpacked(packed(gram), 8)
