import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.errors import CannotJoin
from restitch.merging.files.comparison import WRAPPERS, compare
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


LAYERS = tuple(f"encoder.layer.{at}.{part}" for at in range(3) for part in ("a.weight", "b.bias"))


def deep(prefix: str = "") -> dict[str, torch.Tensor]:
    names = (*LAYERS, "embeddings.word.weight", "pooler.weight")
    return {prefix + name: torch.zeros(2) for name in names}


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "base_model.model.", "_forward_module.", "model.", "backbone.net."],
)
@pytest.mark.parametrize("ours", ["", "bert."])
def test_any_one_common_prefix_is_taken_off(tmp_path: Path, prefix: str, ours: str) -> None:
    base = tiny.save(tmp_path / "b", deep(ours))
    tuned = tiny.save(tmp_path / "f", deep(prefix + ours))
    required = [ours + name for name in LAYERS]
    found = compare(base, tuned, required, ["bert."])
    assert found.mapping == {prefix + name: name for name in base.names}
    assert found.renamed is not None
    assert found.problems() == []
    assert not found.unexpected


prefixes = st.lists(st.sampled_from([*WRAPPERS, "model", "base_model", "net", "bert"]), max_size=4)


@given(prefix=prefixes, inner=st.sampled_from(["", *WRAPPERS]), head=st.booleans())
def test_nested_wrappers_and_those_inside_of_names_are_taken_off(
    prefix: list[str], inner: str, head: bool
) -> None:
    """As torch.compile and FSDP write them, whole or for single layers."""
    start = "".join(f"{part}." for part in prefix)
    wrapped = {}
    for name, value in deep().items():
        if inner and name.startswith("encoder.layer.1."):
            new = name.replace("layer.1.", f"layer.1.{inner}.")
        else:
            new = name
        wrapped[start + new] = (value, name)
    tensors = {name: value for name, (value, _) in wrapped.items()}
    if head:
        tensors["classifier.weight"] = torch.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.save(Path(folder) / "b", deep())
        found = compare(base, tiny.save(Path(folder) / "f", tensors), LAYERS, ["bert."])
    assert found.mapping == {name: plain for name, (_, plain) in wrapped.items()}
    assert found.unexpected == (("classifier.weight",) if head else ())


def test_a_base_may_have_a_prefix_that_the_finetuned_names_lack(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", deep("tower.text."))
    found = compare(
        base, tiny.save(tmp_path / "f", deep()), [f"tower.text.{name}" for name in LAYERS]
    )
    assert found.mapping == {name: f"tower.text.{name}" for name in deep()}


def test_a_second_copy_under_any_prefix_is_ambiguous_and_both_are_shown(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", deep())
    for one, other in (("", "ema."), ("student.", "teacher.")):
        tuned = tiny.save(tmp_path / (one + other), {**deep(one), **deep(other)})
        with pytest.raises(CannotJoin, match="more than one way") as caught:
            compare(base, tuned, LAYERS)
        for prefix in (one, other):
            assert f"{prefix}{LAYERS[0]} as {LAYERS[0]}" in caught.value.message()


def test_a_copy_in_a_wrapper_is_two_tensors_for_one(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", deep())
    tuned = tiny.save(tmp_path / "f", {**deep(), **deep("module.")})
    with pytest.raises(CannotJoin, match="two finetuned tensors match"):
        compare(base, tuned, LAYERS)


def test_the_other_tower_is_never_taken_for_this_one(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", {**deep("vision."), **deep("text.")})
    required = [f"vision.{name}" for name in LAYERS]
    for prefix in ("text.", "clip.text.", "module.text."):
        tuned = tiny.save(tmp_path / prefix, deep(prefix))
        found = compare(base, tuned, required, ["vision.", "clip."])
        assert set(found.missing_required) == set(required), prefix


def test_a_wrapper_s_word_that_the_base_has_too_stays(tmp_path: Path) -> None:
    tensors = {"block.0.module.weight": torch.zeros(2), "block.1.module.weight": torch.zeros(2)}
    base = tiny.save(tmp_path / "b", tensors)
    found = compare(base, tiny.save(tmp_path / "f", tensors), tuple(tensors))
    assert found.renamed is None
    assert found.problems() == []


def test_unexpected_weights_in_a_localizable_layer_are_a_problem(tmp_path: Path) -> None:
    extra = {
        "encoder.layer.0.adapter.down.weight": torch.zeros(2, 3),
        "encoder.layer.3.a.weight": torch.zeros(2),
        "encoder.layer.0.rotary.inv_freq": torch.zeros(2),
        "encoder.layer.0.position_ids": torch.arange(2),
        "classifier.layer.0.weight": torch.zeros(2),
        "pooler.extra": torch.zeros(2),
    }
    base = tiny.save(tmp_path / "b", deep())
    for prefix in ("", "module."):
        more = {f"{prefix}{name}": value for name, value in extra.items()}
        tuned = tiny.save(tmp_path / f"f{prefix}", {**deep(prefix), **more})
        found = compare(base, tuned, LAYERS)
        assert found.unexpected == tuple(sorted(prefix + name for name in extra))
        assert found.problems() == [
            "unexpected in a localizable layer: "
            f"{prefix}encoder.layer.0.adapter.down.weight: F32 [2, 3]",
            f"unexpected in a localizable layer: {prefix}encoder.layer.3.a.weight: F32 [2]",
        ]


def test_excluded_tensors_are_not_localizable(tmp_path: Path) -> None:
    tuned = tiny.save(tmp_path / "f", {**deep(), "encoder.layer.0.norm.weight": torch.zeros(2)})
    base = tiny.save(tmp_path / "b", deep())
    assert compare(base, tuned, LAYERS).problems()
    assert not compare(base, tuned, LAYERS, (), lambda name: "norm" not in name).problems()


def test_missing_and_unexpected_names_alternate(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", deep())
    renamed = {name.replace("layer.", "block."): value for name, value in deep().items()}
    renamed |= {f"encoder.layer.{at}.new": torch.zeros(2) for at in range(3)}
    found = compare(base, tiny.save(tmp_path / "f", renamed), LAYERS).problems()
    kinds = [line.partition(" ")[0] for line in found]
    assert kinds[:4] == ["missing:", "unexpected", "missing:", "unexpected"]


def test_a_transposed_matrix_is_called_so(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "b", {**deep(), "encoder.layer.0.m": torch.zeros(2, 3)})
    tuned = tiny.save(tmp_path / "f", {**deep(), "encoder.layer.0.m": torch.zeros(3, 2)})
    (problem,) = compare(base, tuned, LAYERS).problems()
    assert problem.endswith("finetuned [3, 2] (transposed)")
