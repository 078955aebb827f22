"""The contract of all families, and how families are found."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.families.family import GROUP, family_names, get_family
from tests.modeling.conftest import png
from tests.modeling.fake_families import LanguageModel, PerTaskClassifier, fake_folder
from tests.modeling.family_contract import FamilyContract
from tests.tiny_models import tiny_siglip, tweaked, vision_tower

ROOT = Path(__file__).parents[3]
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


class TestSiglip(TestClip):
    @pytest.fixture
    def base(self, tmp_path):
        return tiny_siglip(tmp_path / "siglip")


class TestSiglipVisionTower(TestSiglip):
    @pytest.fixture
    def finetuned(self, tmp_path, base):
        tuned = tweaked(base, tmp_path / "tuned", seed=1)
        return vision_tower(tuned, tmp_path / "tower")


class TestSiglip2WithAnyResolution(TestSiglip):
    @pytest.fixture
    def base(self, tmp_path):
        return tiny_siglip(tmp_path / "siglip2", naflex=True)


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


def offer(folder: Path, package: str, name: str, value: str) -> None:
    """Install a package that offers a family: the folder only has to be on `sys.path`."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages; `my_family` has a class and an object of a family."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "my_family.py").write_text(
        "from tests.modeling.fake_families import LanguageModel\n"
        "class Mine(LanguageModel):\n    name = 'mine'\n"
        "mine = Mine()\n"
        "class Half:\n    name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(folder)
    get_family.cache_clear()
    yield folder
    get_family.cache_clear()
    sys.modules.pop("my_family", None)


@pytest.mark.parametrize("value", ["my_family:Mine", "my_family:mine"])
def test_an_installed_package_can_offer_a_family(packages, value):
    offer(packages, "acme", "mine", value)
    assert get_family("mine").name == "mine"
    files = (ROOT / "modeling" / "families").glob("[a-z]*.py")
    own = {file.stem.replace("_", "-") for file in files} - {"family"}
    assert family_names() == tuple(sorted({*own, "mine"}))


def test_a_package_is_imported_only_when_its_family_is_named(packages):
    offer(packages, "acme", "mine", "my_family:Mine")
    family_names()
    get_family("clip")
    assert "my_family" not in sys.modules


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("mine", "gone:Mine", "No module named 'gone'"),
        ("mine", "my_family:Gone", "Gone"),
        ("mine", "my_family:Half", "no also, asset_files, build_head"),
        ("other", "my_family:Mine", "name = 'mine'"),
    ],
)
def test_a_broken_package_is_named_and_leaves_other_families_alone(packages, name, value, part):
    offer(packages, "acme", name, value)
    with pytest.raises(BadInput, match="of the package acme cannot be used") as raised:
        get_family(name)
    assert part in str(raised.value)
    assert get_family("clip").name == "clip"


def test_two_families_of_one_name_are_refused_with_their_packages(packages):
    offer(packages, "acme", "mine", "my_family:Mine")
    offer(packages, "umbrella", "mine", "my_family:mine")
    offer(packages, "evil", "clip", "my_family:Mine")
    with pytest.raises(BadInput, match="acme, umbrella"):
        get_family("mine")
    with pytest.raises(BadInput, match="restitch, evil"):
        get_family("clip")


def test_the_family_of_the_guide_works_as_a_package_of_its_own(tmp_path, bert):
    """The files of docs/how-to/add-a-family.md, word by word, in a folder of their own."""
    guide = (ROOT / "docs/how-to/add-a-family.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## \d\. .*?`([\w./]+)`\n.*?```\w+\n(.*?)```", guide, re.M | re.S)
    files = dict(parts)
    assert list(files) == ["my_families/short_text.py", "pyproject.toml", "test_short_text.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    ((name, value),) = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"][
        GROUP
    ].items()
    offer(tmp_path, "my-families", name, value)
    shutil.copy(ROOT / "tests/modeling/family_contract.py", tmp_path)
    shutil.copytree(bert, tmp_path / "models" / "base")
    tweaked(bert, tmp_path / "models" / "finetuned", seed=1)
    # A folder of its own: the shared one of all runs is cleaned up first, which can take long.
    own = ("--basetemp", tmp_path / "temporary")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *own,
            "test_short_text.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    count = re.search(r"(\d+) passed", done.stdout)
    assert count is not None
    assert int(count[1]) > 15


def test_importing_the_package_imports_neither_transformers_nor_datasets():
    code = (
        "import sys, restitch.modeling.heads, restitch.modeling.families.family\n"
        "import restitch.modeling.data.task_data, restitch.modeling.evaluation\n"
        "import restitch.modeling.weights\n"
        "print([m for m in ('transformers', 'datasets', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
