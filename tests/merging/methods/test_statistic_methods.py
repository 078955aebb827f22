"""Methods that need statistics of their members, against slow dense references and by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import edited
from restitch.merging.files.mask import Mask
from restitch.merging.methods.mats import solved as solved_by_mats
from restitch.merging.methods.registry import get_method, method_names
from restitch.merging.methods.regmean import solved
from restitch.merging.methods.tsv_m import merged as merged_by_tsv_m
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.rules.stitch import DeltaMember, sparse_delta
from restitch.merging.statistics.entropy_coefficients import (
    CoefficientSettings,
    entropy,
    learn_coefficients,
)
from restitch.merging.statistics.grams import packed
from restitch.merging.statistics.statistic_file import (
    COEFFICIENTS,
    FISHER,
    GRADIENT_GRAM,
    GRAM,
    open_statistic,
    write_statistic,
)
from tests import tiny
from tests.merging.linear import NAMES, Linear
from tests.merging.rules.test_per_matrix import whole_members

BASE = {"base": "b" * 64}
NEEDING = [name for name in method_names() if get_method(name).needs]


def given(
    folder: Path,
    members: Sequence[DeltaMember],
    kind: str,
    tensors: Sequence[Mapping[str, Tensor]],
    metadata: Sequence[Mapping[str, str]] | None = None,
) -> list[DeltaMember]:
    """Members with a statistic each."""
    folder.mkdir(exist_ok=True)
    found = []
    for number, (member, values) in enumerate(zip(members, tensors, strict=True)):
        file = folder / f"{kind}{number}"
        write_statistic(file, kind, values, BASE | dict(metadata[number] if metadata else {}))
        statistics = {**member.statistics, kind: open_statistic(file, kind, BASE)}
        found.append(replace(member, statistics=statistics))
    return found


def diagonals(base: Checkpoint, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {
            name: (10.0**number * torch.rand(base.info(name).shape, generator=generator)).bfloat16()
            for name in tiny.LOCALIZABLE
        }
        for number in range(count)
    ]


def means(of: Sequence[Mapping[str, Tensor]]) -> list[dict[str, str]]:
    found = []
    for one in of:
        values = torch.cat([tensor.double().view(-1) for tensor in one.values()])
        found.append({"mean": repr(float(values.mean()))})
    return found


def dense(base: Checkpoint, member: DeltaMember, name: str) -> Tensor:
    before = base.tensor(name).double()
    return sparse_delta(member).values(name).view(before.shape).double() - before


@pytest.mark.parametrize("scale", ["mean", "none"])
def test_fisher_merging_is_the_weighted_mean_of_weights(tmp_path: Path, scale: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    worth = diagonals(base, 3)
    members = given(tmp_path, whole_members(tmp_path, base, 3), FISHER, worth, means(worth))
    for order in (members, members[::-1]):
        edits = get_method("fisher-merging")(base, order, scale=scale, floor=1e-3)
        for name in edits.names:
            total = torch.zeros(base.info(name).shape).double()
            weights = torch.zeros_like(total)
            for member, one, said in zip(members, worth, means(worth), strict=True):
                mean = float(said["mean"])
                weight = one[name].double() / mean + 1e-3
                weight = weight if scale == "mean" else weight * mean
                total += weight * (base.tensor(name).double() + dense(base, member, name))
                weights = weights + weight
            assert torch.allclose(edited(base, edits, name).double(), total / weights, atol=1e-6)


def test_fisher_merging_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(4)})
    members = []
    for task, values in (("a", [1.0, 1.0, 1.0, 8.0]), ("b", [-1.0, 3.0, 0.0, 4.0])):
        finetuned = tiny.save(tmp_path / task, {"w": torch.tensor(values)})
        mask = Mask.of({"w": torch.arange(4)})
        members.append(
            DeltaMember(task, tiny.write_delta(tmp_path / f"{task}.delta", finetuned, mask))
        )
    worth = [{"w": torch.tensor(one).bfloat16()} for one in ([3.0, 1, 2, 0], [1.0, 1, 2, 0])]
    members = given(tmp_path, members, FISHER, worth, [{"mean": "1.5"}, {"mean": "1.0"}])
    edits = get_method("fisher-merging")(base, members, scale="none", floor=1e-9)
    # Thrice as much; the same; the same; and what no row depends on is the mean as well, but for
    # the means of the diagonals that scale the floor.
    found = edited(base, edits, "w").tolist()
    assert found[:3] == pytest.approx([0.5, 2.0, 0.5])
    assert found[3] == pytest.approx((1.5 * 8 + 4) / 2.5)
    edits = get_method("fisher-merging")(base, members, floor=1e-9)
    found = edited(base, edits, "w").tolist()
    assert found[0] == pytest.approx((3 / 1.5 - 1) / (3 / 1.5 + 1))
    assert found[3] == pytest.approx(6.0)


def test_regmean_is_the_least_squares_solution_over_all_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(40, 5, generator=generator).double() for _ in range(3)]
    changes = torch.randn(3, 4, 5, generator=generator)
    grams = [one.T @ one / len(one) for one in inputs]
    found = solved(changes, grams, 1.0)
    # Row of D by row: all inputs one below the other, each task's own answers beside them.
    answers = torch.cat([x @ change.double().T for x, change in zip(inputs, changes, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(inputs), answers).solution.T
    assert torch.allclose(found, wanted, atol=1e-5)
    # Without the entries beside the diagonal it is a weighted mean of columns.
    weights = torch.stack([gram.diagonal() for gram in grams])[:, None, :]
    mean = (weights * changes.double()).sum(0) / weights.sum(0)
    assert torch.allclose(solved(changes, grams, 0.0), mean, atol=1e-5)


def test_tasks_with_disjoint_inputs_keep_their_outputs() -> None:
    changes = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    grams = [torch.diag(torch.tensor([4.0, 0.0])).double(), torch.diag(torch.tensor([0.0, 1.0]))]
    found = solved(changes, [gram.double() for gram in grams], 0.9)
    assert torch.allclose(found, torch.tensor([[1.0, 6.0], [3.0, 8.0]]).double(), atol=1e-4)
    # Inputs that no task ever has decide nothing.
    silent = [torch.zeros(2, 2).double()] * 2
    assert torch.allclose(solved(changes, silent, 0.9), changes.double().mean(0), atol=1e-6)


def test_regmean_streams_and_averages_tensors_without_a_layer(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    layer, other, norm = "layers.0.attn.weight", "layers.1.attn.weight", "layers.0.norm.weight"
    generator = torch.Generator().manual_seed(2)
    grams = []
    for _ in range(3):
        inputs = torch.randn(30, 8, generator=generator)
        grams.append(inputs.T @ inputs / 30)
    held = [{layer: packed(gram)} for gram in grams]
    members = given(tmp_path, whole_members(tmp_path, base, 3), GRAM, held)
    for order in (members, members[::-1]):
        edits = get_method("regmean")(base, order, scale=0.7)
        changes = torch.stack([dense(base, member, layer) for member in members])
        weighed = []
        for gram in grams:
            plain = 0.7 * gram.double() + 0.3 * torch.diag(gram.diagonal().double())
            weighed.append(plain + 1e-6 * plain.diagonal().mean() * torch.eye(8).double())
        inverse = np.linalg.inv(sum(np.asarray(gram) for gram in weighed))
        together = sum(np.asarray(c @ g) for c, g in zip(changes, weighed, strict=True))
        found = edited(base, edits, layer).double() - base.tensor(layer).double()
        np.testing.assert_allclose(found.numpy(), together @ inverse, atol=1e-5)
        for name in (other, norm):
            mean = torch.stack([dense(base, member, name) for member in members]).mean(0)
            wanted = base.tensor(name).double() + mean
            assert torch.allclose(edited(base, edits, name).double(), wanted, atol=1e-6)


def system(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Task vectors of a matrix, the Gram matrices of its inputs and gradients, and a start."""
    generator = torch.Generator().manual_seed(seed)

    def gram(size: int) -> Tensor:
        seen = torch.randn(9, size, generator=generator)
        return seen.T @ seen / 9

    changes = torch.randn(3, 4, 5, generator=generator)
    grams, gradients = (torch.stack([gram(size) for _ in range(3)]) for size in (5, 4))
    return changes, grams, gradients, torch.randn(4, 5, generator=generator)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_mats_solves_the_system_of_all_weights_at_once(seed: int, damping: float) -> None:
    changes, grams, gradients, start = system(seed)
    found = solved_by_mats(changes, grams, gradients * 1e6, start, damping, 200)
    # The same with one row and column for each weight, by an exact solver.
    matrix, answer, diagonal = np.zeros((20, 20)), np.zeros(20), np.zeros(20)
    for change, gram, gradient in zip(changes, grams, gradients, strict=True):
        of_one = np.kron(gradient.double() / gradient.diagonal().double().mean(), gram.double())
        matrix += of_one
        answer += of_one @ change.double().numpy().ravel()
        diagonal += np.diag(of_one)
    mu = damping * diagonal.mean()
    wanted = np.linalg.solve(matrix + mu * np.eye(20), answer + mu * start.double().numpy().ravel())
    np.testing.assert_allclose(found.numpy().ravel(), wanted, atol=1e-4)
    # Each step comes nearer, in the norm of the equations.
    errors = []
    for steps in (0, 1, 3, 10):
        gap = solved_by_mats(changes, grams, gradients, start, damping, steps).double().numpy()
        far = gap.ravel() - wanted
        errors.append(far @ (matrix + mu * np.eye(20)) @ far)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_mats_takes_each_member_where_only_its_predictions_need_it() -> None:
    changes = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    inputs = torch.eye(2).expand(2, 2, 2)
    # The first task depends on the first output alone, the second on the other.
    gradients = torch.stack(
        [torch.diag(torch.tensor([2.0, 0])), torch.diag(torch.tensor([0, 9.0]))]
    )
    found = solved_by_mats(changes, inputs, gradients, torch.zeros(2, 2), 1e-4, 20)
    assert torch.allclose(found, torch.tensor([[1.0, 2.0], [7.0, 8.0]]), atol=1e-3)
    # Where both count the same it is the mean; where nothing counts, the start.
    same = solved_by_mats(changes, inputs, inputs, torch.zeros(2, 2), 0.0, 20)
    assert torch.allclose(same, changes.mean(0), atol=1e-5)
    for silent in ((inputs * 0, gradients), (inputs, gradients * 0)):
        assert solved_by_mats(changes, *silent, changes[0], 0.1, 20).equal(changes[0])


def test_mats_streams_and_merges_by_tsv_m_where_statistics_are_missing(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    layer, other, norm = "layers.0.attn.weight", "layers.1.attn.weight", "layers.0.norm.weight"
    size = tuple(base.info(layer).shape)
    generator = torch.Generator().manual_seed(2)
    seen = [[torch.randn(30, n, generator=generator) for n in size[::-1]] for _ in range(3)]
    grams, gradients = (torch.stack([s[i].T @ s[i] / 30 for s in seen]) for i in range(2))
    members = whole_members(tmp_path, base, 3)
    members = given(tmp_path, members, GRAM, [{layer: packed(g), other: packed(g)} for g in grams])
    members = given(tmp_path, members, GRADIENT_GRAM, [{layer: packed(g)} for g in gradients])
    ordered = sorted(members, key=lambda member: member.task)
    for order in (members, members[::-1]):
        edits = get_method("mats")(base, order, damping=0.2, steps=4)
        changes = torch.stack([dense(base, member, layer).float() for member in ordered])
        start = merged_by_tsv_m(changes, min(size))
        places = [members.index(member) for member in ordered]
        change = solved_by_mats(changes, grams[places], gradients[places], start, 0.2, 4)
        found = edited(base, edits, layer).double() - base.tensor(layer).double()
        assert torch.allclose(found, change.double(), atol=1e-5)
        by_tsv_m = get_method("tsv-m")(base, order)
        for name in (other, norm):
            assert edited(base, edits, name).equal(edited(base, by_tsv_m, name))


def test_adamerging_is_the_sum_with_a_coefficient_per_task_and_tensor(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    generator = torch.Generator().manual_seed(3)
    learned = {n: torch.rand(3, generator=generator).double() for n in tiny.LOCALIZABLE}
    plain = sorted(whole_members(tmp_path, base, 3), key=lambda member: member.task)
    members = given(tmp_path, plain, COEFFICIENTS, [learned] * 3)
    for order in (members, members[::-1]):
        edits = get_method("adamerging")(base, order)
        for name in edits.names:
            change = sum(
                dense(base, member, name) * learned[name][number]
                for number, member in enumerate(members)
            )
            wanted = (base.tensor(name).double() + change).float()
            assert torch.equal(edited(base, edits, name), wanted)


def test_entropy_is_that_of_the_predictions() -> None:
    scores = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    assert float(entropy(scores)) == pytest.approx(np.log(2))
    assert float(entropy(torch.tensor([[100.0, 0.0, 0.0]]))) == pytest.approx(0, abs=1e-6)


def two_tasks(tmp_path: Path) -> tuple[Linear, list[KeptVector]]:
    model = Linear(tmp_path)
    base = model.vector.base
    mask = Mask.of({name: torch.arange(base.info(name).numel) for name in NAMES})
    vectors = []
    for seed in (1, 2):
        noise = torch.Generator().manual_seed(seed)
        values = {
            name: value + torch.randn(value.shape, generator=noise) * (name in NAMES)
            for name, value in model.base.items()
        }
        finetuned = tiny.save(tmp_path / f"f{seed}", values)
        delta = tiny.write_delta(tmp_path / f"{seed}.delta", finetuned, mask)
        vectors.append(KeptVector(base, delta))
    return model, vectors


@pytest.mark.parametrize("start", [0.3, 0.99])
def test_coefficients_are_learned_as_by_autograd_through_the_whole_merge(
    tmp_path: Path, start: float
) -> None:
    model, vectors = two_tasks(tmp_path)
    settings = CoefficientSettings(steps=8, learning_rate=0.02, start=start, batch=24, seed=5)
    found = learn_coefficients(
        model.live,
        model.vector.base,
        vectors,
        [24, 24],
        lambda task, rows: model.logits_at(model.live, [r % 24 for r in rows]) / (task + 1),
        settings,
    )
    raw = torch.full((2, 2), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=0.02)
    for _ in range(8):
        coefficients = raw.clamp(0, 1)
        weights = {"bias": model.base["bias"]}
        for place, name in enumerate(sorted(NAMES)):
            change = sum(
                coefficients[place, t] * vector.difference(name) for t, vector in enumerate(vectors)
            )
            weights[name] = model.base[name] + change
        scores = model.logits_at(weights, range(24))
        adam.zero_grad()
        torch.autograd.backward(entropy(scores) + entropy(scores / 2))
        adam.step()
    wanted = raw.detach().clamp(0, 1)
    for place, name in enumerate(sorted(NAMES)):
        assert torch.allclose(found[name], wanted[place], atol=1e-5)
        assert not torch.equal(wanted[place], torch.full((2,), start).double())


def test_without_steps_coefficients_keep_their_start_value(tmp_path: Path) -> None:
    model, vectors = two_tasks(tmp_path)
    settings = CoefficientSettings(steps=0, learning_rate=1e-3, start=0.3, batch=4)
    arguments = (model.live, model.vector.base, vectors)
    found = learn_coefficients(*arguments, [3, 3], lambda *_: torch.zeros(1, 2), settings)
    assert set(found) == set(NAMES)
    assert all(value.tolist() == [0.3, 0.3] for value in found.values())
    with pytest.raises(BadInput, match="no rows"):
        learn_coefficients(*arguments, [3, 0], lambda *_: torch.zeros(1, 2), settings)


def test_each_pass_sees_every_row_of_a_task_once(tmp_path: Path) -> None:
    model, vectors = two_tasks(tmp_path)
    seen: dict[int, list[int]] = {0: [], 1: []}

    def logits(task: int, rows: Sequence[int]) -> Tensor:
        seen[task] += rows
        return model.logits_at(model.live, rows)

    settings = CoefficientSettings(steps=4, learning_rate=1e-3, start=0.3, batch=3)
    learn_coefficients(model.live, model.vector.base, vectors, [6, 2], logits, settings)
    assert sorted(seen[0][:6]) == sorted(seen[0][6:]) == list(range(6))
    assert len(seen[1]) == 8


@pytest.mark.parametrize("name", NEEDING)
def test_no_members_give_the_base_and_missing_statistics_are_refused(
    tmp_path: Path, name: str
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    assert get_method(name)(base, ()).names == ()
    members = whole_members(tmp_path, base, 2)
    with pytest.raises(BadInput, match="none for y, z"):
        get_method(name)(base, members)
    empty = members
    for kind in get_method(name).needs:
        empty = given(tmp_path, empty, kind, [{}] * 2, [{"mean": "1.0"}] * 2)
    if name not in ("regmean", "mats"):  # which need none where there is no layer
        with pytest.raises(Damage, match="do not fit the member"):
            get_method(name)(base, empty)
