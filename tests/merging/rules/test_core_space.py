"""Methods on factors: equal to the same methods on the whole task vectors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, edited
from restitch.merging.files.factor_file import FactorFile, FactorTensor, write_factors
from restitch.merging.files.mask import Mask
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.factors import Factors
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import Matrix, PerMatrix
from restitch.merging.rules.stitch import DeltaMember
from restitch.merging.statistics.grams import packed
from restitch.merging.statistics.statistic_file import GRAM
from tests import tiny
from tests.merging.methods.test_statistic_methods import given as given_statistic
from tests.merging.methods.test_statistic_methods import means

SHAPES = {"v": (9,), "w": (12, 9)}


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    generator = torch.Generator().manual_seed(7)
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    return tiny.save(folder / "base", tensors)


def factored(folder: Path, task: str, rank: int, seed: int, scale: float = 1.0) -> DeltaMember:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(12, rank, generator=generator) * 0.1
    right = torch.randn(rank, 9, generator=generator)
    vector = torch.randn(9, generator=generator) * 0.1
    tensors = [
        FactorTensor("v", (9,), vector, torch.float32),
        FactorTensor("w", (12, 9), Factors(left, right, scale), torch.float32),
    ]
    write_factors(folder / f"{task}.factors", tensors, metadata={})
    return DeltaMember(task, FactorFile.open(folder / f"{task}.factors"))


def whole(folder: Path, base: Checkpoint, member: DeltaMember) -> DeltaMember:
    """The member as a delta of its weights."""
    assert isinstance(member.delta, FactorFile)
    tensors = {name: edited(base, member.delta, name) for name in base.names}
    finetuned = tiny.save(folder / f"{member.task}-whole", tensors)
    mask = Mask.of({name: torch.arange(base.info(name).numel) for name in base.names})
    return DeltaMember(
        member.task, tiny.write_delta(folder / f"{member.task}.delta", finetuned, mask)
    )


def differences(base: Checkpoint, one: Edits, other: Edits) -> float:
    worst = 0.0
    for name in base.names:
        first, second = (edited(base, edits, name).double() for edits in (one, other))
        change = (second - base.tensor(name).double()).norm()
        worst = max(worst, float((first - second).norm() / change))
    return worst


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("tsv-m", {}),
        ("tsv-m", {"rank": 0.2}),
        ("dc-merge", {"density": 0.1}),
        ("iso-c", {}),
        ("averaging", {}),
        ("task-arithmetic", {}),
    ],
)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_methods_on_factors_equal_those_on_whole_task_vectors(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    choice: dict[str, float],
    ranks: list[int],
    seed: int,
) -> None:
    # Also with more directions than the matrix has rank: there is no smaller core space then.
    folder = tmp_path_factory.mktemp("core")
    base = base_of(folder)
    members = [factored(folder, f"t{i}", rank, seed + i, 0.5 + i) for i, rank in enumerate(ranks)]
    dense = [whole(folder, base, member) for member in members]
    method = get_method(name)
    one, other = method(base, members, **choice), method(base, dense, **choice)
    assert differences(base, one, other) < 1e-4


@pytest.mark.parametrize("name", ["regmean", "fisher-merging"])
def test_methods_with_statistics_equal_those_on_whole_task_vectors(
    tmp_path: Path, name: str
) -> None:
    base = base_of(tmp_path)
    members = [factored(tmp_path, f"t{i}", 2, i) for i in range(3)]
    whole_ones = [whole(tmp_path, base, member) for member in members]
    method, kind = get_method(name), get_method(name).needs[0]
    generator = torch.Generator().manual_seed(1)
    if kind == GRAM:
        inputs = [torch.randn(20, 9, generator=generator) for _ in members]
        values = [{"w": packed(one.T @ one / 20)} for one in inputs]
    else:
        values = [
            {n: torch.rand(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
            for _ in members
        ]
    facts = means(values)
    one = method(base, given_statistic(tmp_path / "f", members, kind, values, facts))
    other = method(base, given_statistic(tmp_path / "w", whole_ones, kind, values, facts))
    assert differences(base, one, other) < 1e-4


# After iso-c the directions are read from a hundredth of the sum, with its rounding.
@pytest.mark.parametrize(("after", "most"), [("tsv-m", 1e-4), ("iso-c", 2e-3)])
def test_singular_value_calibration_equals_that_of_whole_task_vectors(
    tmp_path: Path, after: str, most: float
) -> None:
    base = base_of(tmp_path)
    members = [factored(tmp_path, f"t{i}", 2, i) for i in range(3)]
    dense = [whole(tmp_path, base, member) for member in members]
    one, other = (get_method("svc")(base, given, after=after) for given in (members, dense))
    assert differences(base, one, other) < most


def test_a_rule_sees_small_matrices_and_the_rank_of_the_tensor(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    members = [factored(tmp_path, f"t{i}", 2, i, 3.0) for i in range(3)]
    seen: list[Matrix] = []

    def rule(matrix: Matrix) -> torch.Tensor:
        seen.append(matrix)
        return matrix.changes.sum(0)

    edits = PerMatrix(MergeInputs(base, members), rule)
    after = edited(base, edits, "w")
    (matrix,) = seen
    assert tuple(matrix.changes.shape) == (3, 6, 6)
    assert matrix.rank == 9
    total = sum(m.delta.difference("w") for m in members if isinstance(m.delta, FactorFile))
    assert torch.allclose(after, base.tensor("w") + total, atol=1e-5)
    assert matrix.core is not None
    change = matrix.core.left @ matrix.changes[0] @ matrix.core.right
    assert torch.allclose(matrix.projected(change), matrix.changes[0], atol=1e-5)


def test_a_mix_of_factors_and_whole_task_vectors_is_merged(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    members = [factored(tmp_path, f"t{i}", 2, i) for i in range(3)]
    dense = [whole(tmp_path, base, member) for member in members]
    method = get_method("tsv-m")
    mixed = method(base, [members[0], dense[1], members[2]])
    assert differences(base, mixed, method(base, dense)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["averaging", "task-arithmetic", "ties", "consensus-ta"])
def test_elementwise_methods_give_the_bytes_of_whole_task_vectors(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    base = base_of(tmp_path, dtype)
    members = [factored(tmp_path, f"t{i}", 2, i) for i in range(3)]
    dense = [whole(tmp_path, base, member) for member in members]
    one, other = (get_method(name)(base, given) for given in (members, dense))
    for tensor in base.names:
        found, wanted = (edited(base, edits, tensor) for edits in (one, other))
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_a_zero_member_does_not_bend_the_others(tmp_path: Path) -> None:
    """Singular vectors of the value 0 are arbitrary."""
    base = base_of(tmp_path)
    member = factored(tmp_path, "a", 2, 1)
    zero = whole(tmp_path, base, factored(tmp_path, "z", 1, 2, 0.0))
    tsv = get_method("tsv-m")
    alone, both = tsv(base, [member]), tsv(base, [whole(tmp_path, base, member), zero])
    assert torch.allclose(edited(base, both, "w"), edited(base, alone, "w"), atol=1e-5)


@pytest.mark.parametrize("in_core", [True, False])
def test_a_model_that_comes_twice_counts_once(tmp_path: Path, in_core: bool) -> None:
    base = base_of(tmp_path)
    members = [factored(tmp_path, task, 2, "ab".index(task[0])) for task in ("a", "a2", "b", "b2")]
    if not in_core:
        members = [whole(tmp_path, base, member) for member in members]
    tsv = get_method("tsv-m")
    for twice, once in ((members[:2], members[:1]), (members, members[::2])):
        found, wanted = (edited(base, tsv(base, given), "w") for given in (twice, once))
        assert torch.allclose(found, wanted, atol=1e-5)


def test_methods_that_stitch_masks_refuse_a_subspace(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    with pytest.raises(BadInput, match="t keeps no mask, and masks are needed"):
        get_method("localize-and-stitch")(base, [factored(tmp_path, "t", 2, 1)])
