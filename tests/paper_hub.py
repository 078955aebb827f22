"""Stand-ins on a local hub for the models and data sets of a paper file.

Ids, splits, columns, kinds of labels and class names are those of the paper; models are tiny ones
of the same architecture with random weights, images are noise and texts are made up. The labels of
the images to report on are the answers of the task's own model, those of the general benchmark the
answers of the base, so that accuracies and retention are not zero.
"""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from restitch.modeling.data.imagenet import openai_imagenet
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.paper import Paper
from restitch.registry.specs.prompt import MASK
from restitch.registry.specs.task import TaskSpec
from tests.hub_server import FakeHub
from tests.tiny_models import (
    WORDS,
    tiny_classifier,
    tiny_clip,
    tiny_decoder,
    tiny_masked,
    tiny_seq2seq,
    tweaked,
    vision_tower,
)

TEST_ROWS = 24
UNLABELLED = 8  # each row of this number has no label, where the task names rows without
BLOCKS = ("*encoder.layers.*", "*encoder.layer.*", "*.h.*", "*block.*", "*model.layers.*")
# The class names of data sets that differ from those of their task.
ENTAILMENT = ("entailment", "neutral", "contradiction")
NAMED = {
    "nyu-mll/glue:cola": ("unacceptable", "acceptable"),
    "nyu-mll/glue:mnli": ENTAILMENT,
    "nyu-mll/glue:mrpc": ("not_equivalent", "equivalent"),
    "nyu-mll/glue:qnli": ("entailment", "not_entailment"),
    "nyu-mll/glue:qqp": ("not_duplicate", "duplicate"),
    "nyu-mll/glue:rte": ("entailment", "not_entailment"),
    "nyu-mll/glue:sst2": ("negative", "positive"),
    "stanfordnlp/snli": ENTAILMENT,
    "cornell-movie-review-data/rotten_tomatoes": ("neg", "pos"),
}


@dataclass
class Repository:
    """The files of a data set, and its configurations with their splits."""

    files: dict[str, bytes] = field(default_factory=dict)
    configs: dict[str, set[str]] = field(default_factory=dict)


def serve_paper(hub: FakeHub, paper: Paper, folder: Path) -> None:
    """Put the base, the models and the data sets of a paper on a hub."""
    family = paper.spec.family
    base = _BASES[family](folder / "base", paper)
    hub.commit(paper.spec.base, _files_of(base))
    data: dict[str, Repository] = {}
    for seed, (name, spec) in enumerate(paper.tasks.items(), 1):
        model = _finetuned(family, base, folder / "models" / name, seed, spec)
        published = vision_tower(model, folder / "towers" / name) if family == "clip" else model
        hub.commit(paper.models[name], _files_of(published))
        _add_rows(data, spec, _test_targets(family, base, model, spec), family)
    benchmark = paper.line_spec.retention
    if isinstance(benchmark, TaskSpec):
        _add_rows(data, benchmark, _test_targets(family, base, base, benchmark), family)
    for name, repository in data.items():
        hub.commit(name, repository.files | _card(repository), kind="datasets")


def _files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _masked(folder: Path, paper: Paper) -> Path:
    answers = {answer for spec in paper.tasks.values() for answer in spec.choices or ()}
    return tiny_masked(folder, max_length=96, known=(*WORDS, *sorted(answers)))


def _gpt2(folder: Path, _: Paper) -> Path:
    """As the file of GPT-2 on the hub: without a prefix, and with the masks of its attention."""
    file = tiny_decoder(folder, "gpt2") / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    size = tensors["wpe.weight"].shape[0]
    mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    save_file(tensors | masks, file, metadata={"format": "pt"})
    return folder


_BASES: dict[str, Callable[[Path, Paper], Path]] = {
    "clip": lambda folder, _: tiny_clip(folder),
    "text-classifier": _gpt2,
    "masked-lm": _masked,
    "seq2seq-lm": lambda folder, _: tiny_seq2seq(folder, "flan-t5", max_length=400),
    "causal-lm": lambda folder, _: tiny_decoder(folder, positions=2048),
}


def _finetuned(family: str, base: Path, folder: Path, seed: int, spec: TaskSpec) -> Path:
    body = base
    if family == "text-classifier":
        labels = [f"LABEL_{index}" for index in range(_class_count(spec))]
        body = tiny_classifier(base, folder.with_name(f"{folder.name}-head"), labels, seed=seed)
    return tweaked(body, folder, seed=seed, size=0.1, globs=BLOCKS)


def _class_count(spec: TaskSpec) -> int:
    head = spec.head.labels if spec.head is not None else None
    if head == "openai":
        return 1000
    assert spec.data is not None
    return len(head or spec.choices or NAMED.get(spec.data.path, ()))


def _test_targets(family: str, base: Path, model: Path, spec: TaskSpec) -> "Targets":
    """The rows to report on, with the answers of a model if they are images."""
    draw = random.Random(spec.task)
    if family != "clip":
        return Targets(draw, [index % max(_class_count(spec), 1) for index in range(TEST_ROWS)])
    images = [_noise(draw) for _ in range(TEST_ROWS)]
    return Targets(draw, _answers(base, model, _head_spec(spec), images), images)


@dataclass
class Targets:
    """The classes of the rows to report on, their images, and random numbers for more rows."""

    draw: random.Random
    classes: Sequence[int]
    images: Sequence[Any] = ()


def _add_rows(data: dict[str, Repository], spec: TaskSpec, test: Targets, family: str) -> None:
    """Add the splits of a task to its data set: two train rows for each class, and test rows."""
    rows = spec.rows_spec.with_columns("image" if family == "clip" else "text")
    name, _, config = rows.path.partition(":")
    repository = data.setdefault(name, Repository())
    assert rows.test is not None
    splits: dict[str, tuple[Sequence[int], Sequence[Any]]] = {
        rows.test: (test.classes, test.images)
    }
    if rows.train is not None:
        count = max(2 * _class_count(spec), 12)
        classes = [index // 2 % max(_class_count(spec), 1) for index in range(count)]
        drawn = [_noise(test.draw) for _ in classes] if family == "clip" else []
        splits[rows.train] = (classes, drawn)
    for split, (targets, images) in splits.items():
        columns: dict[str, tuple[Any, list[Any]]] = {}
        for column in rows.input:
            if column != MASK:
                texts = [_text(test.draw, target) for target in targets]
                columns[column] = (Image(), list(images)) if images else (Value("string"), texts)
        if not spec.is_of_text:
            columns[str(rows.label)] = _labels(spec, rows, targets)
        repository.configs.setdefault(config, set()).add(split)
        repository.files[f"{config or 'data'}/{split}-00000-of-00001.parquet"] = _parquet(columns)


def _labels(spec: TaskSpec, rows: DataSpec, targets: Sequence[int]) -> tuple[Any, list[Any]]:
    """The label column: booleans, names, numbers, or indices of classes that the data set names."""
    if rows.classes == ("false", "true"):
        return Value("bool"), [bool(target) for target in targets]
    if rows.classes is not None:
        return Value("string"), [rows.classes[target] for target in targets]
    if rows.unlabelled is not None:
        without = int(rows.unlabelled)
        targets = [without if row % UNLABELLED == 0 else t for row, t in enumerate(targets)]
    if spec.answer is not None:
        return Value("float32"), [index % 26 / 5 for index in range(len(targets))]
    names = NAMED.get(rows.path)
    if names is None and spec.head is not None and isinstance(spec.head.labels, tuple):
        names = tuple(label.replace(" ", "_") for label in spec.head.labels)
    if names is None or rows.label == "cls":
        return Value("int64"), list(targets)
    return ClassLabel(names=list(names)), list(targets)


def _parquet(columns: Mapping[str, tuple[Any, list[Any]]]) -> bytes:
    file = io.BytesIO()
    features = Features({name: kind for name, (kind, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    Dataset.from_dict(values, features=features).to_parquet(file)
    return file.getvalue()


def _card(repository: Repository) -> dict[str, bytes]:
    """The card that lists configurations; without it a data set has one."""
    if set(repository.configs) == {""}:
        return {}
    lines = ["---", "configs:"]
    for config, splits in sorted(repository.configs.items()):
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {s}, path: '{config}/{s}-*'}}" for s in sorted(splits)]
    return {"README.md": "\n".join([*lines, "---", ""]).encode()}


def _text(draw: random.Random, target: int) -> str:
    """A text that differs with its class."""
    letters = "abcdefghijklmnopqrst"[target % 20 :][:3]
    return " ".join("".join(draw.choices(letters, k=3)) for _ in range(4))


def _noise(draw: random.Random) -> Any:
    """A small image as a data set has it."""
    file = io.BytesIO()
    Pillow.frombytes("RGB", (16, 16), draw.randbytes(768)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _head_spec(spec: TaskSpec) -> HeadSpec:
    head = spec.head_spec
    if head.labels != "openai":
        return head
    labels, templates = openai_imagenet()
    return HeadSpec(labels=labels, templates=templates)


def _answers(base: Path, model: Path, spec: HeadSpec, images: Sequence[Any]) -> list[int]:
    """The classes that a model finds, with a head from the base."""
    family = get_family("clip")
    head: Head = family.build_head(family.load(base), base, family.resolve(base, spec))
    opened = [Pillow.open(io.BytesIO(image["bytes"])) for image in images]
    batch = family.preprocessor(base)([Example((image,), None, "") for image in opened])
    with torch.inference_mode():
        found: list[int] = family.logits(family.load(model), batch, head).argmax(1).tolist()
    return found
