"""Lines of classifiers through the command: tasks with heads of their own, one merged encoder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForTokenClassification,
)

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.head import HeadSpec
from restitch.tasks.gain import likely_causes
from restitch.tasks.runtime.refs import LineRef
from tests.conftest import NewHome, leave_mlflow_alone
from tests.shell import Shell
from tests.tiny_models import tiny_classifier, tiny_encoder, tiny_image_model
from tests.worlds import World, write_rows, write_yaml

CLASSES = {"colour": ("red", "green", "blue"), "number": ("one", "two")}
GENERAL = ("north", "east", "south")
ROWS = 40


@dataclass(frozen=True)
class Line:
    """A home with a line of two members, and its world."""

    shell: Shell
    world: World
    registered: Mapping[str, Any]

    @property
    def record(self) -> Any:
        return self.registered["number"]["merged"]["record"]


def inputs_of(world: World, name: str) -> list[Any]:
    """The texts or images of a task, in the order of its rows."""
    texts = [f"{name[n % 3 :]} {name[: n % 5]} {n * 7919 % 97}" for n in range(ROWS)]
    if get_family(world.family).modality == "text":
        return texts
    random = torch.Generator().manual_seed(len(name))
    pixels = torch.randint(0, 256, (ROWS, 16, 16, 3), generator=random, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in pixels]


def scores(world: World, body: Path, head_of: Path, name: str, labels: tuple[str, ...]) -> Any:
    """The scores of a task's rows with the body of one model and the head of another."""
    family = get_family(world.family)
    spec = HeadSpec(labels=labels)
    head = family.build_head(family.load(world.base), world.base, spec, finetuned=head_of)
    rows = [Example((each,), None, "") for each in inputs_of(world, name)]
    with torch.inference_mode():
        return family.logits(family.load(body), family.preprocessor(world.base)(rows), head)


def describe(world: World, name: str, found: list[int], labels: tuple[str, ...]) -> None:
    """Write the rows and the file of a task, which leaves out the labels."""
    data: dict[str, Any] = {"path": str(world.root / "data" / name), "test": "test"}
    inputs = inputs_of(world, name)
    if get_family(world.family).modality == "text":
        rows = [{"text": t, "label": labels[c]} for t, c in zip(inputs, found, strict=True)]
        for split in ("train", "test"):
            write_rows(world.root / "data" / name / f"{split}.jsonl", rows)
        data["test"] = "test.jsonl"
    else:
        for number, (image, one) in enumerate(zip(inputs, found, strict=True)):
            for split in ("train", "test"):
                file = world.root / "data" / name / split / labels[one] / f"{number:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
    write_yaml(world.task(name), {"task": name, "data": data})


def classifiers(root: Path, family: str) -> World:
    """A base that is a classifier itself, two classifiers made from it, and their tasks."""
    world = World(root, family)
    make = tiny_encoder if family == "text-classifier" else tiny_image_model
    tiny_classifier(make(root / "encoder"), world.base, GENERAL, size=0.0)
    for seed, (name, labels) in enumerate(CLASSES.items(), 5):
        tiny_classifier(world.base, world.model(name), labels, seed=seed, size=0.3)
        found = scores(world, world.model(name), world.model(name), name, labels)
        describe(world, name, found.argmax(1).tolist(), labels)
    found = scores(world, world.base, world.base, "general", GENERAL)
    describe(world, "general", found.argmax(1).tolist(), GENERAL)
    return world


@pytest.fixture(scope="module", autouse=True)
def without_mlflow_in_this_module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_mlflow_alone(patch)
        yield


@pytest.fixture(scope="module", params=["text-classifier", "image-classifier"])
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Line:
    root = tmp_path_factory.mktemp("line")
    world = classifiers(root / "world", request.param)
    shell = Shell(root / "home")
    (root / "home").mkdir()
    shell("init", world.line(root / "line.yaml"))
    return Line(shell, world, {name: shell.add(world, name) for name in CLASSES})


@pytest.fixture(scope="module")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return classifiers(tmp_path_factory.mktemp("texts"), "text-classifier")


@pytest.fixture(scope="module")
def text_line(text_world: World, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A line of text classifiers without members, in which nothing may change."""
    root = tmp_path_factory.mktemp("empty")
    shell = Shell(root)
    shell("init", text_world.line(root / "line.yaml", retention=None))
    return shell


def test_each_task_is_measured_with_the_head_of_its_own_model(line: Line) -> None:
    for name, found in line.registered.items():
        assert (found["state"], found["merged"]["action"]) == ("ready", "promoted"), name
    for name, labels in CLASSES.items():
        result, model = line.record["results"][name], line.world.model(name)
        assert result["finetuned"] == 1.0, "its rows are labelled by what it says"
        right = scores(line.world, model, model, name, labels).argmax(1)
        base = scores(line.world, line.world.base, model, name, labels).argmax(1)
        assert result["base"] == int((base == right).sum()) / ROWS < 1.0
        assert result["count"] == ROWS
        spec = line.shell.state().tasks[name].spec
        assert spec.head is not None
        assert spec.head.labels == labels


def test_the_base_s_own_head_measures_what_is_retained(line: Line) -> None:
    assert line.record["retention"]["base"] == 1.0
    assert 0 < line.record["retention"]["ratio"] <= 1.0


def test_every_tensor_is_accounted_for(line: Line) -> None:
    facts = line.shell.state().tasks["colour"].versions[1].facts
    assert facts.unused is None
    assert not any("classifier" in name or "pooler" in name for name, _ in facts.outside_tensors)


@pytest.mark.parametrize("name", CLASSES)
def test_a_task_is_exported_as_a_classifier_that_gives_the_measured_answers(
    line: Line, tmp_path: Path, name: str
) -> None:
    out, labels = tmp_path / "out", CLASSES[name]
    said = line.shell("export", "demo", "champion", out, "--task", name).out
    assert f"with the head of {name} is in" in " ".join(said.split())
    images = line.world.family == "image-classifier"
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    model, report = auto.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.num_labels == len(labels)
    rows = [Example((each,), None, "") for each in inputs_of(line.world, name)]
    with torch.no_grad():
        found = model(**get_family(line.world.family).preprocessor(out)(rows)).logits
    torch.testing.assert_close(found, scores(line.world, out, out, name, labels))
    own = line.world.model(name)
    right = scores(line.world, own, own, name, labels).argmax(1)
    assert int((found.argmax(1) == right).sum()) / ROWS == line.record["results"][name]["merged"]
    assert f"--task {name}" in (out / "README.md").read_text()


def test_without_a_task_the_encoder_and_all_heads_are_exported(line: Line, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line.shell("export", "demo", "champion", out)
    for name, labels in CLASSES.items():
        head = Head.from_bytes((out / "heads" / f"{name}.safetensors").read_bytes())
        assert head.spec.labels == labels
        own = line.world.model(name)
        alone = tmp_path / name
        line.shell("export", "demo", "champion", alone, "--task", name)
        expected = scores(line.world, alone, alone, name, labels)
        assert torch.equal(scores(line.world, out, own, name, labels), expected)


def test_unknown_tasks_and_specialists_are_explained(line: Line, tmp_path: Path) -> None:
    done = line.shell("export", "demo", "champion", tmp_path / "x", "--task", "nobody", code=3)
    assert "holds no task nobody" in done.err
    assert "colour, number" in done.err
    args = ("export", "demo", "champion", tmp_path / "x", "--task", "colour", "--specialist")
    assert "has no specialists" in line.shell(*args, code=3).err
    line.shell("export", "demo", "champion", tmp_path / "x", "--specialist", code=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_all_commands_run_on_a_line_of_classifiers(line: Line, tmp_path: Path) -> None:
    line.shell("remerge", "demo")
    shown = line.shell("show", "demo", "champion").out
    assert all(name in shown for name in CLASSES)
    line.shell("diff", "demo", "1", "2")
    line.shell("evaluate", "demo")
    line.shell("compare", "demo", "--methods", "task-arithmetic")
    line.shell("analyze", "demo")
    line.shell("study", "agreement", "demo")
    line.shell("experts", "demo")
    args = ("export", "demo", "champion", tmp_path / "own", "--task", "colour", "--specialist")
    assert "the specialist for colour" in " ".join(line.shell(*args).out.split())
    assert (
        scores(line.world, tmp_path / "own", tmp_path / "own", "colour", CLASSES["colour"])
        .isfinite()
        .all()
    )
    assert line.shell.json("verify", "demo")["intact"] is True


def test_a_task_keeps_classes_that_the_head_of_its_model_has(line: Line, tmp_path: Path) -> None:
    before = line.shell.head_bytes()
    labels = [*CLASSES["colour"], "brown"]
    file = changed(line.world, tmp_path, "colour", head={"labels": labels})
    done = line.shell("task", "demo", "--task", file, "--replace-task", code=3)
    assert "the 4 classes of the task" in " ".join(done.err.split())
    assert line.shell.head_bytes() == before


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("trained", marks=pytest.mark.slow),
        pytest.param("fisher", marks=pytest.mark.slow),
        "distilled",
    ],
)
def test_every_localizer_uses_the_task_s_own_head(
    text_world: World, shell: Shell, tmp_path: Path, mode: str
) -> None:
    localize = {"mode": mode, "density": 0.3, "shots": 4, "epochs": 1}
    shell("init", text_world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    for name in CLASSES:
        file = changed(text_world, tmp_path, name, data={"train": "train.jsonl"})
        shell("register", "demo", "--task", file, "--model", text_world.model(name))
        version = shell.state().tasks[name].versions[1]
        assert version.state == "ready", name
        assert version.facts.calibrated_with == ("labels" if mode == "trained" else "inputs")


@pytest.mark.parametrize("method", ["mats", "fisher-merging"])
def test_methods_with_statistics_measure_classifiers(
    text_world: World, shell: Shell, tmp_path: Path, method: str
) -> None:
    file = text_world.line(tmp_path / "line.yaml", retention=None, method=method, localize=None)
    shell("init", file)
    for name in CLASSES:
        task = changed(text_world, tmp_path, name, data={"train": "train.jsonl"})
        shell("register", "demo", "--task", task, "--model", text_world.model(name))
    assert set(shell.json("show", "demo", "champion")["members"]) == set(CLASSES)


def changed(world: World, folder: Path, name: str, **changes: Any) -> Path:
    """The task file of the world with changes; those of `data` are added to it."""
    values = yaml.safe_load(world.task(name).read_text())
    data = {**values["data"], **changes.pop("data", {})}
    number = len(list(folder.glob("*.yaml")))
    return write_yaml(folder / f"task-{number}.yaml", {**values, "data": data, **changes})


def test_versions_of_a_task_have_heads_of_their_own(
    text_world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", text_world.line(tmp_path / "line.yaml", retention=None))
    shell.add(text_world, "colour")
    first = shell.state().tasks["colour"].versions[1].facts.results["finetuned"]
    # The same encoder with its classes in another order: the names say which is which.
    order = [2, 0, 1]
    folder = tmp_path / "second"
    shutil.copytree(text_world.model("colour"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][order]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = {str(place): CLASSES["colour"][old] for place, old in enumerate(order)}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": names}))
    done = shell("register", "demo", "--task", text_world.task("colour"), "--model", folder)
    assert "matched by name" in " ".join((done.out + done.err).split())
    second = shell.state().tasks["colour"].versions[2]
    assert second.facts.results["finetuned"].value == first.value == 1.0
    assert shell.state().tasks["colour"].spec.head is not None


def another(world: World, folder: Path, kind: str) -> Path:
    """A finetuned model that cannot join, with the tokenizer of the base."""
    labels = dict(enumerate(CLASSES["colour"]))
    target = folder / "model"
    if kind == "file":
        return world.model("colour") / "model.safetensors"
    if kind == "bare":
        return world.root / "encoder"
    if kind == "regression":
        return tiny_classifier(world.base, target, ("score",), seed=9)
    shutil.copytree(world.base, target)
    if kind == "masked":
        BertForMaskedLM.from_pretrained(world.base).save_pretrained(target)
    elif kind == "token":
        token = BertForTokenClassification.from_pretrained(
            world.base, id2label=labels, ignore_mismatched_sizes=True
        )
        token.save_pretrained(target)
    else:
        shutil.rmtree(target)
        shutil.copytree(world.model("colour"), target)
        config = json.loads((target / "config.json").read_text())
        config["problem_type"] = "multi_label_classification"
        (target / "config.json").write_text(json.dumps(config))
    return target


BAD = {
    "two classes for a head of three": (
        {"head": {"labels": ["red", "green"]}}, "", "the 2 classes of the task",
    ),
    "other names": (
        {"head": {"labels": ["a", "b", "c"]}, "data": {"classes": ["red", "green", "blue"]}}, "",
        "other names than those of the task",
    ),
    "templates": (
        {"head": {"labels": ["red", "green", "blue"], "templates": ["a {}"]}}, "",
        "has head: templates, which the family text-classifier does not read",
    ),
    "a scale": ({"head": {"labels": ["red", "green", "blue"]}, "scale": 2.0}, "", "has scale"),
    "a prompt": ({"prompt": "{text}?", "choices": ["a", "b"]}, "", "has a prompt, which"),
    "a bare encoder": ({}, "bare", "found: BertModel"),
    "a bare encoder with labels": (
        {"head": {"labels": ["red", "green", "blue"]}}, "bare", "missing: classifier.weight",
    ),
    "a masked language model": ({}, "masked", "found: BertForMaskedLM"),
    "a token classifier": (
        {"head": {"labels": ["red", "green", "blue"]}}, "token",
        "found: BertForTokenClassification",
    ),
    "a regression": ({}, "regression", "is a regression"),
    "several labels per row": ({}, "several", "gives several labels to a row"),
    "a file alone": (
        {"head": {"labels": ["red", "green", "blue"]}}, "file", "is a file alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "model", "message"), BAD.values(), ids=BAD)
def test_a_head_that_does_not_fit_is_explained_and_changes_nothing(
    text_world: World,
    text_line: Shell,
    tmp_path: Path,
    changes: dict[str, Any],
    model: str,
    message: str,
) -> None:
    before = text_line.head_bytes()
    file = changed(text_world, tmp_path, "colour", **changes)
    folder = another(text_world, tmp_path, model) if model else text_world.model("colour")
    done = text_line("register", "demo", "--task", file, "--model", folder, code=3)
    assert message in " ".join(done.err.split())
    assert text_line.head_bytes() == before


def test_labels_may_be_left_out_only_if_a_model_has_them(
    text_world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", text_world.line(tmp_path / "line.yaml", retention=None))
    done = shell("task", "demo", "--task", text_world.task("colour"), code=3)
    assert "has data but no head" in done.err
    labels = ["blue", "red", "green"]
    file = changed(text_world, tmp_path, "colour", head={"labels": labels})
    shell("task", "demo", "--task", file)
    shell.add(text_world, "colour")
    spec = shell.state().tasks["colour"].spec
    assert spec.head is not None
    assert spec.head.labels == tuple(labels)
    assert shell.state().tasks["colour"].versions[1].facts.results["finetuned"].value == 1.0


def test_a_benchmark_needs_a_base_that_is_a_classifier(
    text_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("bare")
    bare = text_world.line(tmp_path / "line.yaml", base=str(text_world.root / "encoder"))
    done = shell("init", bare, code=3)
    assert "no head for a classification" in " ".join(done.err.split())
    assert shell.json("status")["lines"] == []
    labels = {"head": {"labels": [*GENERAL, "west"]}}
    other = changed(text_world, tmp_path, "general", **labels)
    done = shell("init", text_world.line(tmp_path / "line.yaml", retention=str(other)), code=3)
    assert "another number of classes" in " ".join(done.err.split())
    named = text_world.line(
        tmp_path / "line.yaml", base=str(text_world.root / "encoder"), retention="colour"
    )
    done = shell("init", named, code=3)
    assert "no head for the benchmark colour" in " ".join(done.err.split())


def test_a_task_of_the_line_may_be_the_benchmark_of_the_base_s_own_head(
    text_world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", text_world.line(tmp_path / "line.yaml", retention="general"))
    two = changed(text_world, tmp_path, "general", head={"labels": [*GENERAL, "west"]})
    done = shell("task", "demo", "--task", two, code=3)
    assert "no head for the benchmark general" in " ".join(done.err.split())
    shell("task", "demo", "--task", text_world.task("general"))  # labels: those of the base
    found = shell.add(text_world, "colour")
    assert found["merged"]["record"]["retention"]["base"] == 1.0


@pytest.mark.parametrize("kind", ["bert", "a masked language model", "vit"])
def test_a_base_without_a_classifier_becomes_one_in_the_export(
    new_home: NewHome, tmp_path: Path, kind: str
) -> None:
    shell = new_home("bare")
    world = World(tmp_path / "world", "image-classifier" if kind == "vit" else "text-classifier")
    (tiny_image_model if kind == "vit" else tiny_encoder)(world.base)
    if kind == "a masked language model":
        BertForMaskedLM.from_pretrained(world.base).save_pretrained(world.base)
    labels, own = CLASSES["colour"], world.model("colour")
    tiny_classifier(world.base, own, labels, size=0.3)
    found = scores(world, own, own, "colour", labels)
    describe(world, "colour", found.argmax(1).tolist(), labels)
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    merged = shell.add(world, "colour")["merged"]
    assert merged["action"] == "promoted"
    shell("export", "demo", "champion", tmp_path / "out", "--task", "colour")
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    _, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    answers = scores(world, tmp_path / "out", tmp_path / "out", "colour", labels).argmax(1)
    share = int((answers == found.argmax(1)).sum()) / ROWS
    assert share == merged["record"]["results"]["colour"]["merged"]


def test_a_base_with_batch_norm_is_refused(new_home: NewHome, tmp_path: Path) -> None:
    shell = new_home("norm")
    world = World(tmp_path, "image-classifier")
    tiny_image_model(world.base, "resnet")
    done = shell("init", world.line(tmp_path / "line.yaml", retention=None), code=3)
    text = " ".join(done.err.split())
    assert "BatchNorm keeps statistics of the unmerged weights" in text
    assert "running_mean" in text
    assert shell.json("status")["lines"] == []


def test_two_families_on_one_base_do_not_share_a_loaded_model(
    text_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("both")
    head = {"labels": list(GENERAL)}
    task = changed(text_world, tmp_path, "general", head=head)
    for family in ("text-classifier", "text-encoder"):
        file = text_world.line(tmp_path / f"{family}.yaml", line=family, family=family,
                               retention=None)  # fmt: skip
        shell("init", file)
        args = ("--task", task, "--model", text_world.model("colour"), "--accept-no-gain",
                "--reason", "a test")  # fmt: skip
        done = shell("register", family, *args, code=None)
        assert done.code == (0 if family == "text-encoder" else 3), done.err
        shell("status")


def test_a_line_without_classifiers_names_the_family_that_would_use_the_head(
    text_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("encoder")
    file = text_world.line(tmp_path / "line.yaml", base=str(text_world.root / "encoder"),
                           family="text-encoder", retention=None)  # fmt: skip
    shell("init", file)
    task = changed(text_world, tmp_path, "colour", head={"labels": list(CLASSES["colour"])})
    model = text_world.model("colour")
    args = ("--task", task, "--model", model, "--accept-no-gain", "--reason", "a test")
    shell("register", "demo", *args)
    state = shell.state()
    spec, facts = state.tasks["colour"].spec, state.tasks["colour"].versions[1].facts
    causes = likely_causes(LineRef(state.spec, state.base), spec, facts)
    assert any("use it in a line of family text-classifier" in cause for cause in causes)


def test_a_purge_removes_the_head_of_the_model(
    text_world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", text_world.line(tmp_path / "line.yaml", retention=None))
    for name in CLASSES:
        shell.add(text_world, name)
    keys = shell.home / "store" / "keys" / "head"
    before = set(keys.iterdir())
    assert len(before) == 2
    shell("forget", "demo", "number", "--purge", "--yes", "--reason", "a mistake")
    assert len(before - set(keys.iterdir())) == 1
    shell("export", "demo", "champion", tmp_path / "out", "--task", "colour")
