"""Lines of encoder-decoder and of masked language models through the command."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from restitch.modeling.data.rows import Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.families.family import get_family
from restitch.registry.specs.head import HeadSpec
from tests.conftest import NewHome, leave_mlflow_alone
from tests.shell import Shell
from tests.tiny_models import tiny_masked, tiny_seq2seq, tweaked
from tests.worlds import World, write_rows, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

ROWS = 24
BLOCKS = ("*layer.*", "*layers.*")
WORDS = {"colour": ("red", "blue"), "number": ("no", "one", "two"), "general": ("yes", "maybe")}
ANSWERS = {
    "colour": ("negative", "positive"),  # of the same length, which decides little then
    "number": ("red", "blue", "are"),
    "general": ("yes", "maybe"),
}


@dataclass(frozen=True)
class Case:
    """A family with the prompts of its tasks, and the class that loads its models."""

    family: str
    make: Callable[[Path], Path]
    prompts: dict[str, str]
    choices: dict[str, tuple[str, ...]]
    auto_class: Any


CASES = {
    "seq2seq-lm": Case(
        "seq2seq-lm",
        tiny_seq2seq,
        {"colour": "Sentence: {a} Mood:", "number": "{a}\n{b}\nKind:", "general": "{a}:\n"},
        ANSWERS,
        AutoModelForSeq2SeqLM,
    ),
    "masked-lm": Case(
        "masked-lm",
        tiny_masked,
        {"colour": "{a} it was {mask}.", "number": "{a} ? {mask} , {b}", "general": "{a} {mask}"},
        WORDS,
        AutoModelForMaskedLM,
    ),
}


@dataclass(frozen=True)
class Line:
    """A home with a line of two members, and its world."""

    case: Case
    shell: Shell
    world: World
    registered: dict[str, Any]


def scores(case: Case, folder: Path, name: str) -> torch.Tensor:
    """The scores of a task's choices by a folder's model."""
    family, choices = get_family(case.family), case.choices[name]
    values: dict[str, Sequence[Any]] = {key: [row[key] for row in texts(name)] for key in "ab"}
    prompt = Prompt(case.prompts[name], mask=family.fills_mask)
    columns = tuple(key for key in "ab" if f"{{{key}}}" in prompt.text)
    rows = Rows(ListTable(name, Path(), values), columns, None, choices, "text", prompt=prompt)
    head = family.build_head(torch.nn.Identity(), folder, HeadSpec(labels=choices))
    batch = family.preprocessor(folder)([rows[place] for place in range(len(rows))])
    with torch.inference_mode():
        return family.logits(family.load(folder), batch, head)


def texts(name: str) -> list[dict[str, str]]:
    return [
        {"a": f"{name[n % 3 :]} {'abcdefgh'[n * 7 % 8 :]} {n * 79 % 97}", "b": name[: n % 5 + 1]}
        for n in range(ROWS)
    ]


def made(root: Path, case: Case) -> World:
    """A tiny base with two skills, and a benchmark that the base answers."""
    world = World(root, case.family)
    case.make(world.base)
    for seed, name in enumerate(("colour", "number")):
        tweaked(world.base, world.model(name), seed=seed, size=1.0, globs=BLOCKS)
    for name, choices in case.choices.items():
        model = world.base if name == "general" else world.model(name)
        best = scores(case, model, name).argmax(1).tolist()
        rows = [
            {**text, "label": choices[one]} for text, one in zip(texts(name), best, strict=True)
        ]
        for split in ("train", "test"):
            write_rows(world.root / "data" / name / f"{split}.jsonl", rows)
        data = {"path": str(world.root / "data" / name), "test": "test.jsonl"}
        values = {"data": data, "prompt": case.prompts[name], "choices": list(choices)}
        write_yaml(world.task(name), {"task": name, **values})
    return world


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    return {name: registered(tmp_path_factory.mktemp(name), case) for name, case in CASES.items()}


def registered(root: Path, case: Case) -> Line:
    """A line with two members."""
    with pytest.MonkeyPatch.context() as patched:
        leave_mlflow_alone(patched)
        world, shell = made(root / "world", case), Shell(root / "home")
        (root / "home").mkdir()
        gates = {"max_task_drop": 1.0}
        shell("init", world.line(root / "line.yaml", localize={"density": 0.8}, gates=gates))
        found = {name: shell.add(world, name) for name in ("colour", "number")}
    return Line(case, shell, world, found)


@pytest.fixture(params=CASES)
def line(request: pytest.FixtureRequest, lines: dict[str, Line]) -> Line:
    return lines[request.param]


@pytest.fixture
def masked(lines: dict[str, Line]) -> Line:
    return lines["masked-lm"]


def described(world: World, folder: Path, name: str, **changes: Any) -> Path:
    values = {**yaml.safe_load(world.task(name).read_text()), **changes}
    return write_yaml(folder / "changed.yaml", {k: v for k, v in values.items() if v is not None})


def test_tasks_of_choices_are_measured_and_merged(line: Line) -> None:
    for name, found in line.registered.items():
        assert (found["state"], found["merged"]["action"]) == ("ready", "promoted"), name
    record = line.registered["number"]["merged"]["record"]
    for name in line.registered:
        result = record["results"][name]
        assert result["finetuned"] == 1.0, "its answers are what it says"
        assert result["count"] == ROWS
    assert min(record["results"][name]["base"] for name in line.registered) < 1.0
    assert line.shell.json("remerge", "demo")["action"] == "unchanged"


def test_every_view_of_a_line_works(line: Line, tmp_path: Path) -> None:
    shell = line.shell
    shown = shell("show", "demo", "champion").out
    assert all(name in shown for name in line.registered)
    assert "number" in shell("diff", "demo", 1, 2).out
    compared = shell.json("compare", "demo", "--methods", "task-arithmetic,ties")
    assert {row["method"] for row in compared["methods"]} >= {"task-arithmetic", "ties"}
    assert set(shell.json("experts", "demo")["results"]) == set(line.registered)
    shell.json("analyze", "demo", "--localizers", "dataless", "--densities", "0.1,1")
    shell.json("study", "agreement", "demo")
    assert shell.json("verify", "demo")["intact"] is True


def test_the_exported_model_loads_and_gives_the_measured_answers(
    line: Line, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line.shell("export", "demo", "champion", out)
    model = line.case.auto_class.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).vocab_size
    live = dict(model.named_parameters())
    family = get_family(line.case.family)
    for name, tensor in family.parameters(family.load(out)).items():
        assert name not in live or torch.equal(tensor, live[name])
    record = line.registered["number"]["merged"]["record"]
    for name in line.registered:
        best = scores(line.case, out, name).argmax(1)
        truth = scores(line.case, line.world.model(name), name).argmax(1)
        assert float((best == truth).double().mean()) == record["results"][name]["merged"]


@pytest.mark.parametrize("mode", ["trained", "fisher", "distilled"])
def test_every_localizer_reads_the_questions(
    line: Line, new_home: NewHome, tmp_path: Path, mode: str
) -> None:
    shell = new_home(mode)
    localize = {"mode": mode, "density": 0.3, "shots": 4, "epochs": 1}
    shell("init", line.world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    data = {"path": str(line.world.root / "data" / "number"), "test": "test.jsonl"}
    task = described(line.world, tmp_path, "number", data={**data, "train": "train.jsonl"})
    files = ("--task", task, "--model", line.world.model("number"))
    shell("register", "demo", *files, "--accept-no-gain", "--reason", "a test", code=None)
    version = shell.state().tasks["number"].versions[1]
    assert version.state == "ready", version.reason
    assert version.facts.calibrated_with == ("labels" if mode == "trained" else "inputs")


@pytest.mark.parametrize("method", ["mats", "fisher-merging"])
def test_methods_with_statistics_measure_the_models(
    line: Line, new_home: NewHome, tmp_path: Path, method: str
) -> None:
    shell = new_home(method)
    values = {"retention": None, "method": method, "localize": None}
    shell("init", line.world.line(tmp_path / "line.yaml", **values))
    for name in line.registered:
        data = {"path": str(line.world.root / "data" / name), "test": "test.jsonl"}
        task = described(line.world, tmp_path, name, data={**data, "train": "train.jsonl"})
        files = ("--task", task, "--model", line.world.model(name))
        shell("register", "demo", *files, "--accept-no-gain", "--reason", "a test", code=None)
    assert set(shell.json("show", "demo", "champion")["members"]) == set(line.registered)


MASKS = {
    "no mask": ("{a} it was", "{mask} 0 times in '{a} it was'"),
    "two masks": ("{a} {mask} or {mask}", "{mask} 2 times"),
    "nothing but the mask": ("it was {mask}.", "no column in 'it was {mask}.'"),
    "a mask that is text": ("{a} it was {{mask}}", "{mask} 0 times"),
    "a word of several tokens": ("{a}{mask}", "is not one token at the mask"),
}


@pytest.mark.parametrize(("prompt", "message"), MASKS.values(), ids=MASKS)
def test_a_prompt_without_one_mask_is_explained_and_changes_nothing(
    masked: Line, tmp_path: Path, prompt: str, message: str
) -> None:
    before = masked.shell.state()
    file = described(masked.world, tmp_path, "number", task="other", prompt=prompt)
    model = masked.world.model("number")
    done = masked.shell("register", "demo", "--task", file, "--model", model, code=3)
    assert message in " ".join(done.err.split())
    assert masked.shell.state() == before


def test_a_mask_in_another_family_is_a_column(lines: dict[str, Line], tmp_path: Path) -> None:
    line = lines["seq2seq-lm"]
    file = described(line.world, tmp_path, "number", task="other", prompt="{a} is {mask}")
    done = line.shell("task", "demo", "--task", file, code=3)
    assert "has no column 'mask'" in done.err
    assert "is the place of the answer only in a line of masked-lm" in " ".join(done.err.split())


def test_a_chat_needs_a_family_and_a_base_with_templates(line: Line, tmp_path: Path) -> None:
    file = described(line.world, tmp_path, "number", task="other", chat=True)
    done = line.shell("task", "demo", "--task", file, code=3)
    message = {
        "masked-lm": "has chat: true, which the family masked-lm does not use",
        "seq2seq-lm": "has no chat template, which chat: true needs",
    }[line.case.family]
    assert message in " ".join(done.err.split())


def test_a_finetuned_encoder_without_a_head_joins_with_the_base_s(
    masked: Line, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("headless")
    shell("init", masked.world.line(tmp_path / "line.yaml", retention=None))
    bare = shutil.copytree(masked.world.model("number"), tmp_path / "bare")
    AutoModel.from_pretrained(masked.world.model("number")).save_pretrained(bare)
    found = shell.json("register", "demo", "--task", masked.world.task("number"), "--model", bare)
    assert found["state"] == "ready"
    assert found["merged"]["record"]["results"]["number"]["finetuned"] == 1.0
    shown = " ".join(shell("status", "demo").out.split())
    assert "number" in shown


def test_init_names_the_families_of_a_base_by_what_it_holds(
    masked: Line, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("families")
    file = masked.world.line(tmp_path / "line.yaml", family=None, retention=None)
    done = " ".join(shell("init", file, code=3).err.split())
    assert "`family: masked-lm` (the likeliest word at the mask of a prompt)" in done
    assert "`family: text-encoder` (" in done
    bare = shutil.copytree(masked.world.base, tmp_path / "bare")
    AutoModel.from_pretrained(masked.world.base).save_pretrained(bare)
    values = {"base": str(bare), "retention": None}
    file = masked.world.line(tmp_path / "line.yaml", **values)
    done = " ".join(shell("init", file, code=3).err.split())
    assert "lacks the tensors of a masked-language-model head (lm_head." in done
    assert "family: text-encoder" in done
    assert shell.json("status")["lines"] == []
