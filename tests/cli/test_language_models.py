"""A line of language models through the command: from tasks of choices to an exported model."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.specs.head import HeadSpec
from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import CHAT, tiny_bert, tiny_decoder, tweaked
from tests.worlds import World, write_rows, write_yaml

FAMILY = get_family("causal-lm")
PROMPT = "Kind:\n{text}"  # the end differs from row to row, and with it the answers
CHOICES = {"colour": ("red", "blu", "are"), "number": ("one", "twenty two")}
SCORES = {"colour": "sum", "number": "per_token"}
GENERAL = (("up", "down", "left"), ("a", "are"))
ROWS = 40


@dataclass(frozen=True)
class Line:
    """A home with a line of two members, and its world."""

    shell: Shell
    world: World
    registered: dict[str, Any]


def predictions(
    folder: Path, questions: Sequence[tuple[str, tuple[str, ...]]], score: str = "sum"
) -> torch.Tensor:
    """The scores that a folder's model gives."""
    most = max(len(choices) for _, choices in questions)
    examples = [
        Example((prompt,), None, "", (*choices, *[None] * (most - len(choices))))
        for prompt, choices in questions
    ]
    spec = HeadSpec.model_validate({"labels": ["a", "b"], "score": score})
    head = FAMILY.build_head(torch.nn.Identity(), folder, spec)
    with torch.inference_mode():
        return FAMILY.logits(FAMILY.load(folder), FAMILY.preprocessor(folder)(examples), head)


def texts(name: str) -> list[str]:
    return [f"{name[n % 3 :]} {name[: n % 5]} {n * 7919 % 97}" for n in range(ROWS)]


@pytest.fixture(scope="module")
def lm_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama with two skills, and a general benchmark with choices in each row."""
    world = World(tmp_path_factory.mktemp("lm"), "causal-lm")
    tiny_decoder(world.base)
    for seed, (name, choices) in enumerate(CHOICES.items()):
        folder = tweaked(world.base, world.model(name), seed=seed, size=1.5, globs=("*layers.*",))
        asked = [(PROMPT.format(text=text), choices) for text in texts(name)]
        best = predictions(folder, asked, SCORES[name]).argmax(1).tolist()
        rows = [
            {"text": text, "label": choices[one]}
            for text, one in zip(texts(name), best, strict=True)
        ]
        write_rows(world.root / "data" / name / "test.jsonl", rows)
        write_rows(world.root / "data" / name / "train.jsonl", rows)
        data = {"path": str(world.root / "data" / name), "test": "test.jsonl"}
        values = {"task": name, "data": data, "prompt": PROMPT, "choices": list(choices)}
        write_yaml(world.task(name), {**values, "score": SCORES[name]})
    general = [(text, GENERAL[n % 2]) for n, text in enumerate(texts("general"))]
    said = [(f"Say {text} ", own) for text, own in general]
    kept = predictions(world.base, said).argmax(1).tolist()
    rows = [
        {"q": text, "options": list(own), "label": one}
        for (text, own), one in zip(general, kept, strict=True)
    ]
    write_rows(world.root / "data" / "general" / "test.jsonl", rows)
    data = {"path": str(world.root / "data" / "general"), "test": "test.jsonl"}
    values = {"task": "general", "data": data, "prompt": "Say {q} ", "choices_column": "options"}
    write_yaml(world.task("general"), values)
    return world


@pytest.fixture(scope="module")
def line(lm_world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Line:
    root = tmp_path_factory.mktemp("line")
    shell = Shell(root / "home")
    (root / "home").mkdir()
    shutil.copyfile(empty_mlflow, root / "home" / "mlflow.db")
    shell("init", lm_world.line(root / "line.yaml"))
    return Line(shell, lm_world, {name: shell.add(lm_world, name) for name in CHOICES})


def test_a_task_of_choices_is_measured_and_merged(line: Line) -> None:
    for name, found in line.registered.items():
        assert (found["state"], found["merged"]["action"]) == ("ready", "promoted"), name
    record = line.registered["number"]["merged"]["record"]
    for name in CHOICES:
        result = record["results"][name]
        assert result["finetuned"] == 1.0, "its answers are what it says"
        assert result["base"] < 1.0
        assert result["count"] == ROWS
    assert record["retention"]["base"] == 1.0
    assert 0 < record["retention"]["ratio"] <= 1.0
    shown = line.shell("show", "demo", "champion").out
    assert all(name in shown for name in CHOICES)


def test_the_exported_model_loads_and_gives_the_measured_answers(
    line: Line, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line.shell("export", "demo", "champion", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.generation_config.max_new_tokens == 5
    assert tokenizer.chat_template == CHAT
    record = line.registered["number"]["merged"]["record"]
    for name, choices in CHOICES.items():
        rows = (line.world.root / "data" / name / "test.jsonl").read_text().splitlines()
        right = 0
        asked = [(PROMPT.format(text=text), choices) for text in texts(name)]
        scored = predictions(out, asked, SCORES[name])
        for text, row, scores in zip(texts(name), map(json.loads, rows), scored, strict=True):
            prompt = PROMPT.format(text=text)
            start = len(tokenizer(prompt).input_ids)
            values = []
            for choice in choices:
                tokens = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
                with torch.no_grad():
                    logits = model(tokens).logits[0, :-1].log_softmax(-1)
                of_answer = logits.gather(1, tokens[0, 1:, None])[start - 1 :]
                values.append(float(of_answer.mean() if name == "number" else of_answer.sum()))
            assert scores.tolist() == pytest.approx(values, abs=1e-4)
            right += choices[values.index(max(values))] == row["label"]
        assert right / ROWS == record["results"][name]["merged"]


def test_verify_rebuilds_the_merged_model(line: Line) -> None:
    found = line.shell.json("verify", "demo")
    assert found["intact"] is True


def test_a_task_cannot_change_its_question_without_being_replaced(
    line: Line, tmp_path: Path
) -> None:
    before = line.shell.state()
    for changes in ({"prompt": "{text} is"}, {"score": "sum"}, {"choices": ["one", "two"]}):
        file = described(line.world, tmp_path, "number", **changes)
        done = line.shell("task", "demo", "--task", file, code=None)
        assert done.code == 3
        assert line.shell.state() == before


def described(world: World, folder: Path, name: str, **changes: Any) -> Path:
    values = {**yaml.safe_load(world.task(name).read_text()), **changes}
    return write_yaml(folder / "changed.yaml", {k: v for k, v in values.items() if v is not None})


BAD = {
    "no column": ({"prompt": "Kind:"}, "names no column"),
    "an unknown column": ({"prompt": "{txt} is"}, "has no column 'txt'"),
    "equal choices": ({"choices": ["one", "one"]}, "choices occur twice"),
    "an empty answer": ({"choices": ["one", "twenty two", " "]}, "a choice is empty"),
    "a label that is no choice": ({"choices": ["up", "down"]}, "is not one of the classes"),
    "no prompt": ({"prompt": None, "choices": None, "score": None}, "has data but no prompt"),
    "a head": (
        {"prompt": None, "choices": None, "score": None, "head": {"labels": ["one", "twenty two"]}},
        "has a head, which the family causal-lm does not read",
    ),
    "choices that are no lists": (
        {"choices": None, "choices_column": "text"},
        "is no list of choices",
    ),
    "an answer that is too long": ({"max_length": 4}, "longer than the model reads"),
    "more tokens than the base reads": ({"max_length": 500}, "more than the base reads"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_question_is_explained_and_changes_nothing(
    line: Line, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    before = line.shell.state()
    file = described(line.world, tmp_path, "number", task="other", **changes)
    model = line.world.model("number")
    done = line.shell("register", "demo", "--task", file, "--model", model, code=3)
    assert message in " ".join(done.err.split())
    assert line.shell.state() == before


def test_a_question_can_be_a_chat(line: Line, tmp_path: Path) -> None:
    file = described(line.world, tmp_path, "number", task="chat", chat=True)
    line.shell("task", "demo", "--task", file)
    assert line.shell.state().tasks["chat"].spec.chat is True


def test_a_chat_needs_a_base_with_a_template(lm_world: World, shell: Shell, tmp_path: Path) -> None:
    base = shutil.copytree(lm_world.base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    shell("init", lm_world.line(tmp_path / "line.yaml", base=str(base), retention=None))
    file = described(lm_world, tmp_path, "number", chat=True)
    done = shell("task", "demo", "--task", file, code=3)
    assert "has no chat template, which chat: true needs" in " ".join(done.err.split())
    assert "number" not in shell.state().tasks


def test_a_model_that_is_worse_is_held_with_the_likely_causes_of_its_prompt(
    lm_world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", lm_world.line(tmp_path / "line.yaml", retention=None))
    asked = [(PROMPT.format(text=text), CHOICES["colour"]) for text in texts("colour")]
    best = predictions(lm_world.base, asked).argmax(1).tolist()  # the base knows all answers
    rows = [{"text": t, "label": one} for t, one in zip(texts("colour"), best, strict=True)]
    write_rows(tmp_path / "data" / "test.jsonl", rows)
    data = {"path": str(tmp_path / "data"), "test": "test.jsonl"}
    task = described(lm_world, tmp_path, "colour", data=data)
    shell("register", "demo", "--task", task, "--model", lm_world.model("colour"), code=5)
    version = shell.state().tasks["colour"].versions[1]
    assert version.state == "held"
    assert "prompt: it is 'Kind:" in str(version.reason)
    assert "choices: they are 'red', 'blu', 'are'" in str(version.reason)


def test_prompts_that_lose_their_beginning_are_reported(line: Line, tmp_path: Path) -> None:
    file = described(line.world, tmp_path, "number", task="cut", max_length=20)
    done = line.shell("task", "demo", "--task", file)
    assert "of 40 prompts are longer than the model reads and lose their beginning" in " ".join(
        done.err.split()
    )


def test_a_line_refuses_a_base_and_a_task_of_another_family(
    lm_world: World, world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("other")
    bert = tiny_bert(tmp_path / "bert")
    file = lm_world.line(tmp_path / "line.yaml", base=str(bert), retention=None)
    shell("init", file, code=3)
    assert shell.json("status")["lines"] == []
    shell("init", world.line(tmp_path / "text.yaml"))
    task = described(lm_world, tmp_path, "number")
    done = shell("task", "demo", "--task", task, code=3)
    assert "has a prompt, which the family text-encoder does not read" in " ".join(done.err.split())


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("trained", marks=pytest.mark.slow),
        pytest.param("fisher", marks=pytest.mark.slow),
        "distilled",
    ],
)
def test_every_localizer_reads_questions_also_with_choices_in_each_row(
    lm_world: World, shell: Shell, tmp_path: Path, mode: str
) -> None:
    localize = {"mode": mode, "density": 0.3, "shots": 4, "epochs": 1}
    shell("init", lm_world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    for name, model in (("colour", "colour"), ("general", "number")):
        data = {"path": str(lm_world.root / "data" / name), "test": "test.jsonl"}
        given = {**data, "train": "test.jsonl" if name == "general" else "train.jsonl"}
        file = described(lm_world, tmp_path, name, data=given)
        files = ("--task", file, "--model", lm_world.model(model))
        shell("register", "demo", *files, "--accept-no-gain", "--reason", "a test", code=None)
        version = shell.state().tasks[name].versions[1]
        assert version.state == "ready", name
        assert version.facts.calibrated_with == ("labels" if mode == "trained" else "inputs")


@pytest.mark.parametrize("method", ["regmean", "mats", "fisher-merging"])
def test_methods_with_statistics_measure_language_models(
    lm_world: World, shell: Shell, tmp_path: Path, method: str
) -> None:
    file = lm_world.line(tmp_path / "line.yaml", retention=None, method=method, localize=None)
    shell("init", file)
    for name in CHOICES:
        data = {"path": str(lm_world.root / "data" / name), "test": "test.jsonl"}
        task = described(lm_world, tmp_path, name, data={**data, "train": "train.jsonl"})
        files = ("--task", task, "--model", lm_world.model(name))
        shell("register", "demo", *files, "--accept-no-gain", "--reason", "a test", code=None)
    found = shell.json("show", "demo", "champion")
    assert set(found["members"]) == set(CHOICES)
