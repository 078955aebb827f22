from pathlib import Path

import pytest
import torch

from restitch.merging.errors import CannotJoin
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.ranking.task_vector import TaskVector, check_finite, outside_share
from tests import tiny


def pair(
    tmp_path: Path, base: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> tuple[Checkpoint, Checkpoint]:
    return tiny.save(tmp_path / "b", base), tiny.save(tmp_path / "f", other)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_the_difference_after_upcasting(
    tmp_path: Path, base_dtype: torch.dtype, other_dtype: torch.dtype
) -> None:
    b, f = torch.randn(10, 7).to(base_dtype), torch.randn(10, 7).to(other_dtype)
    vector = TaskVector(*pair(tmp_path, {"w": b}, {"w": f}), ["w"])
    wide = torch.float64 if other_dtype == torch.float64 else torch.float32
    expected = (f.to(wide) - b.to(wide)).abs().view(-1)
    scores = torch.cat([chunk.clone() for chunk in vector.chunks("w", size=16)])
    assert scores.dtype == wide == vector.score_dtype
    assert torch.equal(scores, expected)
    rest = torch.cat([chunk.clone() for chunk in vector.chunks("w", 33, size=16)])
    assert torch.equal(rest, expected[33:])
    assert torch.equal(vector.difference("w"), f.to(wide) - b.to(wide))
    rows = expected[:70].view(7, 10)[:, :3].reshape(-1)
    assert torch.equal(vector.sample("w", 10, 3), rows)


def test_an_identical_model_is_zero(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    base, same = pair(tmp_path, tensors, tensors)
    assert TaskVector(base, same, tiny.LOCALIZABLE).is_zero()
    assert outside_share(base, same, tiny.LOCALIZABLE).share == 0
    other = tiny.save(tmp_path / "o", tiny.finetuned_tensors(tensors, 0))
    assert not TaskVector(base, other, tiny.LOCALIZABLE).is_zero()


def test_every_tensor_with_nan_or_infinity_is_named(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    bad = {name: value.clone() for name, value in tensors.items()}
    bad["embed.weight"][3, 3] = torch.nan
    bad["layers.0.norm.weight"][:2] = torch.inf
    _, finetuned = pair(tmp_path, tensors, bad)
    with pytest.raises(CannotJoin) as caught:
        check_finite(finetuned)
    assert caught.value.details == ("embed.weight: 1 of 88", "layers.0.norm.weight: 2 of 8")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_infinity_and_nan_of_each_sign_are_found(tmp_path: Path, dtype: torch.dtype) -> None:
    most, minus = torch.finfo(dtype).max, torch.tensor(-1, dtype=dtype)
    ends = torch.tensor([most, -most, 0.0, -0.0], dtype=dtype)
    tensors = {"finite": ends}
    for name, value in (("infinity", torch.inf), ("nan", torch.nan)):
        bad = torch.tensor([value], dtype=dtype)
        tensors |= {
            name: torch.cat([ends, bad]),
            f"-{name}": torch.cat([bad.copysign(minus), ends]),
        }
    _, finetuned = pair(tmp_path, tensors, tensors)
    with pytest.raises(CannotJoin) as caught:
        check_finite(finetuned)
    found = [detail.partition(":")[0] for detail in caught.value.details]
    assert found == ["-infinity", "-nan", "infinity", "nan"]


def test_large_finite_weights_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    large = {"w": torch.full((100,), 3e38)}
    check_finite(pair(tmp_path, large, large)[1])


def test_tensors_that_cannot_be_subtracted_are_refused(tmp_path: Path) -> None:
    base, other = pair(tmp_path, {"w": torch.zeros(2)}, {"w": torch.zeros(3)})
    with pytest.raises(CannotJoin, match="w cannot"):
        TaskVector(base, other, ["w"])
    base, other = pair(tmp_path / "i", {"w": torch.arange(2)}, {"w": torch.arange(2)})
    with pytest.raises(CannotJoin, match="w cannot"):
        TaskVector(base, other, ["w"])


def test_outside_share_is_the_squared_norm_outside(tmp_path: Path) -> None:
    zeros = {name: torch.zeros(4) for name in ("in", "out.a", "out.b", "same")}
    moved = {
        "in": torch.tensor([2.0, 0, 0, 0]),
        "out.a": torch.tensor([0, 1.0, 0, 0]),
        "out.b": torch.tensor([0, 1.0, 1.0, 1.0]),
        "same": torch.zeros(4),
    }
    found = outside_share(*pair(tmp_path, zeros, moved), ["in"])
    assert found.share == pytest.approx(4 / 8)
    assert found.tensors == (("out.b", 3 / 8), ("out.a", 1 / 8))


def test_without_a_change_outside_the_inside_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = {name: torch.zeros(4) for name in ("in", "out")}
    base, moved = pair(tmp_path, zeros, {**zeros, "in": torch.ones(4)})
    read: list[str] = []
    tensor = Checkpoint.tensor

    def watched(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return tensor(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    assert outside_share(base, moved, ["in"]).share == 0
    assert set(read) == {"out"}
