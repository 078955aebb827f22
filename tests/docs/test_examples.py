"""The examples: their files are right, and their scripts run, here on tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.specs.files import load_line, load_task
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.schema import schema_of
from tests.shell import ROOT
from tests.tiny_models import tiny_bert, tiny_decoder, tweaked
from tests.worlds import BLOCKS, write_rows

EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*/line.yaml")) + sorted(EXAMPLES.glob("*/tasks/*.yaml"))


@pytest.mark.parametrize("kind", ["line", "task"])
def test_the_schemas_are_those_of_the_code(kind: Literal["line", "task"]) -> None:
    assert json.loads((EXAMPLES / f"{kind}.schema.json").read_text()) == schema_of(kind)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_every_file_can_be_read_and_names_its_schema(file: Path) -> None:
    head = re.match(r"# yaml-language-server: \$schema=(.*)\n", file.read_text())
    assert head is not None
    assert (file.parent / head[1]).resolve().parent == EXAMPLES
    if file.name == "line.yaml":
        assert "max_task_drop" in load_line(file).gates.limits
    else:
        assert load_task(file).task == file.stem


@pytest.mark.slow
def test_the_text_example_runs(tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "base", positions=64)  # as many as the tasks ask for
    for seed, file in enumerate(sorted((EXAMPLES / "text" / "tasks").glob("*.yaml"))):
        task = yaml.safe_load(file.read_text())
        model = tweaked(base, tmp_path / "models" / file.stem, seed=seed, size=0.15, globs=BLOCKS)
        for split in ("train", "validation", "test"):
            rows = labelled(base, model, task, split)
            write_rows(tmp_path / "data" / file.stem / f"{split}.jsonl", rows)
    out = run("text", base, tmp_path)
    for name in ("cr", "sst2", "subj"):
        assert re.search(rf"^{name} +1 +(ready|held)", out, re.MULTILINE), out


@pytest.mark.slow
def test_the_example_of_language_models_runs(tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", positions=512)
    rows: dict[str, list[dict[str, Any]]] = {
        "sst2": [{"text": f"it is {n * 7919 % 97}", "label": n % 2} for n in range(40)],
        "gsm8k": [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}"} for n in range(8)],
        "lambada": [{"text": f"what is {n} of {n * 31 % 89}"} for n in range(20)],
    }
    for seed, (name, of_task) in enumerate(rows.items()):
        if name != "lambada":
            tweaked(base, tmp_path / "models" / name, seed=seed, size=0.1, globs=("*layers.*",))
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / "data" / name / f"{split}.jsonl", of_task)
    out = run("llm", base, tmp_path)
    for name in ("gsm8k", "sst2"):
        assert re.search(rf"^{name} +1 +(ready|held)", out, re.MULTILINE), out


def run(example: str, base: Path, folder: Path) -> str:
    """Run an example's script on models and data in a folder; returns its output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BASE": str(base),
        "DATA": str(folder / "data"),
        "MODELS": str(folder / "models"),
        "WORK": str(folder / "work"),
    }
    done = subprocess.run(
        ["bash", str(EXAMPLES / example / "run.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "work" / "merged" / "model.safetensors").is_file()
    return done.stdout


def labelled(base: Path, model: Path, task: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Rows whose labels are the model's own predictions, so that it scores 1."""
    family = get_family("text-encoder")
    head = family.build_head(family.load(base), base, HeadSpec(labels=task["head"]["labels"]))
    texts = [
        f"{split} {number * 7919 % 1009} {'abcdefghij'[number % 10] * 5}" for number in range(40)
    ]
    batch = family.preprocessor(base)([Example((text,), None, "") for text in texts])
    found = family.logits(family.load(model), batch, head).argmax(1).tolist()
    return [{"text": text, "label": label} for text, label in zip(texts, found, strict=True)]
