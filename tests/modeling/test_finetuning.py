"""Finetuning: what is named learns, the rest stays, and the same seed gives the same weights."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from restitch.merging.errors import BadInput
from restitch.modeling.finetuning import FinetuningSettings, finetune

QUICK = FinetuningSettings(learning_rate=0.05, epochs=5, batch_size=4)


class Classes:
    """Two linear classes, and a model of two tensors that tells them."""

    def __init__(self, rows: int = 40) -> None:
        draw = torch.Generator().manual_seed(1)
        self.inputs = torch.randn((rows, 3), generator=draw)
        self.targets = (self.inputs[:, 0] > 0).long()
        self.live = {"w": torch.nn.Parameter(torch.zeros((2, 3))), "b": torch.zeros(2)}
        self.seen: list[list[int]] = []

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.seen.append(list(rows))
        return self.inputs[rows], self.targets[rows]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(inputs @ self.live["w"].T + self.live["b"], targets)

    def learn(self, settings: FinetuningSettings, lengths: Sequence[int] | None = None) -> Tensor:
        given = np.asarray(lengths or [0] * len(self.inputs), dtype=np.int64)
        self.losses = finetune(self.live, ["w"], given, self.batch, self.loss, settings)
        return self.live["w"].detach().clone()


def test_only_the_named_tensors_are_trained() -> None:
    classes = Classes()
    classes.live["b"].requires_grad_(True)
    weights = classes.learn(QUICK)
    found = (classes.inputs @ weights.T).argmax(1)
    assert float((found == classes.targets).float().mean()) > 0.9
    assert classes.losses == sorted(classes.losses, reverse=True)
    assert classes.live["b"].tolist() == [0, 0]
    assert [tensor.grad for tensor in classes.live.values()] == [None, None]
    assert all(tensor.requires_grad for tensor in classes.live.values()), "as it was before"


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_weights() -> None:
    one, same, other = (
        Classes().learn(FinetuningSettings(learning_rate=0.05, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_each_pass_sees_every_row_once_and_rows_of_like_length_together() -> None:
    classes = Classes(rows=200)
    lengths = [7 * row % 200 for row in range(200)]
    classes.learn(FinetuningSettings(learning_rate=0.01, epochs=2, batch_size=4), lengths)
    first, second = classes.seen[:50], classes.seen[50:]
    for batches in (first, second):
        assert sorted(row for rows in batches for row in rows) == list(range(200))
        spans = [np.ptp([lengths[row] for row in rows]) for rows in batches]
        assert np.mean(spans) < 40, "of four random rows it is 120"
    assert not {tuple(rows) for rows in first} & {tuple(rows) for rows in second}


def test_steps_grow_at_first_and_shrink_to_the_end() -> None:
    live = {"w": torch.nn.Parameter(torch.zeros(1))}
    places = []

    def loss(_: Sequence[int]) -> Tensor:
        places.append(float(live["w"].detach()))
        return -live["w"].sum()  # with the same gradient always, AdamW steps by the learning rate

    settings = FinetuningSettings(
        learning_rate=1.0, epochs=2, batch_size=1, rise=0.2, weight_decay=0.0
    )
    finetune(live, ["w"], np.zeros(10, dtype=np.int64), list, loss, settings)
    steps = np.diff([*places, float(live["w"].detach())])
    assert steps == pytest.approx(
        [*(0.25, 0.5, 0.75, 1.0), *(share / 16 for share in range(16, 0, -1))], rel=1e-5
    )


def test_no_rows_or_a_nan_loss_is_an_error() -> None:
    with pytest.raises(BadInput, match="no rows"):
        Classes(rows=0).learn(QUICK)
    classes = Classes()
    classes.inputs[3] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        classes.learn(QUICK)
    assert classes.live["w"].grad is None


def test_default_settings_depend_on_the_modality() -> None:
    assert FinetuningSettings.of("text", seed=3).to_json()["seed"] == 3
    text, image = (FinetuningSettings.of(kind).learning_rate for kind in ("text", "image"))
    assert text > image
