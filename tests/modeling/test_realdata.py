"""The accuracies that the real tasks' own files give, through the whole package."""

import json
from pathlib import Path

import pytest

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import compare
from restitch.merging.files.coordinates import select_tensors
from restitch.modeling.data.task_data import TaskData
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import SHARED
from tests.modeling.weights import load_checkpoint

pytestmark = pytest.mark.realdata


class Line:
    """A real base with its family, and the scores of checkpoints on tasks."""

    def __init__(self, family: str, checkpoints: Path) -> None:
        self.family = get_family(family)
        self.checkpoints = checkpoints
        self.base = checkpoints / "base"
        self.file = Checkpoint.open(self.base)
        self.model = self.family.load(self.base)
        self.live = self.family.parameters(self.model)
        self.names = select_tensors(self.file.floating, self.family.localizable)

    def accuracy(self, task: Path, checkpoint: str, form: str) -> float:
        load_checkpoint(self.live, self.file)
        described = json.loads((task / "task.json").read_text())
        spec = HeadSpec(
            labels=tuple(described["labels"]),
            templates=tuple(described.get("templates", ["{}"])),
            scale=described.get("scale"),
            max_length=described.get("max_length"),
        )
        head = self.family.build_head(self.model, self.base, spec)
        found = compare(
            self.file,
            Checkpoint.open(self.checkpoints / checkpoint),
            self.names,
            self.family.prefixes,
        )
        assert found.problems() == []
        tuned = Checkpoint.open(self.checkpoints / checkpoint).renamed(found.mapping)
        load_checkpoint(self.live, tuned)
        data = DataSpec(path=str(task), test=f"test.{form}", input=(self.column,))
        rows = TaskData(data, spec.classes, self.family.modality).rows("test")
        preprocess = self.family.preprocessor(self.base, head.spec.max_length)
        result = evaluate(self.family, self.model, head, rows, preprocess)
        assert result.count == described["accuracy"]["examples"]
        return result.value

    @property
    def column(self) -> str:
        return self.family.modality


@pytest.fixture(scope="module")
def text(real_text) -> Line:
    return Line("text-encoder", real_text)


@pytest.fixture(scope="module")
def vision(real_vision) -> Line:
    return Line("clip", real_vision)


SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in ("sst2", "cr", "subj")]


@pytest.mark.parametrize("task", ["trec", *SLOW])
@pytest.mark.parametrize("checkpoint", ["base", "finetuned"])
def test_real_text_tasks_have_their_recorded_accuracy(text, task, checkpoint):
    folder = SHARED / "text" / task
    expected = json.loads((folder / "task.json").read_text())["accuracy"][checkpoint]
    found = text.accuracy(folder, "base" if checkpoint == "base" else task, "jsonl")
    assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("task", "checkpoint", "key"),
    [
        ("cifar10", "base", "base"),
        ("mnist", "base", "base"),
        ("mnist", "mnist", "finetuned"),
        ("digits", "base", "base"),
        ("digits", "digits", "finetuned"),
    ],
)
def test_real_photos_have_their_recorded_accuracy(vision, task, checkpoint, key):
    folder = SHARED / "vision" / task
    expected = json.loads((folder / "task.json").read_text())["accuracy"][key]
    assert vision.accuracy(folder, checkpoint, "parquet") == pytest.approx(expected, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mnist", "digits"])
def test_finetuning_forgets_photos_as_recorded(vision, task):
    recorded = json.loads((SHARED / "vision" / task / "task.json").read_text())
    found = vision.accuracy(SHARED / "vision" / "cifar10", task, "parquet")
    assert found == pytest.approx(recorded["accuracy"]["cifar10_after"], abs=0.005)


def test_the_real_base_is_named_as_in_its_file(text):
    assert set(text.live) == set(text.file.names)
    assert len(text.names) == 96
    assert sum(text.file.info(name).numel for name in text.names) == 10_646_784


def test_pairs_get_their_segments(text):
    from restitch.modeling.data.rows import Example

    batch = text.family.preprocessor(text.base)([Example(("a", "b"), None, "here")])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
