"""ImageNet: OpenAI's names without importing their package, and which folder is which class."""

import importlib.metadata
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.imagenet import openai_imagenet, parse_metadata, synset_classes
from restitch.modeling.data.task_data import Rows, TaskData, data_digest, open_split
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import png
from tests.tiny_models import tiny_clip

LABELS = ("tench", "goldfish", "missile", "missile")
SYNSETS = ("n01440764", "n01443537", "n03773504", "n04008634")

has_open_clip = pytest.mark.skipif(
    not any(d.name == "open_clip_torch" for d in importlib.metadata.distributions()),
    reason="open_clip_torch is not installed (pip install --no-deps open_clip_torch)",
)


@has_open_clip
def test_openai_s_names_and_templates_are_those_of_the_package():
    names, templates = openai_imagenet()
    assert (len(names), len(templates)) == (1000, 80)
    assert names[:2] == ("tench", "goldfish")
    assert templates[0] == "a bad photo of a {}."
    file = importlib.metadata.distribution("open_clip_torch").locate_file(
        "open_clip/zero_shot_metadata.py"
    )
    real = runpy.run_path(str(file))
    assert names == tuple(real["IMAGENET_CLASSNAMES"])
    for text, template in zip(templates, real["OPENAI_IMAGENET_TEMPLATES"], strict=True):
        assert text.replace("{}", "a {b} c") == template("a {b} c")


@has_open_clip
def test_open_clip_is_never_imported():
    code = (
        "import sys; from restitch.modeling.data.imagenet import openai_imagenet\n"
        "openai_imagenet()\n"
        "print(any(m.startswith(('open_clip', 'torchvision')) for m in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(BadInput, match="pip install --no-deps open_clip_torch"):
        openai_imagenet()


@pytest.mark.parametrize(
    "source",
    [
        "",
        "IMAGENET_CLASSNAMES = make()\nOPENAI_IMAGENET_TEMPLATES = ()",
        "IMAGENET_CLASSNAMES = ('a',)\nOPENAI_IMAGENET_TEMPLATES = (str,)",
        "IMAGENET_CLASSNAMES = ('a',)\nOPENAI_IMAGENET_TEMPLATES = (lambda c: f'{c()}',)",
    ],
)
def test_a_file_of_another_form_is_not_guessed_at(source):
    with pytest.raises(BadInput, match="an unknown form"):
        parse_metadata(source)


def write_synsets(root: Path, synsets: tuple[str, ...]) -> None:
    for index, synset in enumerate(synsets):
        (root / synset).mkdir(parents=True)
        (root / synset / "a.JPEG").write_bytes(png(index))


def read(root: Path) -> Rows:
    spec = DataSpec(path=str(root), test="val", input=("image",))
    return open_split(spec, "test", labels=LABELS, modality="image")


def test_all_synset_folders_are_the_classes_in_sorted_order(tmp_path):
    write_synsets(tmp_path / "val", tuple(reversed(SYNSETS)))
    assert read(tmp_path).targets.tolist() == [0, 1, 2, 3]


def test_synsets_are_sorted_in_any_order_of_input():
    found = synset_classes(SYNSETS[::-1], LABELS, None, "here")
    assert found == {name: index for index, name in enumerate(SYNSETS)}


def test_fewer_folders_than_labels_need_a_file_that_says_which(tmp_path):
    write_synsets(tmp_path / "val", SYNSETS[1:3])
    with pytest.raises(BadInput, match="2 synset folders for 4 labels") as caught:
        read(tmp_path)
    assert "synset<TAB>name" in str(caught.value)


def test_a_file_of_the_folders_names_their_classes(tmp_path):
    write_synsets(tmp_path / "val", SYNSETS[:2])
    (tmp_path / "synsets.txt").write_text(f"{SYNSETS[1]}\ttench\n{SYNSETS[0]}\tgoldfish\n")
    assert read(tmp_path).targets.tolist() == [1, 0]


def test_a_file_of_all_synsets_tells_classes_of_one_name_apart(tmp_path):
    write_synsets(tmp_path / "val", SYNSETS[2:])
    lines = [f"{s}\t{n}\n" for s, n in zip(SYNSETS, LABELS, strict=True)]
    (tmp_path / "val" / "synsets.txt").write_text("".join(reversed(lines)))
    assert read(tmp_path).targets.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{SYNSETS[0]}\ttench\n", "does not list all synsets"),
        (f"{SYNSETS[0]}\ttench\n{SYNSETS[2]}\tshark\n", "not among the labels"),
        (f"{SYNSETS[0]}\ttench\n{SYNSETS[2]}\tmissile\n", "several classes share"),
        (f"{SYNSETS[0]} tench\n", "line 1 cannot be used"),
        (f"{SYNSETS[0]}\ta\n{SYNSETS[0]}\tb\n", "line 2 cannot be used"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(tmp_path, content, message):
    write_synsets(tmp_path / "val", (SYNSETS[0], SYNSETS[2]))
    (tmp_path / "synsets.txt").write_text(content)
    with pytest.raises(BadInput, match=message):
        read(tmp_path)


def test_the_synsets_file_enters_the_digest(tmp_path):
    write_synsets(tmp_path / "val", SYNSETS[:2])
    found = []
    for pair in (("tench", "goldfish"), ("goldfish", "tench")):
        lines = [f"{s}\t{n}\n" for s, n in zip(SYNSETS[:2], pair, strict=True)]
        (tmp_path / "synsets.txt").write_text("".join(lines))
        spec = DataSpec(path=str(tmp_path), test="val", input=("image",))
        found.append(data_digest(spec))
    assert found[0] != found[1]


def whole_path(folder: Path, *, size: int, templates: tuple[str, ...]) -> float:
    """A thousand synset folders through head and evaluation; gives the head's seconds."""
    base = tiny_clip(folder / "base", image_size=size)
    names, _ = openai_imagenet()
    image = png(0, (24, 18))
    for index in range(1000):
        place = folder / "val" / f"n{index:08d}"
        place.mkdir(parents=True)
        (place / "one.png").write_bytes(image)
    family = get_family("clip")
    model = family.load(base)
    seen: list[tuple[int, int]] = []
    started = time.perf_counter()
    head = family.build_head(
        model,
        base,
        HeadSpec(labels=names, templates=templates),
        progress=lambda *done: seen.append(done),
    )
    seconds = time.perf_counter() - started
    distinct = len({t.replace("{}", n) for n in names for t in templates})
    assert seen[-1] == (distinct, distinct)
    assert head.tensors["weight"].shape[0] == 1000
    data = TaskData(DataSpec(path=str(folder), test="val", input=("image",)), names, "image")
    found = evaluate(family, model, head, data.rows("test"), family.preprocessor(base))
    # One picture for all: exactly one class is right, and five among the first five.
    assert (found.count, found.value, found.more) == (1000, 0.001, {"top5": 0.005})
    assert Head.from_bytes(head.to_bytes()).to_bytes() == head.to_bytes()
    return seconds


@has_open_clip
def test_a_thousand_synsets_go_through_the_whole_path(tmp_path):
    whole_path(tmp_path, size=16, templates=openai_imagenet()[1][:2])


@pytest.mark.slow
@has_open_clip
def test_eighty_thousand_texts_and_the_shape_of_b32(tmp_path, record_property):
    """All templates with a small text tower, and B/32's own shape with one template."""
    small = whole_path(tmp_path / "small", size=32, templates=openai_imagenet()[1])
    from transformers import CLIPConfig, CLIPModel

    from tests.tiny_models import byte_tokenizer, write_image_processor

    base = tmp_path / "b32"
    tokenizer = byte_tokenizer(77)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    CLIPModel(CLIPConfig(text_config=ids)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_image_processor(base, 224)
    family = get_family("clip")
    model = family.load(base)
    names, templates = openai_imagenet()
    started = time.perf_counter()
    head = family.build_head(model, base, HeadSpec(labels=names, templates=templates[:1]))
    full = time.perf_counter() - started
    data = TaskData(
        DataSpec(path=str(tmp_path / "small"), test="val", input=("image",)), names, "image"
    )
    rows = data.rows("test").select(range(0, 1000, 10))
    found = evaluate(family, model, head, rows, family.preprocessor(base))
    assert found.count == 100
    assert "top5" in found.more
    report = {"80,000 texts, small tower": small, "1,000 texts, B/32": full}
    record_property("head_seconds", json.dumps(report))
    print({name: round(seconds, 1) for name, seconds in report.items()})
