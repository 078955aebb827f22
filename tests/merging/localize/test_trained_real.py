"""What the presets find on a real finetuned model; calibrated on train, measured on test rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import localize_dataless
from restitch.merging.localize.trained import TrainedResult, TrainedSettings, localize_trained
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.data.task_data import TaskData
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.modeling.weights import set_weights
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import SHARED, real_text
from tests.modeling.weights import load_checkpoint

__all__ = ["real_text"]

pytestmark = [pytest.mark.realdata, pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Trec:
    """TREC on the real encoder: masks from 64 rows per class, and what they are worth."""

    vector: TaskVector
    learn: Callable[[TrainedSettings], TrainedResult]
    grafted: Callable[[Mask], float]


@pytest.fixture(scope="module")
def trec(real_text: Path) -> Trec:
    family, folder = get_family("text-encoder"), real_text / "base"
    base, tuned = Checkpoint.open(folder), Checkpoint.open(real_text / "trec")
    model = family.load(folder)
    live = family.parameters(model)
    vector = TaskVector(base, tuned, select_tensors(base.floating, family.localizable))
    task = SHARED / "text" / "trec"
    about = json.loads((task / "task.json").read_text())
    spec = HeadSpec(
        labels=tuple(about["labels"]),
        templates=("{}",),
        scale=about["scale"],
        max_length=about["max_length"],
    )
    head = family.build_head(model, folder, spec)
    preprocess = family.preprocessor(folder, spec.max_length)
    source = DataSpec(path=str(task), train="train.jsonl", test="test.jsonl", input=("text",))
    data = TaskData(source, spec.classes, family.modality)
    rows, test = data.calibration(64, 0), data.rows("test")

    def learn(settings: TrainedSettings) -> TrainedResult:
        def batch(indices: Sequence[int]) -> dict[str, Tensor]:
            return preprocess([rows[index] for index in indices])

        return localize_trained(
            live, vector, len(rows), batch, lambda some: family.loss(model, some, head), settings
        )

    def grafted(mask: Mask) -> float:
        for name in mask.names:
            flat, kept = base.tensor(name).reshape(-1).clone(), mask.coordinates(name)
            flat[kept] = tuned.tensor(name).reshape(-1)[kept]
            set_weights(live, [(name, flat.view(base.info(name).shape))])
        found = evaluate(family, model, head, test, preprocess).value
        load_checkpoint(live, base)
        return found

    return Trec(vector, learn, grafted)


def test_paper_taken_literally_collapses(trec: Trec) -> None:
    result = trec.learn(TrainedSettings.of("paper", epochs=3))
    assert 0.0005 < result.density < 0.003
    assert trec.grafted(result.mask) < 0.35


def test_budget_reaches_official_at_its_density_and_beats_dataless(trec: Trec) -> None:
    official = trec.learn(TrainedSettings.of("official", batch_size=32))
    assert 0.13 < official.density < 0.18
    at = official.density
    budget = trec.grafted(trec.learn(TrainedSettings.of(density=at)).mask)
    assert budget >= trec.grafted(official.mask)
    assert budget > trec.grafted(localize_dataless(trec.vector, at))


def test_budget_beats_dataless_by_far_where_few_coordinates_are_kept(trec: Trec) -> None:
    budget = trec.grafted(trec.learn(TrainedSettings.of(density=0.05)).mask)
    assert budget > trec.grafted(localize_dataless(trec.vector, 0.05)) + 0.1
