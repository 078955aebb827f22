"""The models of the demo's world are good enough for a demo; making them takes some minutes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from playground.building import DENSITY, SIZES, Builder
from playground.make import World, make_world
from playground.skills import GENERAL, TASKS
from playground.training import accuracy, one_thread, zero_shot_head
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import localize_dataless
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.families.clip import Clip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BY_NAME = {skill.name: skill for skill in (GENERAL, *TASKS)}


class Merger:
    """The demo's models, stitched by a plain implementation of the paper's formula."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.base = Checkpoint.open(world.base)
        self.builder = Builder(world.root, SIZES["demo"], 0, lambda _done, _total: None)
        self.names = select_tensors(self.base.names, Clip().localizable, (), ())
        self.tuned = {task: Checkpoint.open(world.model(task)) for task in world.tasks}
        self.masks = {task: self._mask(task) for task in world.tasks}

    def _mask(self, task: str) -> Mask:
        vector = TaskVector(self.base, self.tuned[task], self.names)
        return localize_dataless(vector, DENSITY)

    def merged(self, tasks: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            total = torch.zeros_like(self.base.tensor(name)).flatten()
            owners = torch.zeros_like(total)
            for task in tasks:
                at = self.masks[task].coordinates(name)
                total[at] += self.tuned[task].tensor(name).flatten()[at]
                owners[at] += 1
            flat = torch.where(owners > 0, total / owners, self.base.tensor(name).flatten())
            yield name, flat.reshape(self.base.info(name).shape)

    def accuracy(self, tasks: Sequence[str], on: str) -> float:
        skill = BY_NAME[on]
        with one_thread():
            model = self.builder.load(self.world.base)
            model.load_state_dict(dict(self.merged(tasks)), strict=False)
            head = zero_shot_head(model, self.builder.tokenizer, skill)
            return accuracy(model, head, *self.builder.rows(skill, "test"))


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Merger:
    return Merger(make_world(Path(tmp_path_factory.mktemp("demo")) / "world", "demo"))


def test_the_base_is_good_at_the_general_benchmark_and_bad_at_the_tasks(merger: Merger) -> None:
    found = merger.world.accuracy
    assert len(GENERAL.labels) > 100
    assert found["general"]["base"] > 0.8
    for task in merger.world.tasks:
        assert found[task]["base"] < 0.6
        assert found[task]["finetuned"] > 0.9


def test_a_grafted_model_keeps_most_of_its_skill(merger: Merger) -> None:
    for task in merger.world.tasks:
        finetuned = merger.world.accuracy[task]["finetuned"]
        assert merger.accuracy([task], task) > 0.9 * finetuned


def test_the_merged_model_has_all_skills_and_forgets_little(merger: Merger) -> None:
    known = merger.world.accuracy
    tasks = merger.world.tasks
    for number in range(1, len(tasks) + 1):
        some = tasks[:number]
        assert merger.accuracy(some, "general") > 0.9 * known["general"]["base"]
        for task in some:
            assert merger.accuracy(some, task) > known[task]["base"] + 0.2
