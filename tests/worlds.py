"""Small complete worlds: a base, finetuned models and tasks with data, as a user has them.

The labels of a task's rows are the predictions of its finetuned model, so that model scores 1, the
base less, and a merged model in between. The labels of the general benchmark are the predictions
of the base, so retention is 1 without a merge. Everything is random and seeded.
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
from PIL import Image

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.specs.head import HeadSpec
from tests.tiny_models import tiny_bert, tiny_clip, tweaked

BLOCKS = ("*encoder.layer.*",)
VISION = ("vision_model.encoder.layers.*",)
TEMPLATES = ("{}", "it is {}")
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
        root: the folder of the world.
        family: the family of the base.
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
        """Write a line's file; None removes a key, and masks are dataless by default."""
        if changes.get("localize") is not None:
            changes["localize"] = {"mode": "dataless", **changes["localize"]}
        values: dict[str, Any] = {
            "line": "demo",
            "base": str(self.base),
            "family": self.family,
            "method": "localize-and-stitch",
            "localize": {"mode": "dataless", "density": 0.3},
            "retention": str(self.root / "general.yaml"),
        }
        return write_yaml(file, {k: v for k, v in {**values, **changes}.items() if v is not None})

    def task(self, name: str) -> Path:
        """A task's file."""
        return self.root / f"{name}.yaml"


def text_world(root: Path) -> World:
    """A BERT with three skills, a second model with one of them, and one that wrecks the rest."""
    world = World(root, "text-encoder")
    tiny_bert(world.base)
    for seed, name in enumerate(SKILLS):
        tweaked(world.base, world.model(name), seed=seed, size=0.15, globs=BLOCKS)
    tweaked(world.model("colour"), world.model("colour-2"), seed=10, size=0.03, globs=BLOCKS)
    tweaked(world.base, world.model("wreck"), seed=11, size=3.0, globs=BLOCKS)
    for name in LABELS:
        texts = _texts(name)
        named = [LABELS[name][c] for c in _classes(world, name, texts)]
        rows = [{"text": t, "label": label} for t, label in zip(texts, named, strict=True)]
        write_rows(world.root / "data" / name / "test.jsonl", rows)
        columns = {"test": "test.jsonl", "input": "text", "label": "label"}
        _write_task(world, name, columns)
    return world


def clip_world(root: Path, make: Callable[[Path], Path] = tiny_clip, size: float = 0.1) -> World:
    """A CLIP with three skills as folders of images, and a general benchmark.

    Args:
        root: the folder of the world.
        make: makes the base, of the family `clip`.
        size: how far the finetuned models are from the base.
    """
    world = World(root, "clip")
    make(world.base)
    for seed, name in enumerate(SKILLS):
        tweaked(world.base, world.model(name), seed=seed, size=size, globs=VISION)
    for name in (*SKILLS, "general"):
        images = _images(name)
        for number, (image, found) in enumerate(
            zip(images, _classes(world, name, images), strict=True)
        ):
            file = world.root / "data" / name / "test" / LABELS[name][found] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
        _write_task(world, name, {"test": "test"})
    return world


def turned(
    world: World, folder: Path, name: str = "colour", *, right: int = 6, **changes: Any
) -> Path:
    """A task file with `right` right labels, the next one elsewhere: a model looks unskilled."""
    labels = LABELS[name]
    rows: list[dict[str, Any]] = []
    for line in (world.root / "data" / name / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        after = labels.index(row["label"]) + (len(rows) >= right)
        rows.append({**row, "label": labels[after % len(labels)]})
    write_rows(folder / "turned" / name / "test.jsonl", rows)
    return described(world, folder, name, path=str(folder / "turned" / name), **changes)


def described(world: World, folder: Path, name: str, path: str = "", **changes: Any) -> Path:
    """The task file of the world with changes."""
    values = yaml.safe_load(world.task(name).read_text())
    values["data"]["path"] = path or values["data"]["path"]
    number = len(list(folder.glob(f"{name}-*.yaml")))
    return write_yaml(folder / f"{name}-{number}.yaml", {**values, **changes})


def _write_task(world: World, name: str, columns: dict[str, str]) -> None:
    head = {"labels": list(LABELS[name]), "templates": list(TEMPLATES)}
    data = {"path": str(world.root / "data" / name), **columns}
    write_yaml(world.task(name), {"task": name, "data": data, "head": head})


def _texts(seed: str) -> list[str]:
    """Texts that differ much for a byte tokenizer: each uses few letters of its own."""
    draw = random.Random(seed)
    letters = [chr(c) for c in range(33, 126)]
    return [
        "".join(draw.choices(draw.sample(letters, 3), k=draw.randint(4, 20))) for _ in range(ROWS)
    ]


def _images(seed: str) -> list[Image.Image]:
    draw = random.Random(seed)
    return [Image.frombytes("RGB", (16, 16), draw.randbytes(768)) for _ in range(ROWS)]


def _classes(world: World, name: str, inputs: Sequence[Any]) -> list[int]:
    """The predictions of a task's model for inputs, with a head from the base."""
    family = get_family(world.family)
    folder = world.base if name == "general" else world.model(name)
    spec = HeadSpec(labels=LABELS[name], templates=TEMPLATES)
    head = family.build_head(family.load(world.base), world.base, spec)
    batch = family.preprocessor(world.base)([Example((i,), None, "") for i in inputs])
    with torch.inference_mode():
        classes: list[int] = family.logits(family.load(folder), batch, head).argmax(1).tolist()
    return classes


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
    """Copy a model's folder, and change the copy."""
    shutil.copytree(folder, target)
    if change is not None:
        change(target)
    return target
