"""Building the parts of a world in order; existing parts are not made again.

Every part has its own random generator, so a world that was made in several runs has the
same bytes as one that was made in a single run.
"""

from pathlib import Path
from typing import Any

from playground.captions import make_tokenizer
from playground.folders import SPLITS, line_text, part, task_text, write_model, write_pictures
from playground.scenes import Ints, Pictures
from playground.skills import GENERAL, TASKS, Skill
from playground.training import (
    Sizes,
    accuracy,
    finetune,
    generator,
    make_model,
    no_bars,
    one_thread,
    pretrain,
    zero_shot_head,
)
from restitch.merging.progress import Progress

LINE = "playground"
DENSITY = 0.05
"""Here grafted models keep most of their skill, and the merged one most of the base's."""
SIZES = {
    "demo": Sizes(
        width=128,
        layers=4,
        text_width=64,
        text_layers=2,
        pictures=40_000,
        steps=600,
        batch=128,
        rate=1e-3,
        tuning_rows=1500,
        tuning_epochs=3,
        tuning_batch=32,
        tuning_rate=0.02,
        validation_rows=300,
        test_rows=1000,
        general_rows=1080,
    ),
    "small": Sizes(
        width=32,
        layers=2,
        text_width=32,
        text_layers=1,
        pictures=1200,
        steps=12,
        batch=64,
        rate=1e-3,
        tuning_rows=128,
        tuning_epochs=1,
        tuning_batch=32,
        tuning_rate=0.02,
        validation_rows=24,
        test_rows=48,
        general_rows=216,
    ),
}


def build(root: Path, size: str, seed: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Make missing parts in `root`; returns the test accuracy of base and finetuned by task."""
    builder = Builder(root, SIZES[size], seed, progress)
    with one_thread(), no_bars():
        builder.make_base()
        builder.make_general()
        for skill in TASKS:
            builder.make_task(skill)
        builder.make_line()
        return builder.measure()


class Builder:
    """Builds the parts of one world."""

    def __init__(self, root: Path, sizes: Sizes, seed: int, progress: Progress) -> None:
        self.root, self.sizes, self.seed, self.progress = root, sizes, seed, progress
        self.tokenizer = make_tokenizer()
        per_task = sizes.tuning_rows // sizes.tuning_batch * sizes.tuning_batch
        self.per_task = per_task * sizes.tuning_epochs
        self.seen = 0
        self.to_see = sizes.steps * sizes.batch + self.per_task * len(TASKS)

    def make_base(self) -> None:
        """Make the pretrained model."""
        if not (self.root / "base").exists():
            model = make_model(self.sizes, self.tokenizer, self.seed)
            for count in pretrain(model, self.tokenizer, self.sizes, self._random("captions")):
                self._advance(count)
            with part(self.root / "base", self.root) as folder:
                write_model(folder, model, self.tokenizer)
        self._advance_to(self.sizes.steps * self.sizes.batch)

    def make_general(self) -> None:
        """Make the general benchmark: a test split and its task file."""
        place = self.root / "data" / GENERAL.name
        if not place.exists():
            with part(place, self.root) as folder:
                pictures, labels = self.rows(GENERAL, "test")
                write_pictures(folder / "test.parquet", pictures, labels, GENERAL.labels)
        self._write(
            self.root / "general.yaml", task_text(GENERAL, f"data/{GENERAL.name}", ["test"])
        )

    def make_task(self, skill: Skill) -> None:
        """Make a task's data, its file and its finetuned model."""
        place = self.root / "data" / skill.name
        if not place.exists():
            with part(place, self.root) as folder:
                for split in SPLITS:
                    pictures, labels = self.rows(skill, split)
                    write_pictures(folder / f"{split}.parquet", pictures, labels, skill.labels)
        text = task_text(skill, f"../data/{skill.name}", SPLITS)
        self._write(self.root / "tasks" / f"{skill.name}.yaml", text)
        place = self.root / "models" / skill.name
        if not place.exists():
            model = self.load(self.root / "base")
            head = zero_shot_head(model, self.tokenizer, skill)
            pictures, labels = self.rows(skill, "train")
            order = self._random(f"{skill.name} order")
            for count in finetune(model, head, pictures, labels, self.sizes, order):
                self._advance(count)
            with part(place, self.root) as folder:
                write_model(folder, model, self.tokenizer)
        self._advance_to(self.sizes.steps * self.sizes.batch + self._finished())

    def make_line(self) -> None:
        """Write the line's file."""
        self._write(self.root / "line.yaml", line_text(LINE, DENSITY))

    def measure(self) -> dict[str, dict[str, float]]:
        """Test accuracy of the base on everything, and of each finetuned model on its task."""
        base = self.load(self.root / "base")
        results: dict[str, dict[str, float]] = {}
        for skill in (GENERAL, *TASKS):
            head = zero_shot_head(base, self.tokenizer, skill)
            pictures, labels = self.rows(skill, "test")
            results[skill.name] = {"base": accuracy(base, head, pictures, labels)}
            if skill is not GENERAL:
                tuned = self.load(self.root / "models" / skill.name)
                results[skill.name]["finetuned"] = accuracy(tuned, head, pictures, labels)
        return results

    def rows(self, skill: Skill, split: str) -> tuple[Pictures, Ints]:
        """The pictures and labels of a split, drawn again with the same result each time."""
        rng = self._random(f"{skill.name} {split}")
        sizes = self.sizes
        counts = {
            "train": sizes.tuning_rows,
            "validation": sizes.validation_rows,
            "test": sizes.general_rows if skill is GENERAL else sizes.test_rows,
        }
        labels = skill.balanced(rng, counts[split])
        return skill.pictures(rng, labels), labels

    def _random(self, purpose: str) -> Any:
        return generator(self.seed, purpose)

    def load(self, folder: Path) -> Any:
        """Load a model from its folder."""
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(folder, local_files_only=True).eval()

    def _write(self, place: Path, text: str) -> None:
        with part(place, self.root) as file:
            file.write_text(text, encoding="utf-8")

    def _finished(self) -> int:
        """The number of pictures that the finished models have seen in finetuning."""
        models = self.root / "models"
        return self.per_task * sum((models / skill.name).exists() for skill in TASKS)

    def _advance(self, count: int) -> None:
        self._advance_to(self.seen + count)

    def _advance_to(self, seen: int) -> None:
        self.seen = max(self.seen, seen)
        self.progress(self.seen, self.to_see)
