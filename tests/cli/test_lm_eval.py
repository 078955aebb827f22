"""Tasks of lm-eval on a line of language models, from a local file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.modeling.data.rows import Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import evaluate
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.head import GenerateSpec, HeadSpec
from restitch.registry.specs.task import TaskSpec
from tests.shell import Shell
from tests.tiny_models import tiny_decoder, tweaked
from tests.worlds import World, write_rows, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

ROWS = [
    {"q": f"number {n * 7919 % 97}", "options": ["red", "blu", "are"][: 2 + n % 2], "gold": n % 2}
    for n in range(24)
]


@pytest.fixture(scope="module")
def lm_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Llama with a finetuned model, and the same rows for lm-eval and for restitch."""
    world = World(tmp_path_factory.mktemp("lm-eval"), "causal-lm")
    tiny_decoder(world.base)
    tweaked(world.base, world.model("tuned"), seed=1, size=1.5, globs=("*layers.*",))
    write_rows(world.root / "test.jsonl", ROWS)
    config = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Say {{q}}:",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    write_yaml(world.root / "colours.yaml", config)
    write_yaml(world.task("theirs"), {"task": "theirs", "lm_eval": "colours.yaml"})
    data = {"path": str(world.root), "test": "test.jsonl", "label": "gold"}
    own = {"data": data, "prompt": "Say {q}:", "choices_column": "options"}
    write_yaml(world.task("ours"), {"task": "ours", **own, "score": "per_character"})
    return world


def line(shell: Shell, world: World, folder: Path, **changes: Any) -> None:
    shell("init", world.line(folder / "line.yaml", **{"retention": None, **changes}))


def register(shell: Shell, world: World, task: str, code: int = 0) -> Any:
    options = ["--task", world.task(task), "--model", world.model("tuned"), "--accept-no-gain"]
    run = shell if code else shell.json
    return run("register", "demo", *options, "--reason", "random weights", code=code)


def test_without_lm_eval_the_extra_is_named(
    shell: Shell, lm_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(shell, lm_world, tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    assert "pip install 'restitch[lm-eval]'" in register(shell, lm_world, "theirs", code=3).err
    assert not shell.state().tasks


def test_a_task_with_rows_of_its_own_is_refused(
    shell: Shell, lm_world: World, tmp_path: Path
) -> None:
    line(shell, lm_world, tmp_path)
    for key, value in (("data", {"path": str(lm_world.root)}), ("prompt", "a"), ("metric", "f1")):
        values = {"task": "theirs", "lm_eval": str(lm_world.root / "colours.yaml"), key: value}
        file = write_yaml(tmp_path / "task.yaml", values)
        assert "lm_eval" in shell("task", "demo", "--task", file, code=3).err


class TestWithLmEval:
    """What needs the extra."""

    @pytest.fixture(autouse=True)
    def _extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("lm_eval", reason="needs the extra restitch[lm-eval]")
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def test_it_is_measured_as_the_same_rows_and_workers_do_not_need_lm_eval(
        self, shell: Shell, lm_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line(shell, lm_world, tmp_path)
        register(shell, lm_world, "ours")
        found = register(shell, lm_world, "theirs")
        assert found["merged"]["action"] == "promoted"
        results = found["merged"]["record"]["results"]
        assert results["theirs"]["count"] == len(ROWS)
        for name in ("base", "finetuned", "merged"):
            assert results["theirs"][name] == results["ours"][name]
        spec = shell.state().tasks["theirs"].spec
        assert (spec.lm_eval, spec.score) == ("colours", "per_character")
        again = register(shell, lm_world, "theirs")
        assert again["already"]
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert shell.json("remerge", "demo")["action"] == "unchanged"
        assert shell.json("verify", "demo")["findings"] == []
        shell.check_settled()

    def test_a_score_in_the_file_wins(self, shell: Shell, lm_world: World, tmp_path: Path) -> None:
        line(shell, lm_world, tmp_path)
        values = {"task": "theirs", "lm_eval": str(lm_world.root / "colours.yaml"), "score": "sum"}
        shell("task", "demo", "--task", write_yaml(tmp_path / "task.yaml", values))
        assert shell.state().tasks["theirs"].spec.score == "sum"

    def test_generated_answers_and_whole_texts_are_measured_as_the_same_rows(
        self, shell: Shell, lm_world: World, tmp_path: Path
    ) -> None:
        """The general benchmark is of whole texts, and the task of generated answers."""
        file = lm_world.root / "colours.yaml"
        config = {**yaml.safe_load(file.read_text()), "doc_to_choice": None}
        answers: dict[str, Any] = {
            "output_type": "generate_until",
            "doc_to_target": "{{options[gold]}}",
        }
        answers["generation_kwargs"] = {"until": "\n\n", "max_gen_toks": 4}
        matches = [{"metric": "exact_match", "ignore_case": True}]
        texts = {"output_type": "loglikelihood_rolling", "doc_to_target": "Say {{q}}"}
        words = [{"metric": "word_perplexity"}]
        for name, changes in (
            ("answers", {**answers, "metric_list": matches}),
            ("texts", {**texts, "metric_list": words, "doc_to_text": ""}),
        ):
            folder = lm_world.root
            write_yaml(folder / f"lm_{name}.yaml", {**config, "task": name, **changes})
            write_yaml(lm_world.task(name), {"task": name, "lm_eval": f"lm_{name}.yaml"})
        line(shell, lm_world, tmp_path, retention=str(lm_world.task("texts")))
        found = register(shell, lm_world, "answers")
        record = found["merged"]["record"]
        spec = shell.state().tasks["answers"].spec
        assert (spec.metric, spec.lm_eval) == ("exact_match", "answers")
        assert spec.generate == GenerateSpec(max_new_tokens=4, stop=("\n\n",), ignore_case=True)
        benchmark = shell.state().spec.retention
        assert isinstance(benchmark, TaskSpec)
        assert (benchmark.metric, benchmark.per) == ("perplexity", "word")
        assert record["results"]["answers"]["count"] == len(ROWS)
        rows = Rows(
            ListTable("texts", Path(), {"text": [f"Say {row['q']}" for row in ROWS]}),
            ("text",),
            None,
            (),
            "text",
        )
        family, head = get_family("causal-lm"), Head({}, HeadSpec(of_text=True, per="word"))
        base = evaluate(
            family,
            family.load(lm_world.base),
            head,
            rows,
            family.preprocessor(lm_world.base),
            metric="perplexity",
        )
        assert record["retention"]["base"] == pytest.approx(base.value, rel=1e-5)

    def test_it_can_be_the_general_benchmark(
        self, shell: Shell, lm_world: World, tmp_path: Path
    ) -> None:
        line(shell, lm_world, tmp_path, retention=str(lm_world.task("theirs")))
        found = register(shell, lm_world, "ours")
        assert found["merged"]["record"]["retention"]["count"] == len(ROWS)
        benchmark = shell.state().spec.retention
        assert isinstance(benchmark, TaskSpec)
        assert benchmark.score == "per_character"

    def test_changed_rows_are_another_task(
        self, shell: Shell, lm_world: World, tmp_path: Path
    ) -> None:
        line(shell, lm_world, tmp_path)
        register(shell, lm_world, "theirs")
        folder = tmp_path / "changed"
        write_rows(folder / "test.jsonl", [{**row, "q": f"{row['q']}!"} for row in ROWS])
        (folder / "colours.yaml").write_bytes((lm_world.root / "colours.yaml").read_bytes())
        write_yaml(folder / "theirs.yaml", {"task": "theirs", "lm_eval": "colours.yaml"})
        done = shell("task", "demo", "--task", folder / "theirs.yaml", code=3)
        assert "already has another description" in done.err

    def test_a_bad_task_changes_nothing(
        self, shell: Shell, lm_world: World, tmp_path: Path
    ) -> None:
        line(shell, lm_world, tmp_path)
        (tmp_path / "empty.yaml").write_text("task: empty\n")
        for name, message in (("empty.yaml", "has no dataset_path"), ("gone.yaml", "is not there")):
            file = write_yaml(tmp_path / "task.yaml", {"task": "theirs", "lm_eval": name})
            assert message in shell("task", "demo", "--task", file, code=3).err
        assert json.loads(shell("status", "demo", "--json").out)
        assert not shell.state().tasks
