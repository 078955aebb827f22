from pathlib import Path

import pytest
import torch

from restitch.merging.errors import CannotJoin
from restitch.merging.files.comparison import compare
from tests import tiny

REQUIRED = ("encoder.a", "encoder.b")


def tensors(prefix: str = "", **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = {"encoder.a": torch.zeros(2), "encoder.b": torch.zeros(3), "embed": torch.zeros(4)}
    return {prefix + name: value for name, value in {**plain, **changes}.items()}


@pytest.mark.parametrize(("ours", "theirs"), [("", ""), ("bert.", ""), ("", "bert.")])
def test_names_match_up_to_one_prefix_on_either_side(
    tmp_path: Path, ours: str, theirs: str
) -> None:
    base = tiny.save(tmp_path / "b", tensors(ours))
    finetuned = tiny.save(tmp_path / "f", tensors(theirs))
    found = compare(base, finetuned, [ours + name for name in REQUIRED], ["roberta.", "bert."])
    assert found.mapping == {theirs + name: ours + name for name in tensors()}
    assert found.problems() == []
    assert not found.missing
    assert not found.unexpected


def test_a_subset_is_fine_while_the_required_tensors_are_there(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tensors())
    finetuned = tiny.save(
        tmp_path / "f", {n: torch.zeros(s) for n, s in zip(REQUIRED, (2, 3), strict=True)}
    )
    found = compare(base, finetuned, REQUIRED)
    assert found.missing == ("embed",)
    assert found.problems() == []


def test_everything_that_differs_is_listed_at_once(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", {**tensors(), "c": torch.zeros(1), "d": torch.zeros(1)})
    other = {
        "encoder.b": torch.zeros(4),
        "embed": torch.zeros(4, dtype=torch.int64),
        "c": torch.zeros(1).half(),
        "head": torch.zeros(1),
    }
    found = compare(base, tiny.save(tmp_path / "f", other), REQUIRED)
    assert found.missing == ("d", "encoder.a")
    assert found.unexpected == ("head",)
    assert found.other_shape == ("encoder.b: base [3], finetuned [4]",)
    assert found.other_dtype == (
        "c: base F32, finetuned F16",
        "embed: base F32, finetuned I64",
    )
    assert found.problems() == [
        "missing: encoder.a",
        "shape differs: encoder.b: base [3], finetuned [4]",
        "kind of numbers differs: embed: base F32, finetuned I64",
    ]


def test_other_float_types_are_no_problem(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tensors())
    finetuned = tiny.save(tmp_path / "f", {n: v.bfloat16() for n, v in tensors().items()})
    found = compare(base, finetuned, REQUIRED)
    assert len(found.other_dtype) == 3
    assert found.problems() == []


def test_two_ways_to_match_are_an_error(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tensors())
    finetuned = tiny.save(tmp_path / "f", {**tensors(), **tensors("bert.")})
    with pytest.raises(CannotJoin, match="more than one way"):
        compare(base, finetuned, REQUIRED, ["bert."])


def test_two_towers_that_match_equally_are_an_error(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", {**tensors("text."), **tensors("vision.")})
    finetuned = tiny.save(tmp_path / "f", tensors())
    required = [name for name in base.names if "encoder" in name]
    with pytest.raises(CannotJoin, match="more than one way"):
        compare(base, finetuned, required, ["text.", "vision."])
    vision = [name for name in required if name.startswith("vision.")]
    found = compare(base, finetuned, vision, ["text.", "vision."])
    assert found.mapping["encoder.a"] == "vision.encoder.a"


def test_another_architecture_lacks_every_required_tensor(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", tensors())
    finetuned = tiny.save(tmp_path / "f", {"conv.weight": torch.zeros(1)})
    found = compare(base, finetuned, REQUIRED, ["bert."])
    assert found.problems() == ["missing: encoder.a", "missing: encoder.b"]
    assert found.unexpected == ("conv.weight",)
