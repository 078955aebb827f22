"""The tests that every family must pass: inherit `FamilyContract` and give it four fixtures.

A package with a family of its own copies this file: it imports only restitch, pytest and torch.
See docs/how-to/add-a-family.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import compare
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.statistics.grams import Run, gram_forms, measure_grams
from restitch.modeling.data.rows import Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import (
    Family,
    loads_in_any_type,
    loads_without_weights,
)
from restitch.modeling.gradients import repeated_layers
from restitch.modeling.heads import Head
from restitch.modeling.part_by_part import PartByPart
from restitch.modeling.row_values import Bits
from restitch.modeling.spread import Room, spread
from restitch.modeling.weights import apply_edits, linear_layers, restore, set_weights
from restitch.registry.specs.head import HeadSpec


def grams_of(layers: Mapping[str, Any], rows: int, run: Run) -> dict[str, torch.Tensor]:
    """The Gram matrices of the layers that rows go through, in memory."""
    grams = {name: torch.zeros(shape) for name, (_, shape) in gram_forms(layers).items()}
    return {name: grams[name] for name in measure_grams(layers, rows, run, grams)}


class FamilyContract:
    """Subclasses give `family`, `base`, `finetuned` and `values`: the raw inputs of six rows."""

    spec = HeadSpec(labels=("no", "yes", "maybe"))
    prompt: Prompt | None = None

    @pytest.fixture
    def family(self) -> Family:
        raise NotImplementedError

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def finetuned(self, tmp_path: Path, base: Path) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def values(self) -> list[Any]:
        raise NotImplementedError

    @pytest.fixture
    def rows(self, family, values) -> Rows:
        table = ListTable("rows", Path(), {"x": values, "y": [0, 1, 2] * (len(values) // 3)})
        return Rows(table, ("x",), "y", self.spec.classes, family.modality, prompt=self.prompt)

    @pytest.fixture
    def batch(self, family, base, rows):
        return family.preprocessor(base)([rows[i] for i in range(len(rows))])

    @pytest.fixture
    def model(self, family, base):
        return family.load(base)

    @pytest.fixture
    def head(self, family, base, finetuned, model):
        return family.build_head(model, base, self.spec, finetuned=finetuned)

    @pytest.fixture
    def localizable(self, family, base) -> list[str]:
        file = Checkpoint.open(base)
        heads = () if family.task_heads is None else family.task_heads.tensors(base, file.names)
        names = [name for name in file.floating if name not in heads]
        return select_tensors(names, family.localizable)

    def test_it_has_the_whole_interface(self, family):
        assert isinstance(family, Family)
        assert family.modality in ("text", "image")
        assert family.version >= 1
        assert family.summary

    def test_its_base_lacks_nothing(self, family, base):
        assert family.lacks(base) is None

    def test_a_model_loads_in_float32_for_evaluation_without_gradients(self, model):
        assert not model.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())

    def test_in_bfloat16_scores_and_losses_stay_float32_and_are_nearly_the_same(
        self, family, base, finetuned, model, batch, head
    ):
        if not loads_in_any_type(family):
            pytest.skip("the family's load has no argument dtype: it is used in float32 only")
        half = family.load(base, torch.bfloat16)
        assert not half.training
        assert all(p.dtype == torch.bfloat16 for p in half.parameters())
        own = family.build_head(half, base, self.spec, finetuned=finetuned)
        for name in head.tensors:
            assert torch.allclose(own.tensors[name], head.tensors[name], atol=0.05)
        expected = family.logits(model, batch, head)
        scores = family.logits(half, batch, own)
        assert scores.dtype == family.loss(half, batch, own).dtype == torch.float32
        spread = expected.max() - expected.min()
        assert (scores - expected).abs().max() <= 0.1 * max(spread, expected.abs().max())

    def test_every_localizable_tensor_of_the_file_is_live_with_its_values(
        self, family, model, base, localizable
    ):
        live, file = family.parameters(model), Checkpoint.open(base)
        assert set(localizable) <= set(live)
        assert set(live) <= set(file.names)
        for name in live:
            assert torch.equal(live[name].to(file.tensor(name).dtype), file.tensor(name)), name

    def test_changing_a_live_tensor_changes_the_scores(
        self, family, model, batch, head, localizable
    ):
        before = family.logits(model, batch, head)
        with torch.no_grad():
            family.parameters(model)[localizable[0]].add_(1.0)
        assert not torch.equal(family.logits(model, batch, head), before)

    def test_every_matrix_of_the_blocks_is_a_linear_layer_whose_inputs_are_seen(
        self, family, model, base, batch, head, localizable
    ):
        layers, file = linear_layers(model, family.parameters(model)), Checkpoint.open(base)
        matrices = {name for name in localizable if len(file.info(name).shape) == 2}
        assert matrices <= set(layers)
        grams = grams_of(
            {name: layers[name] for name in matrices},
            1,
            lambda rows, _: family.logits(model, batch, head),
        )
        for name in matrices:
            width = file.info(name).shape[1]
            assert grams[name].shape == (width * (width + 1) // 2,)

    def test_rows_that_go_through_it_part_by_part_give_the_same_statistics(
        self, family, base, model, head, rows, tmp_path
    ):
        if not loads_without_weights(family):
            pytest.skip("the family's load has no argument empty: it is loaded as a whole")
        preprocess = family.preprocessor(base)
        empty, file = family.load(base, empty=True), Checkpoint.open(base)
        parts = PartByPart(empty, torch.device("cpu"))
        live = family.parameters(empty)
        assert live.keys() == family.parameters(model).keys()

        def passes(on: Any) -> list[Any]:
            return [
                lambda i=i: family.predictions(on, preprocess([rows[i]]), head) for i in range(6)
            ]

        def whole(_, stored):
            for one in passes(model):
                one()
            stored()

        def streamed(_, stored):
            parts.run(passes(empty), live, file.tensor, tmp_path, done=stored)

        expected = grams_of(linear_layers(model, family.parameters(model)), 6, whole)
        found = grams_of(linear_layers(empty, live), 6, streamed)
        assert found.keys() == expected.keys()
        for name, gram in expected.items():
            atol = 1e-6 * float(gram.abs().max())
            assert torch.allclose(found[name], gram, rtol=1e-5, atol=atol), name
        weights = [each for each in live.values() if isinstance(each, torch.nn.Parameter)]
        assert all(each.isnan().all() for each in weights), "dropped"

    def test_blocks_on_several_devices_give_the_same_gradients(
        self, family, base, model, batch, head, localizable
    ):
        if not loads_without_weights(family):
            pytest.skip("the family's load has no argument empty: it is on one device")
        rooms = [Room(torch.device("cpu"), 10**9)] * 2
        apart, file = family.load(base, empty=True), Checkpoint.open(base)
        places = [number % 2 for number in range(len(repeated_layers(apart)))]
        spread(apart, family.parameters(apart), file.tensor, rooms, places)
        for name, live in family.parameters(apart).items():
            assert torch.equal(live, family.parameters(model)[name]), name

        def gradients(of: Any) -> list[torch.Tensor | None]:
            live = [family.parameters(of)[name].requires_grad_() for name in localizable]
            return list(torch.autograd.grad(family.loss(of, batch, head), live, allow_unused=True))

        for one, other in zip(gradients(model), gradients(apart), strict=True):
            if one is None or other is None:
                assert one is other, "a weight that the loss does not depend on"
            else:
                assert torch.equal(one, other)

    def test_a_task_s_own_head_is_not_merged(self, family, base, finetuned, model, localizable):
        if family.task_heads is None:
            return
        names = Checkpoint.open(finetuned).names
        assert family.task_heads.tensors(finetuned, names)
        own = family.task_heads.tensors(base, Checkpoint.open(base).names)
        assert not set(own) & {*localizable, *family.parameters(model)}

    def test_scores_are_one_finite_number_per_row_and_class(self, family, model, batch, head):
        scores = family.logits(model, batch, head)
        assert scores.shape == (6, len(self.spec.classes))
        assert scores.isfinite().all()

    def test_loading_again_gives_the_same_scores_bit_for_bit(
        self, family, base, model, batch, head
    ):
        assert torch.equal(
            family.logits(model, batch, head), family.logits(family.load(base), batch, head)
        )

    def test_the_loss_is_a_scalar_and_differentiable_in_the_localizable_tensors(
        self, family, model, batch, head, localizable
    ):
        live = [family.parameters(model)[name].requires_grad_() for name in localizable]
        loss = family.loss(model, batch, head)
        assert loss.shape == ()
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, live)
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)

    def test_a_head_is_the_same_bytes_every_time_and_survives_storing(
        self, family, base, finetuned, model, batch, head
    ):
        second = family.build_head(family.load(base), base, self.spec, finetuned=finetuned)
        assert second.to_bytes() == head.to_bytes()
        stored = Head.from_bytes(head.to_bytes())
        assert stored.spec == head.spec == family.resolve(base, self.spec)
        assert torch.equal(family.logits(model, batch, stored), family.logits(model, batch, head))

    def test_the_finetuned_folder_fits_the_base(self, family, base, finetuned, localizable):
        assert family.config_differences(base, base) == []
        assert family.config_differences(base, finetuned) == []
        found = compare(
            Checkpoint.open(base), Checkpoint.open(finetuned), localizable, family.prefixes
        )
        assert found.problems() == []

    def test_setting_other_weights_and_restoring_leaves_no_trace(
        self, family, base, finetuned, model, batch, head, localizable
    ):
        before = family.logits(model, batch, head)
        live, file = family.parameters(model), Checkpoint.open(base)
        mapping = compare(file, Checkpoint.open(finetuned), localizable, family.prefixes).mapping
        tuned = Checkpoint.open(finetuned).renamed(mapping)
        names = [name for name in tuned.names if name in live]
        set_weights(live, ((name, tuned.tensor(name)) for name in names))
        worn = family.logits(model, batch, head)
        assert not torch.equal(worn, before)
        restore(live, file, names)
        assert torch.equal(family.logits(model, batch, head), before)

    def test_edits_give_the_scores_of_the_weights_that_they_write(
        self, family, base, model, batch, head, localizable
    ):
        before = family.logits(model, batch, head)
        live, file = family.parameters(model), Checkpoint.open(base)

        class Ones:
            names = tuple(localizable[:2])

            def apply(self, name, flat):
                flat[::2] = 1.0

        apply_edits(live, file, Ones())
        for name in localizable[:2]:
            assert (live[name].reshape(-1)[::2] == 1).all()
            assert torch.equal(
                live[name].reshape(-1)[1::2], file.tensor(name).reshape(-1)[1::2].float()
            )
        assert not torch.equal(family.logits(model, batch, head), before)

    def test_rows_become_batches_with_their_classes(self, batch):
        assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
        assert batch["labels"].dtype == torch.int64

    def test_rows_without_classes_become_batches_too(self, family, base, values):
        table = ListTable("rows", Path(), {"x": values})
        rows = Rows(table, ("x",), None, (), family.modality, prompt=self.prompt)
        assert "labels" not in family.preprocessor(base)([rows[0], rows[1]])

    def test_an_evaluation_counts_what_the_scores_say(self, family, base, model, batch, head, rows):
        found = evaluate(family, model, head, rows, family.preprocessor(base), batch_size=6)
        best = family.logits(model, batch, head).argmax(1)
        assert isinstance(found.rows, Bits)
        assert found.rows.right.tolist() == (best == batch["labels"]).tolist()
        assert found.count == 6

    def test_asset_files_are_there_and_sorted(self, family, base):
        names = family.asset_files(base)
        assert "config.json" in names
        assert list(names) == sorted(names)
        assert all((base / name).is_file() for name in names)
        assert not any(name.endswith((".safetensors", ".bin")) for name in names)
