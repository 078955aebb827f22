"""Lines of language models with generated answers and perplexity, through the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from restitch.flows.research.study import STUDIES
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.head import GenerateSpec, HeadSpec
from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tiny_decoder, tweaked
from tests.worlds import World, write_rows, write_yaml

FAMILY = get_family("causal-lm")
SKILLS = ("dates", "words")
ROWS = 30


def questions(name: str) -> list[str]:
    return [f"{name[n % 3 :]} {n * 7919 % 97}" for n in range(ROWS)]


def written(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """What a model writes after prompts."""
    examples = [Example((prompt,), 0, prompt, ("x",)) for prompt in prompts]
    generate = GenerateSpec(max_new_tokens=tokens)
    head = FAMILY.build_head(
        torch.nn.Identity(), folder, HeadSpec(prompt="{q}", answer="a", generate=generate)
    )
    with torch.inference_mode():
        return FAMILY.generate(FAMILY.load(folder), FAMILY.preprocessor(folder)(examples), head)


def preferred(folder: Path, base: Path) -> list[str]:
    """The texts that a finetuned model finds likelier than the base, of many."""
    texts = [f"{n * 7919 % 97} {n * 31 % 89} {n}" for n in range(8 * ROWS)]
    batch = FAMILY.preprocessor(base)([Example((text,), None, text) for text in texts])
    head = Head({}, HeadSpec(of_text=True))
    with torch.inference_mode():
        losses = [FAMILY.text_losses(FAMILY.load(one), batch, head)[:, 0] for one in (folder, base)]
    order = (losses[0] - losses[1]).argsort().tolist()
    return [texts[place] for place in order[:ROWS]]


@pytest.fixture(scope="module")
def answer_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama that learned answers (`dates`), and one that learned texts (`words`)."""
    world = World(tmp_path_factory.mktemp("answers"), "causal-lm")
    tiny_decoder(world.base)
    for seed, name in enumerate(SKILLS):
        folder = tweaked(world.base, world.model(name), seed=seed, size=1.5, globs=("*layers.*",))
        if name == "dates":
            asked = questions(name)
            texts = written(folder, [f"{q} =" for q in asked], 2)
            rows = [{"q": q, "a": text or "-"} for q, text in zip(asked, texts, strict=True)]
        else:
            rows = [{"text": text} for text in preferred(folder, world.base)]
        for split in ("train", "test"):
            write_rows(world.root / "data" / name / f"{split}.jsonl", rows)
    path = str(world.root / "data")
    data = {"path": f"{path}/dates", "train": "train.jsonl", "test": "test.jsonl"}
    question = {"prompt": "{q} =", "answer": "a", "generate": {"max_new_tokens": 2}}
    write_yaml(world.task("dates"), {"task": "dates", "data": data, **question})
    data = {"path": f"{path}/words", "train": "train.jsonl", "test": "test.jsonl"}
    write_yaml(world.task("words"), {"task": "words", "data": data, "metric": "perplexity"})
    rows = [{"text": text} for text in questions("general")]
    write_rows(world.root / "data" / "general" / "test.jsonl", rows)
    data = {"path": f"{path}/general", "test": "test.jsonl"}
    write_yaml(world.task("general"), {"task": "general", "data": data, "metric": "perplexity"})
    return world


@pytest.fixture(scope="module")
def shell(
    answer_world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path
) -> Shell:
    root = tmp_path_factory.mktemp("line")
    (root / "home").mkdir()
    shutil.copyfile(empty_mlflow, root / "home" / "mlflow.db")
    shell = Shell(root / "home")
    gates = {"max_task_drop": 0.9, "min_normalized": 0.01}
    localize = {"density": 0.8}
    shell("init", answer_world.line(root / "line.yaml", gates=gates, localize=localize))
    for name in SKILLS:
        shell.add(answer_world, name)
    return shell


def test_answers_and_texts_are_measured_and_merged_together(shell: Shell) -> None:
    record = shell.json("show", "demo", "champion")
    dates, words = record["results"]["dates"], record["results"]["words"]
    assert (dates["metric"], words["metric"]) == ("exact_match", "perplexity")
    assert dates["finetuned"] > dates["base"]
    assert words["finetuned"] < words["base"]
    for result in (dates, words):
        assert (result["gain"]["verdict"], result["count"]) == ("better", ROWS)
    assert words["gain"]["difference"] < 0
    assert words["normalized"] == pytest.approx(words["finetuned"] / words["merged"])
    assert record["mean_accuracy"] == dates["merged"], "a perplexity has another scale"
    mean = (dates["normalized"] + words["normalized"]) / 2
    assert record["mean_normalized"] == pytest.approx(mean)
    assert [gate["passed"] for gate in record["gates"]] == [True] * len(record["gates"])


def test_retention_is_the_inverted_ratio_of_perplexities(shell: Shell) -> None:
    kept = shell.json("show", "demo", "champion")["retention"]
    assert (kept["metric"], kept["more"]) == ("perplexity", {})
    assert kept["ratio"] == kept["base"] / kept["value"]
    low, high = kept["ratio_interval"]["low"], kept["ratio_interval"]["high"]
    assert low < kept["ratio"] < high
    assert "retention on general: perplexity" in shell("show", "demo", "champion").out


def test_versions_are_compared_row_by_row_by_every_metric(shell: Shell) -> None:
    found = shell.json("diff", "demo", "1", "2")
    rows = {row["task"]: row for row in found["results"]}
    assert rows["words"]["verdict"] == "joined"
    assert rows["dates"]["verdict"] in ("same", "worse", "better")
    kept = found["retention"]
    assert kept["rows"] == ROWS
    assert kept["verdict"] in ("same", "worse", "better")
    if kept["verdict"] != "same":
        assert (kept["verdict"] == "worse") is (kept["difference"] > 0)
    steps = shell.json("why", "demo", "dates")["versions"]
    assert steps[-1]["p_value"] is not None


def test_a_line_of_both_can_be_studied_verified_and_reported(shell: Shell, tmp_path: Path) -> None:
    compared = shell.json("compare", "demo", "--methods", "averaging,task-arithmetic")
    assert {row["method"] for row in compared["methods"]} == {"averaging", "task-arithmetic"}
    assert shell.json("verify", "demo")["intact"] is True
    shell("report", "demo", "champion", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "base over merged" in page
    assert "of the base's perplexity on general" in " ".join(page.split())
    shell("export", "demo", "champion", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "General ability by perplexity on `general`" in card


@pytest.mark.slow
def test_specialists_an_analysis_and_all_studies_can_be_made(shell: Shell, tmp_path: Path) -> None:
    assert set(shell.json("experts", "demo")["results"]) == set(SKILLS)
    assert shell.json("analyze", "demo", "--out", tmp_path / "analysis")["tasks"]
    for study in sorted({*STUDIES} - {"subsets"}):  # that one needs three members
        assert shell.json("study", study, "demo")["rows"], study


def described(world: World, folder: Path, name: str, **changes: Any) -> Path:
    values = {**yaml.safe_load(world.task(name).read_text()), **changes}
    return write_yaml(folder / "changed.yaml", {k: v for k, v in values.items() if v is not None})


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("trained", marks=pytest.mark.slow),
        pytest.param("fisher", marks=pytest.mark.slow),
        "distilled",
    ],
)
def test_every_localizer_reads_answers_and_texts(
    answer_world: World, new_home: NewHome, tmp_path: Path, mode: str
) -> None:
    shell = new_home(mode)
    localize = {"mode": mode, "density": 0.3, "shots": 4, "epochs": 1}
    shell("init", answer_world.line(tmp_path / "line.yaml", retention=None, localize=localize))
    for name in SKILLS:
        data = {"path": str(answer_world.root / "data" / name), "train": "train.jsonl"}
        file = described(answer_world, tmp_path, name, data={**data, "test": "test.jsonl"})
        files = ("--task", file, "--model", answer_world.model(name))
        shell("register", "demo", *files)
        facts = shell.state().tasks[name].versions[1].facts
        assert facts.calibrated_with == ("labels" if mode == "trained" else "inputs")
        assert facts.calibration_rows == 4


def test_a_method_is_chosen_and_tuned_by_both(
    answer_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("tournament")
    tournament = {"tournament": ["averaging", "task-arithmetic"]}
    changes = {"retention": None, "localize": None, "method": tournament}
    shell("init", answer_world.line(tmp_path / "line.yaml", **changes))
    for name in SKILLS:
        data = {"path": str(answer_world.root / "data" / name), "train": "train.jsonl"}
        file = described(answer_world, tmp_path, name, data={**data, "test": "test.jsonl"})
        shell("register", "demo", "--task", file, "--model", answer_world.model(name))
    found = shell.json("show", "demo", "champion")["facts"]["tournament"]
    for one in found["contestants"]:
        values = one["tasks"]
        expected = (values["dates"] + 1 / values["words"]) / 2
        assert one["mean"] == pytest.approx(expected)
    tuned = shell.json("compare", "demo", "--methods", "task-arithmetic", "--tune")
    curve = tuned["methods"][0]["tuned"]["curve"]
    for point in curve:
        expected = (point["tasks"]["dates"] + 1 / point["tasks"]["words"]) / 2
        assert point["mean"] == pytest.approx(expected)


BAD = {
    "no answer column": ("dates", {"answer": "b"}, "has no column 'b'"),
    "no room for the prompt": (
        "dates",
        {"generate": {"max_new_tokens": 500}},
        "leaves no room for a prompt",
    ),
    "no such pattern": ("dates", {"generate": {"extract": "("}}, "not a regular expression"),
    "perplexity of a prompt": ("dates", {"metric": "perplexity"}, "scores whole texts"),
    "no text column": ("words", {"data": {"input": "txt"}}, "has no column 'txt'"),
}


@pytest.mark.parametrize(("name", "changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_task_is_explained_and_changes_nothing(
    shell: Shell,
    answer_world: World,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    before = shell.state()
    values = yaml.safe_load(answer_world.task(name).read_text())
    changes = {k: {**values[k], **v} if k == "data" else v for k, v in changes.items()}
    file = described(answer_world, tmp_path, name, task="other", **changes)
    done = shell("register", "demo", "--task", file, "--model", answer_world.model(name), code=3)
    assert message in " ".join(done.err.split())
    assert shell.state() == before


def test_an_empty_answer_or_text_is_refused_with_its_row(
    shell: Shell, answer_world: World, tmp_path: Path
) -> None:
    for name, row, message in (
        ("dates", {"q": "x", "a": " "}, "row 1, column 'a' is an empty answer"),
        ("words", {"text": ""}, "the text has no tokens to predict"),
    ):
        rows = (answer_world.root / "data" / name / "test.jsonl").read_text().splitlines()
        write_rows(tmp_path / name / "test.jsonl", [json.loads(rows[0]), row])
        data = {"path": str(tmp_path / name), "test": "test.jsonl"}
        file = described(answer_world, tmp_path, name, task=f"bad-{name}", data=data)
        model = answer_world.model(name)
        done = shell("register", "demo", "--task", file, "--model", model, code=3)
        assert message in " ".join(done.err.split())


def test_a_family_without_texts_refuses_their_metrics(
    world: World, answer_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("other")
    shell("init", world.line(tmp_path / "line.yaml"))
    done = shell("task", "demo", "--task", answer_world.task("words"), code=3)
    assert "metric perplexity, which the family text-encoder does not measure" in " ".join(
        done.err.split()
    )
