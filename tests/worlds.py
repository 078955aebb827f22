"""Small whole worlds: a base, finetuned models and tasks with data, as a user would have them.

The classes of a task's rows are what its finetuned model says of them, so that model scores
1, the base less, and a merged model in between; those of the general benchmark are what the
base says, so retention is 1 where nothing was merged. All of it is random and seeded.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from modeling.family import get_family
from modeling.heads import HeadSpec
from modeling.rows import Example
from tests.tiny_models import tiny_bert, tweaked

BLOCKS = ("*encoder.layer.*",)
LABELS = {
    "colour": ("red", "green", "blue"),
    "number": ("one", "twenty two"),
    "animal": ("cat", "antelope", "dog", "wasp"),
    "wreck": ("no", "yes"),
    "general": ("north", "east", "south", "west", "up", "down"),
}
SKILLS = ("colour", "number", "animal")
ROWS = 60


@dataclass(frozen=True)
class World:
    """Folders and files of one world; models and data are shared and must not be changed.

    Attributes:
        root: where everything lies.
        family: of the base.
    """

    root: Path
    family: str

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.root / "base"

    def model(self, name: str) -> Path:
        """A finetuned model's folder."""
        return self.root / "models" / name

    def line(self, file: Path, **changes: Any) -> Path:
        """Write a line's file; dicts are merged into the defaults, None removes a key."""
        values: dict[str, Any] = {
            "line": "demo",
            "base": str(self.base),
            "family": self.family,
            "method": "localize-and-stitch",
            "localize": {"density": 0.3},
            "retention": str(self.root / "general.yaml"),
        }
        return write_yaml(file, {k: v for k, v in {**values, **changes}.items() if v is not None})

    def task(self, name: str) -> Path:
        """A task's file."""
        return self.root / f"{name}.yaml"


def text_world(root: Path) -> World:
    """A BERT with three skills, a second model of one, and one that wrecks the rest."""
    world = World(root, "text-encoder")
    tiny_bert(world.base)
    for seed, name in enumerate(SKILLS):
        tweaked(world.base, world.model(name), seed=seed, size=0.15, globs=BLOCKS)
    tweaked(world.base, world.model("colour-2"), seed=10, size=0.15, globs=BLOCKS)
    tweaked(world.base, world.model("wreck"), seed=11, size=3.0, globs=BLOCKS)
    for name in LABELS:
        _write_text_task(world, name)
    return world


def _write_text_task(world: World, name: str) -> None:
    texts = _texts(name, ROWS)
    folder = world.base if name == "general" else world.model(name)
    classes = _classes(world, folder, texts, LABELS[name])
    rows = [{"text": t, "label": LABELS[name][c]} for t, c in zip(texts, classes, strict=True)]
    write_rows(world.root / "data" / name / "test.jsonl", rows)
    write_yaml(
        world.task(name),
        {
            "task": name,
            "data": {
                "path": str(world.root / "data" / name),
                "test": "test.jsonl",
                "input": "text",
                "label": "label",
            },
            "head": {"labels": list(LABELS[name]), "templates": ["{}", "it is {}"]},
        },
    )


def _texts(seed: str, count: int) -> list[str]:
    """Texts that lie far from each other for a byte tokenizer: each has its own few letters."""
    draw = random.Random(seed)
    alphabet = [chr(c) for c in range(33, 126)]
    return [
        "".join(draw.choices(draw.sample(alphabet, 3), k=draw.randint(4, 20))) for _ in range(count)
    ]


def _classes(world: World, folder: Path, texts: list[str], labels: Sequence[str]) -> list[int]:
    """What a model says of texts, with the head that the base gives."""
    family = get_family(world.family)
    spec = HeadSpec(tuple(labels), ("{}", "it is {}"))
    head = family.build_head(family.load(world.base), world.base, spec)
    batch = family.preprocessor(world.base)([Example((t,), None, "") for t in texts])
    with torch.inference_mode():
        found: list[int] = family.logits(family.load(folder), batch, head).argmax(1).tolist()
    return found


def write_yaml(file: Path, values: dict[str, Any]) -> Path:
    """Write a YAML file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a JSON-lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def copied(folder: Path, target: Path, change: Callable[[Path], None] | None = None) -> Path:
    """A copy of a model's folder, changed."""
    shutil.copytree(folder, target)
    if change is not None:
        change(target)
    return target
