"""Weights are set by copying, in the checkpoint's own values, and leave no trace."""

import pytest
import torch
from safetensors.torch import save_file

from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.weights import apply_edits, restore, set_weights
from tests.modeling.weights import load_checkpoint


def test_values_are_copied_into_the_live_tensor_and_converted():
    live = torch.nn.Parameter(torch.zeros(3))
    value = torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16)
    set_weights({"w": live}, [("w", value)])
    assert live.tolist() == [1.5, -2.25, 3.0]
    assert live.dtype == torch.float32
    assert live.requires_grad


def test_another_shape_or_name_is_an_error_and_never_broadcast():
    live = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"w has shape \(3,\), not \(1,\)"):
        set_weights(live, [("w", torch.ones(1))])
    with pytest.raises(KeyError):
        set_weights(live, [("v", torch.ones(3))])
    assert live["w"].tolist() == [0, 0, 0]


def test_edits_are_applied_in_the_base_s_own_type_before_conversion(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    base = Checkpoint.open(tmp_path)
    live = {"w": torch.zeros(2)}

    class Edits:
        names = ("w",)

        def apply(self, name, flat):
            assert flat.dtype == torch.bfloat16
            flat[1] = 1.001  # no bfloat16 number: what is stored is 1

    apply_edits(live, base, Edits())
    assert live["w"].tolist() == [1.0, 1.0]
    assert base.tensor("w").tolist() == [1.0, 1.0]


def test_a_checkpoint_of_a_part_sets_that_part_and_integers_stay(tmp_path):
    save_file({"a": torch.ones(2), "ids": torch.arange(2)}, tmp_path / "model.safetensors")
    live = {"a": torch.zeros(2), "b": torch.full((2,), 7.0), "ids": torch.tensor([5, 6])}
    load_checkpoint(live, Checkpoint.open(tmp_path))
    assert live["a"].tolist() == [1, 1]
    assert live["b"].tolist() == [7, 7]
    assert live["ids"].tolist() == [5, 6]


def test_setting_and_restoring_many_times_does_not_drift(tmp_path):
    value = torch.randn(100, generator=torch.Generator().manual_seed(0))
    save_file({"w": value}, tmp_path / "model.safetensors")
    base = Checkpoint.open(tmp_path)
    live = {"w": value.clone()}
    for step in range(20):
        set_weights(live, [("w", value * 1e8 + step)])
        restore(live, base, ["w"])
    assert torch.equal(live["w"], value)
