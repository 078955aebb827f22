"""Paper files: each is valid, and says of every model and data set what the table means."""

from pathlib import Path

import pytest
import yaml

from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import get_method, resolve_settings
from restitch.modeling.families.family import get_family
from restitch.registry.specs.files import load_task
from restitch.registry.specs.hub_id import is_hub_id
from restitch.registry.specs.paper import BASE, FINETUNED, Paper, load_paper, paper_names
from restitch.registry.specs.task import TaskSpec
from tests.shell import ROOT

PAPERS = ROOT / "examples" / "papers"
# Classes and templates of each data set of CLIP.
IMAGES = {
    "sun397": (397, 2),
    "stanford-cars": (196, 8),
    "resisc45": (45, 18),
    "eurosat": (10, 3),
    "svhn": (10, 1),
    "gtsrb": (43, 3),
    "mnist": (10, 1),
    "dtd": (47, 8),
    "oxford_flowers102": (102, 1),
    "pcam": (2, 1),
    "fer2013": (7, 6),
    "oxford-iiit-pet": (37, 1),
    "stl10": (10, 2),
    "cifar100": (100, 18),
    "cifar10": (10, 18),
    "food101": (101, 1),
    "fashion_mnist": (10, 2),
    "emnist_letters": (26, 1),
    "kmnist": (10, 1),
    "rendered-sst2": (2, 1),
}


def load(name: str) -> Paper:
    """A paper, with models for one that has none."""
    has_models = "{task}" in (PAPERS / f"{name}.yaml").read_text() or "extends" in yaml.safe_load(
        (PAPERS / f"{name}.yaml").read_text()
    )
    return load_paper(name, models=None if has_models else "owner/{task}")


@pytest.mark.parametrize("name", paper_names())
def test_every_paper_file_describes_a_line_with_its_tasks(name: str) -> None:
    paper = load(name)
    line, family = paper.line_spec, get_family(paper.spec.family)
    assert line.line == name
    count = name.rpartition("-")[2]
    assert (
        len(paper.tasks)
        == len(set(paper.models.values()))
        == (int(count) if count.isdigit() else 5)
    )
    for task, spec in paper.tasks.items():
        assert spec.task == task
        assert is_hub_id(paper.models[task])
        assert spec.data is not None
        assert is_hub_id(spec.data.path.partition(":")[0])
        assert spec.data.evaluation_split is not None
        assert (spec.prompt is not None) <= family.reads_prompts
    if line.retention is not None:
        assert isinstance(line.retention, TaskSpec)
        assert line.retention.task == "imagenet"
        assert paper.spec.retention_rows == 50_000


@pytest.mark.parametrize("name", paper_names())
def test_published_rows_stand_next_to_methods_that_are_there(name: str) -> None:
    paper = load(name)
    named = [row.method for row in paper.comparable if row.method is not None]
    assert len(named) == len(set(named))
    for method in set(named) - {BASE, FINETUNED}:
        assert get_method(method).name == method
    for method, settings in paper.settings.items():
        assert resolve_settings(method, settings)
    for table in paper.spec.published:
        assert all(row.method is None or table.same_models for row in table.rows)
    own = yaml.safe_load((PAPERS / f"{name}.yaml").read_text())
    assert len(paper.spec.published) == len(own.get("published", ()))


def test_the_published_numbers_are_read() -> None:
    rows = {row.name: row for row in load_paper("clip-b32-8").comparable}
    assert (rows["TSV-M"].mean, rows["TSV-M"].method) == (83.1, "tsv-m")
    assert rows["zero-shot"].benchmark == 63.3
    assert rows["RegMean++"].method is None
    assert load_paper("clip-b32-8").settings == {"task-arithmetic": {"alpha": 0.3}}


@pytest.mark.parametrize("file", sorted((PAPERS / "tasks").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_data_sets_of_clip_have_their_classes_templates_and_holdout(file: Path) -> None:
    spec = load_task(file)
    assert spec.head is not None
    assert spec.data is not None
    if spec.task == "imagenet":
        assert (spec.head.labels, spec.head.templates) == ("openai", "openai")
        return
    assert (len(spec.head.labels or ()), len(spec.head.templates)) == IMAGES[spec.task]
    assert (spec.data.train, spec.data.holdout) == ("train", 0.1)
    assert spec.data.test == ("validation" if spec.task == "food101" else "test")


def test_ids_that_differ_from_the_name_of_the_task() -> None:
    paper = load_paper("clip-b32-8")
    cars, svhn = paper.tasks["stanford-cars"].data, paper.tasks["svhn"].data
    assert cars is not None
    assert svhn is not None
    assert paper.models["stanford-cars"].endswith("_stanford-cars")
    assert (cars.path, svhn.path) == (
        "tanganke/stanford_cars",
        "ufldl-stanford/svhn:cropped_digits",
    )
    pcam, fer = (load_task(PAPERS / "tasks" / f"{name}.yaml").data for name in ("pcam", "fer2013"))
    assert pcam is not None
    assert fer is not None
    assert pcam.classes == ("false", "true")
    assert (fer.input, fer.label) == (("jpg",), "cls")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / "tasks").mkdir(exist_ok=True)
    for task in ("one", "two"):
        (folder / "tasks" / f"{task}.yaml").write_text(f"task: {task}\n")
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


MINIMAL = """
about: two tasks
base: owner/base
family: clip
models: "owner/{task}"
tasks: {one: {rows: 1}, two: {rows: 2}}
notes: [mind this]
"""


def test_a_file_that_extends_another_adds_tasks_and_keeps_its_own_numbers(tmp_path: Path) -> None:
    write(tmp_path, "small", MINIMAL)
    text = "extends: small\nabout: more\ntasks: {three: {rows: 3, task: {}}}\n"
    paper = load_paper(str(write(tmp_path, "large", text)))
    assert list(paper.tasks) == ["one", "two", "three"]
    assert paper.models["three"] == "owner/three"
    assert (paper.spec.about, paper.spec.notes) == ("more", ())
    write(tmp_path, "small", "extends: large\nabout: round and round\n")
    with pytest.raises(BadInput, match="extends itself"):
        load_paper(str(tmp_path / "large.yaml"))


def test_models_of_the_user_replace_those_of_the_file(tmp_path: Path) -> None:
    file = str(write(tmp_path, "small", MINIMAL))
    assert load_paper(file, models="/models/").models["one"] == "/models/one"
    assert load_paper(file, models="me/{task}-best").models["two"] == "me/two-best"
    file = str(write(tmp_path, "bare", MINIMAL.replace('models: "owner/{task}"', "")))
    with pytest.raises(BadInput, match="not published") as caught:
        load_paper(file)
    assert "--models" in str(caught.value.expected)


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown paper") as caught:
        load_paper("clip-b32-9")
    assert "clip-b32-8" in str(caught.value.hint)
    file = write(tmp_path, "small", MINIMAL)
    (tmp_path / "tasks" / "two.yaml").write_text("task: too\n")
    with pytest.raises(BadInput, match="describes another task"):
        load_paper(str(file))
    with pytest.raises(BadInput, match="no general benchmark"):
        load_paper(str(write(tmp_path, "small", MINIMAL)), benchmark=tmp_path)
    with pytest.raises(BadInput, match="images of imagenet are not there"):
        load_paper("clip-b32-8", benchmark=tmp_path / "absent")
    with pytest.raises(BadInput, match="methud"):
        load_paper(str(write(tmp_path, "small", MINIMAL + "methud: ties\n")))
    with pytest.raises(BadInput, match=r"absent\.yaml"):
        load_paper(str(tmp_path / "absent.yaml"))


def test_a_folder_of_images_stands_in_for_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    retention = load_paper("clip-b32-8", benchmark=tmp_path / "val").line_spec.retention
    assert isinstance(retention, TaskSpec)
    assert retention.data is not None
    assert (retention.data.path, retention.data.test) == (str(tmp_path), "val")
    assert retention.head is not None
    assert retention.head.labels == "openai"
    without = load_paper("clip-b32-8", retention=False)
    assert without.line_spec.retention is None
    assert without.spec.retention_rows is None
