"""Image classifiers: heads of finetuned models on every architecture, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForMaskedImageModeling

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.data.rows import Example
from restitch.modeling.families.image_classifier import ImageClassifier
from restitch.modeling.family_choice import check_base
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import png
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import tiny_classifier, tiny_clip, tiny_image_model, vision_tower

FAMILY = ImageClassifier()
HEADS = FAMILY.task_heads
LABELS = ("no", "yes", "maybe")
KINDS = ("vit", "deit", "dinov2", "beit", "swin", "convnext")


class TestContract(FamilyContract):
    @pytest.fixture
    def family(self):
        return FAMILY

    @pytest.fixture
    def base(self, tmp_path):
        return tiny_image_model(tmp_path / "base")

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tiny_classifier(base, tmp_path / "tuned", self.spec.classes)

    @pytest.fixture
    def values(self):
        return [png(seed) for seed in range(6)]


class TestContractOfDinov2(TestContract):
    @pytest.fixture
    def base(self, tmp_path):
        return tiny_image_model(tmp_path / "base", "dinov2")


class TestContractOfConvNext(TestContract):
    @pytest.fixture
    def base(self, tmp_path):
        return tiny_image_model(tmp_path / "base", "convnext")


def batch(base: Path) -> Any:
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 16, 16, 3), generator=random, dtype=torch.uint8).numpy()
    return FAMILY.preprocessor(base)([Example((Image.fromarray(p),), None, "") for p in pixels])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_in_transformers(tmp_path: Path, kind: str) -> None:
    base = tiny_image_model(tmp_path / "base", kind)
    tuned = tiny_classifier(base, tmp_path / "tuned", LABELS)
    assert FAMILY.lacks(base) is None
    assert FAMILY.config_differences(base, tuned) == []
    head = FAMILY.build_head(FAMILY.load(base), base, HeadSpec(labels=LABELS), finetuned=tuned)
    model = AutoModelForImageClassification.from_pretrained(tuned)
    with torch.no_grad():
        expected = model(**batch(base)).logits
    found = FAMILY.logits(FAMILY.load(tuned), batch(base), head)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The names of the files on the hub, which transformers changes when it loads them.
    live, file = FAMILY.parameters(FAMILY.load(tuned)), load_file(tuned / "model.safetensors")
    own = HEADS.tensors(tuned, list(file))
    floating = {name for name, tensor in file.items() if tensor.is_floating_point()}
    assert floating == {*live, *own} & floating
    assert all(torch.equal(live[name], file[name]) for name in live)
    assert set(own) == {n for n in file if n.startswith("classifier.") or ".pooler." in n}


def test_a_classifier_as_base_scores_with_its_own_head(tmp_path: Path) -> None:
    base = tiny_image_model(tmp_path / "base")
    own = tiny_classifier(base, tmp_path / "own", LABELS)
    head = FAMILY.build_head(FAMILY.load(own), own, HeadSpec(labels=LABELS))
    model = AutoModelForImageClassification.from_pretrained(own)
    with torch.no_grad():
        expected = model(**batch(own)).logits
    torch.testing.assert_close(FAMILY.logits(FAMILY.load(own), batch(own), head), expected)


def test_a_base_with_batch_norm_is_refused_with_its_tensors(tmp_path: Path) -> None:
    base = tiny_image_model(tmp_path / "resnet", "resnet")
    with pytest.raises(BadInput, match="BatchNorm keeps statistics of the unmerged") as caught:
        check_base(FAMILY, base, "the base")
    assert "resnet.embedder.embedder.normalization.running_mean" in caught.value.summary
    with pytest.raises(BadInput, match="BatchNorm"):
        FAMILY.load(base)


def test_a_model_with_another_head_is_named(tmp_path: Path) -> None:
    base = tiny_image_model(tmp_path / "base")
    folder = tmp_path / "pixels"
    shutil.copytree(base, folder)
    ViTForMaskedImageModeling.from_pretrained(base).save_pretrained(folder)
    assert FAMILY.lacks(folder) is None  # as a base it is fine
    with pytest.raises(BadInput, match="no head for a classification") as caught:
        HEADS.check(folder, Checkpoint.open(folder), LABELS)
    assert caught.value.found == "ViTForMaskedImageModeling"


def test_an_image_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    tower = vision_tower(tiny_clip(tmp_path / "clip"), tmp_path / "tower")
    with pytest.raises(BadInput, match="lacks a class with a classifier"):
        check_base(FAMILY, tower, "the tower")


def test_one_image_per_row(tmp_path: Path) -> None:
    base = tiny_image_model(tmp_path / "base")
    with pytest.raises(BadInput, match="image-classifier reads one image per row"):
        FAMILY.preprocessor(base)([Example((None, None), None, "row 1")])
