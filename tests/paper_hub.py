"""Stand-ins on a local hub for the models and data sets of a paper file.

Ids, splits, columns, kinds of labels and class names are those of the paper; models are tiny ones
of the same architecture with random weights, and images are noise. The labels of test rows are the
answers of the task's own model, those of the general benchmark the answers of the base, so that
accuracies and retention are not zero.
"""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from restitch.modeling.data.imagenet import openai_imagenet
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.paper import Paper
from restitch.registry.specs.task import HeadSpec, TaskSpec
from tests.hub_server import FakeHub
from tests.tiny_models import tiny_clip, tweaked, vision_tower

VISION = ("vision_model.encoder.layers.*",)
TEST_ROWS = 24


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder, as a commit has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def serve_clip(hub: FakeHub, paper: Paper, folder: Path) -> None:
    """Put the base, the vision towers and the data sets of a paper of CLIP on a hub."""
    base = tiny_clip(folder / "base")
    hub.commit(paper.spec.base, files_of(base))
    for seed, (name, spec) in enumerate(paper.tasks.items()):
        model = tweaked(base, folder / "whole" / name, seed=seed, size=0.1, globs=VISION)
        tower = vision_tower(model, folder / "towers" / name, prefix="vision_model.")
        hub.commit(paper.models[name], files_of(tower))
        serve_images(hub, base, model, spec)
    benchmark = paper.line_spec.retention
    if isinstance(benchmark, TaskSpec):
        serve_images(hub, base, base, benchmark)


def serve_images(hub: FakeHub, base: Path, model: Path, spec: TaskSpec) -> None:
    """Put the data set of a task on a hub: two train rows for each class, and some test rows."""
    data = spec.data
    assert data is not None
    draw = random.Random(spec.task)
    head = _head_spec(spec)
    count = len(head.classes)
    splits: dict[str, tuple[list[Any], list[int]]] = {}
    if data.train is not None:
        targets = [index for index in range(count) for _ in range(2)]
        splits[data.train] = ([noise(draw) for _ in targets], targets)
    images = [noise(draw) for _ in range(TEST_ROWS)]
    assert data.test is not None
    splits[data.test] = (images, _answers(base, model, head, images))
    name, _, config = data.path.partition(":")
    files = {}
    for split, (inputs, targets) in splits.items():
        rows = Dataset.from_dict(
            {data.input[0]: inputs, str(data.label): _labels(spec, targets)},
            features=Features({data.input[0]: Image(), str(data.label): _kind(spec, head.classes)}),
        )
        file = io.BytesIO()
        rows.to_parquet(file)
        files[f"{config or 'data'}/{split}-00000-of-00001.parquet"] = file.getvalue()
    if config:
        listed = "".join(f"  - {{split: {s}, path: '{config}/{s}-*'}}\n" for s in splits)
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n"
        files["README.md"] = card.encode()
    hub.commit(name, files, kind="datasets")


def noise(draw: random.Random) -> Any:
    """A small image as a data set has it."""
    file = io.BytesIO()
    Pillow.frombytes("RGB", (16, 16), draw.randbytes(768)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _head_spec(spec: TaskSpec) -> HeadSpec:
    head = spec.head_spec
    if head.labels == "openai":
        labels, templates = openai_imagenet()
        return HeadSpec(labels=labels, templates=templates)
    return head


def _labels(spec: TaskSpec, targets: Sequence[int]) -> list[Any]:
    assert spec.data is not None
    return [bool(t) for t in targets] if spec.data.classes == ("false", "true") else list(targets)


def _kind(spec: TaskSpec, labels: Sequence[str]) -> Any:
    """The type of the label column: booleans, numbers, or classes with names of their own."""
    assert spec.data is not None
    if spec.data.classes is not None:
        return Value("bool")
    if spec.data.label == "cls":
        return Value("int64")
    return ClassLabel(names=[label.replace(" ", "_") for label in labels])


def _answers(base: Path, model: Path, spec: HeadSpec, images: Sequence[Any]) -> list[int]:
    """The classes that a model finds, with a head from the base."""
    family = get_family("clip")
    head: Head = family.build_head(family.load(base), base, family.resolve(base, spec))
    opened = [Pillow.open(io.BytesIO(image["bytes"])) for image in images]
    batch = family.preprocessor(base)([Example((image,), None, "") for image in opened])
    with torch.inference_mode():
        found: list[int] = family.logits(family.load(model), batch, head).argmax(1).tolist()
    return found
