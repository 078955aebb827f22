"""The live weights of a model: which of them require gradients."""

import torch

from restitch.merging.localize.live_weights import requiring_gradients


def test_exactly_the_named_tensors_require_gradients_within_the_block() -> None:
    live = {name: torch.zeros(2) for name in "abc"}
    live["c"].requires_grad_(True)
    with requiring_gradients(live, ["a"]) as drop:
        assert [live[name].requires_grad for name in "abc"] == [True, False, False]
        torch.autograd.backward(live["a"].sum())
        assert "1." in str(live["a"].grad)
        drop()
        assert str(live["a"].grad) == "None"
    assert [live[name].requires_grad for name in "abc"] == [False, False, True]
