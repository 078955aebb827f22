"""The families' contract, and what is particular to the Protocol and its registry."""

import subprocess
import sys

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.families.family import add_family, family_names, get_family
from tests.modeling.conftest import png
from tests.modeling.fake_families import LanguageModel, PerTaskClassifier, fake_folder
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import tweaked, vision_tower

TEXTS = ["one", "a longer text than the others", "two words", "?", "naïve", "yes or no"]


class TestTextEncoder(FamilyContract):
    @pytest.fixture
    def family(self):
        return get_family("text-encoder")

    @pytest.fixture
    def base(self, bert):
        return bert

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tweaked(base, tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return TEXTS


class TestClip(FamilyContract):
    @pytest.fixture
    def family(self):
        return get_family("clip")

    @pytest.fixture
    def base(self, clip):
        return clip

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        return tweaked(base, tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return [png(seed) for seed in range(6)]


class TestClipVisionTower(TestClip):
    """The finetuned folder holds the vision tower alone, as transformers 5 saves it."""

    @pytest.fixture
    def finetuned(self, tmp_path, base):
        tuned = tweaked(base, tmp_path / "tuned", seed=1)
        return vision_tower(tuned, tmp_path / "tower")


class TestClipVisionTowerOfVersion4(TestClip):
    @pytest.fixture
    def finetuned(self, tmp_path, base):
        tuned = tweaked(base, tmp_path / "tuned", seed=1)
        return vision_tower(tuned, tmp_path / "tower", prefix="vision_model.")


class TestPerTaskClassifier(FamilyContract):
    @pytest.fixture
    def family(self):
        return PerTaskClassifier()

    @pytest.fixture
    def base(self, tmp_path):
        return fake_folder(tmp_path / "base")

    @pytest.fixture
    def finetuned(self, tmp_path):
        return fake_folder(tmp_path / "tuned", seed=1, classes=3)

    @pytest.fixture
    def values(self):
        return TEXTS

    def test_heads_of_two_finetuned_models_differ(self, family, base, model, finetuned, tmp_path):
        other = fake_folder(tmp_path / "other", seed=2, classes=3)
        one, two = (
            family.build_head(model, base, self.spec, finetuned=folder)
            for folder in (finetuned, other)
        )
        assert one.to_bytes() != two.to_bytes()


class TestLanguageModel(FamilyContract):
    @pytest.fixture
    def family(self):
        return LanguageModel()

    @pytest.fixture
    def base(self, tmp_path):
        return fake_folder(tmp_path / "base")

    @pytest.fixture
    def finetuned(self, tmp_path):
        return fake_folder(tmp_path / "tuned", seed=1)

    @pytest.fixture
    def values(self):
        return TEXTS


def test_an_unknown_family_is_an_error_with_the_nearest_name():
    with pytest.raises(BadInput, match="did you mean 'text-encoder'"):
        get_family("text-encodr")


def test_families_can_be_added_but_built_in_ones_not_replaced():
    family = LanguageModel()
    add_family(family)
    assert get_family("fake-language-model") is family
    assert set(family_names()) >= {"clip", "text-encoder", "fake-language-model"}
    impostor = PerTaskClassifier()
    impostor.name = "clip"
    with pytest.raises(ValueError, match="built in"):
        add_family(impostor)


def test_importing_the_package_imports_neither_transformers_nor_datasets():
    code = (
        "import sys, restitch.modeling.families.family, restitch.modeling.data.task_data, restitch.modeling.evaluation, restitch.modeling.weights, "
        "restitch.modeling.heads\n"
        "print([m for m in ('transformers', 'datasets', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
