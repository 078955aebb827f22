"""Tasks of lm-eval as rows: local files only, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from restitch.merging.errors import BadInput
from restitch.modeling.data import lm_eval_tasks
from restitch.modeling.data.exact_match import is_match
from restitch.modeling.data.lm_eval_tasks import LmEvalTask, read_lm_eval
from restitch.modeling.evaluation import best, summarize
from restitch.modeling.row_values import Bits

pytest.importorskip("lm_eval", reason="needs the extra restitch[lm-eval]")

DOCS = [
    {"q": "Is ice cold?", "options": ["no", "yes"], "gold": 1},
    {"q": "Is fire cold?", "options": ["no", "yes", "perhaps"], "gold": 0},
    {"q": "Is {{q}} a text?", "options": ["no", "yes"], "gold": 1},
]
CONFIG: dict[str, Any] = {
    "task": "cold",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}},
    "test_split": "test",
    "training_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{q}}\nAnswer:",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 2.0},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, docs: list[dict[str, Any]] = DOCS, **changes: Any) -> Path:
    """Write a task and its rows; None removes a key."""
    folder.mkdir(exist_ok=True)
    for split, rows in (("test", docs), ("train", docs[::-1])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    file = folder / "cold.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def read(source: Path | str) -> LmEvalTask:
    return read_lm_eval(str(source), "lm_eval", lambda *_: None)


def of_lm_eval(file: Path) -> Any:
    """The same task as lm-eval's own object."""
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load(file.read_text())
    files = {s: str(file.parent / f"{s}.jsonl") for s in ("test", "train")}
    return ConfigurableTask(config={**config, "dataset_kwargs": {"data_files": files}})


def refused(source: Path | str) -> str:
    with pytest.raises(BadInput) as error:
        read(source)
    return error.value.message()


def test_rows_are_what_lm_eval_asks(tmp_path: Path) -> None:
    task = read(write(tmp_path / "task"))
    assert (task.name, task.version, task.score) == ("cold", "2.0", "sum")
    assert task.splits["test"] == [
        {"prompt": f"Question: {d['q']}\nAnswer: ", "choices": d["options"], "label": d["gold"]}
        for d in DOCS
    ]
    assert [row["label"] for row in task.splits["train"]] == [1, 0, 1]


def test_prompt_and_choice_together_are_the_texts_of_the_requests(tmp_path: Path) -> None:
    file = write(tmp_path / "task", description="Answer.\n", num_fewshot=1, fewshot_split="train")
    own = of_lm_eval(file)
    own.set_fewshot_seed(1234)
    rows = read(file).splits["test"]
    for doc, row in zip(own.eval_docs, rows, strict=True):
        requests = own.construct_requests(doc, own.fewshot_context(doc, num_fewshot=1))
        texts = ["".join(request.arguments) for request in requests]
        assert [row["prompt"] + choice for choice in row["choices"]] == texts
        assert row["prompt"].startswith("Answer.\n")
        assert row["prompt"].count("Question:") == 2


def test_targets_may_be_texts_and_choices_templates(tmp_path: Path) -> None:
    docs = [{"q": "2", "a": "two"}, {"q": "3", "a": "three"}]
    choice = "{{['two', 'three']}}"
    task = read(write(tmp_path / "task", docs, doc_to_choice=choice, doc_to_target="{{a}}"))
    assert [row["label"] for row in task.splits["test"]] == [0, 1]
    assert task.splits["test"][0]["choices"] == ["two", "three"]


def test_the_metric_says_how_choices_are_compared(tmp_path: Path) -> None:
    norm, plain = ({"metric": m, "aggregation": "mean"} for m in ("acc_norm", "acc"))
    assert read(write(tmp_path / "one", metric_list=[norm])).score == "per_character"
    assert read(write(tmp_path / "two", metric_list=[norm, plain])).score == "sum"
    assert read(write(tmp_path / "none", metric_list=None)).score == "sum"
    wrong = write(tmp_path / "three", metric_list=[{"metric": "f1", "aggregation": "f1"}])
    assert "the metric acc or acc_norm" in refused(wrong)


@pytest.mark.parametrize("target", ["gold", "{{gold}}"])
def test_any_of_several_right_choices_is_right_where_lm_eval_says_so(
    tmp_path: Path, target: str
) -> None:
    right = [(2, 0), (1,), (0, 1, 2)]
    docs = [{**DOCS[1], "gold": list(gold)} for gold in right]
    file = write(tmp_path / "task", docs, doc_to_target=target)
    own, rows = of_lm_eval(file), read(file).splits["test"]
    assert [row["label"] for row in rows] == [doc["gold"] for doc in docs]
    random = np.random.default_rng(0)
    for scores in random.integers(-2, 0, (20, 3, 3)).astype(np.float32):  # with ties
        theirs = [
            own.process_results(doc, [(value, False) for value in values])["acc"]
            for doc, values in zip(own.eval_docs, scores.tolist(), strict=True)
        ]
        ours = summarize(scores, best(scores, right), "accuracy")
        assert isinstance(ours.rows, Bits)
        assert ours.rows.right.tolist() == [one == 1.0 for one in theirs]


GENERATING: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}\nA:",
    "doc_to_choice": None,
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["Q:"], "do_sample": False, "temperature": 0.0},
}
SUMS = [{"q": "6 x 7", "a": "#### 1,042."}, {"q": "Sky", "a": "Blue"}]
MATCH: dict[str, Any] = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
LOOSE = {**MATCH, "ignore_case": True, "regexes_to_ignore": [",", "(?s).*#### ", "\\.$"]}
SEVERAL = [
    {"q": "6 x 7", "a": ["#### 1,042.", "7"]},
    {"q": "Sky", "a": ["Blue"]},
    {"q": "it", "a": ["seven", "Blue", "1042"]},
]
TEXTS = [
    "7",
    "Seven",
    "#### 1,042",
    "so #### 1042. And #### 1",
    "1042",
    "it is 7 #### 5, 1042",
    "blue",
    " Blue",
    "",
]


def filtered(**regex: Any) -> list[dict[str, Any]]:
    steps = [{"function": "regex", **regex}, {"function": "take_first"}]
    other = [{"function": "lowercase"}]
    return [{"name": "first", "filter": steps}, {"name": "second", "filter": other}]


@pytest.mark.parametrize(("docs", "target"), [(SUMS, "{{a}}"), (SEVERAL, "{{a}}"), (SEVERAL, "a")])
@pytest.mark.parametrize(
    "changes",
    [
        {"metric_list": [MATCH], "filter_list": None},
        {"metric_list": [LOOSE], "filter_list": None},
        {"metric_list": [LOOSE], "filter_list": filtered(regex_pattern="#### ([0-9.,]+)")},
        {
            "metric_list": [{**LOOSE, "ignore_punctuation": True}],
            "filter_list": filtered(regex_pattern="([0-9.,]{2,})|([0-9]+)", group_select=-1),
        },
    ],
)
def test_generated_texts_are_right_where_lm_eval_says_so(
    tmp_path: Path, docs: list[dict[str, Any]], target: str, changes: dict[str, Any]
) -> None:
    file = write(tmp_path / "task", docs, **{**GENERATING, **changes, "doc_to_target": target})
    own, task = of_lm_eval(file), read(file)
    assert task.generate is not None
    assert (task.generate.stop, task.generate.max_new_tokens) == (("Q:",), 256)
    name = next(iter(own._filters)).name
    for doc, row in zip(own.eval_docs, task.splits["test"], strict=True):
        assert row["prompt"] == own.fewshot_context(doc, num_fewshot=0)
        for text in TEXTS:
            request = own.construct_requests(doc, row["prompt"])
            request.resps = [text.strip()]
            next(iter(own._filters)).apply([request])
            theirs = own.process_results(doc, [request.filtered_resps[name]])
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            ours = any(is_match(text, answer, task.generate) for answer in answers)
            assert ours == bool(theirs["exact_match"]), (text, row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"do_sample": True}}, "do_sample"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams"),
        ({"metric_list": [{**MATCH, "ignore_numbers": True}]}, "ignore_numbers"),
        ({"metric_list": [{"metric": "bleu"}]}, "the metric exact_match"),
        ({"filter_list": [{"name": "f", "filter": [{"function": "lowercase"}]}]}, "filters"),
        ({"filter_list": filtered(regex_pattern="a", group_select=1)}, "filters"),
        ({"filter_list": filtered(regex_pattern="(")}, "not a regular expression"),
        ({"filter_list": filtered(regex_pattern="B.?")}, "takes all or nothing"),
        ({"doc_to_text": "{{q}} A: "}, "ends with white space"),
        ({"doc_to_target": "{{[q, 7]}}"}, "no list of right answers"),
        ({"doc_to_target": "{{[]}}"}, "no list of right answers"),
        ({"doc_to_target": "{{[a, '']}}"}, "cannot be compared"),
        (
            {"doc_to_target": "{{[a] if q == 'Sky' else a}}"},
            "row 1: the right answer is of another",
        ),
        (
            {"doc_to_target": "{{a if q == 'Sky' else [a]}}"},
            "row 1: the right answer is of another",
        ),
        ({"doc_to_target": "{{''}}"}, "cannot be compared"),
        ({"repeats": 3}, "repeats: 3"),
    ],
)
def test_what_cannot_be_generated_is_explained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "task", SUMS, **{**GENERATING, "metric_list": [MATCH], **changes})
    assert message in refused(file)


@pytest.mark.parametrize(
    ("metric", "per"),
    [("word_perplexity", "word"), ("byte_perplexity", "byte"), ("bits_per_byte", "byte")],
)
def test_whole_texts_keep_their_unit(tmp_path: Path, metric: str, per: str) -> None:
    changes = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None}
    metrics = [{"metric": metric}]
    file = write(tmp_path / "task", SUMS, **changes, doc_to_target="{{a}}", metric_list=metrics)
    task = read(file)
    assert (task.per, task.generate) == (per, None)
    assert task.splits["test"] == [{"text": row["a"]} for row in SUMS]


def test_a_file_may_include_another(tmp_path: Path) -> None:
    whole = write(tmp_path / "task")
    whole.rename(whole.with_name("base.yaml"))
    file = whole.with_name("harder.yaml")
    file.write_text("include: base.yaml\ntask: harder\ndoc_to_text: '{{q}} So'\n")
    task = read(file)
    assert task.name == "harder"
    assert task.splits["test"][0]["prompt"] == "Is ice cold? So "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "loglikelihood"}, "does not read"),
        ({"output_type": None}, "has no output_type"),
        ({"task": None}, "has no task"),
        ({"use_prompt": "promptsource:*"}, "can run code"),
        ({"doc_to_target": "{{[0, 2]}}"}, "row 0 has no right choice"),
        ({"doc_to_target": "{{[]}}"}, "row 0 has no right choice"),
        (
            {"doc_to_target": "{{[gold] if gold else gold}}"},
            "row 1: the right answer is of another",
        ),
        ({"doc_to_target": "nobody"}, "row 0 has no right choice"),
        ({"target_delimiter": ""}, "nothing stands between the text and its choices"),
        ({"doc_to_text": "{{nothing}}"}, "cannot be read as a task of lm-eval"),
        ({"test_split": "exam"}, "cannot be read as a task of lm-eval"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "is not there"),
        ({"dataset_path": "somebody/data", "dataset_kwargs": None}, "needs the network"),
    ],
)
def test_what_cannot_be_read_is_explained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(write(tmp_path / "task", **changes))


def test_functions_are_not_run(tmp_path: Path) -> None:
    file = write(tmp_path / "task", doc_to_text=None)
    file.write_text(file.read_text() + "doc_to_text: !function utils.text\n")
    (file.parent / "utils.py").write_text("raise SystemExit('it ran')")
    assert "functions in Python, which restitch does not run" in refused(file)
    file.rename(file.with_name("hidden.yaml"))
    file.write_text("include: hidden.yaml\n")
    assert "functions in Python" in refused(file)


def test_templates_cannot_reach_python(tmp_path: Path) -> None:
    attack = "{{ q.__class__.__mro__[1].__subclasses__() }}"
    assert "cannot be read" in refused(write(tmp_path / "task", doc_to_text=attack))


def test_a_file_that_is_no_task_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for text in ("- 1\n", "a: [\n", "include: task.yaml\n"):
        file.write_text(text)
        assert "task of lm-eval" in refused(file)
    assert "cannot be read" in refused(tmp_path / "gone.yaml")


def test_every_path_is_checked(tmp_path: Path) -> None:
    seen: list[str] = []
    file = write(tmp_path / "task")
    read_lm_eval(str(file), "lm_eval", lambda path, _: seen.append(path.name))
    assert seen == ["cold.yaml", "test.jsonl", "train.jsonl"]


@pytest.mark.slow  # lm-eval reads all of its 13,000 files
def test_an_unknown_name_is_refused_with_similar_ones() -> None:
    message = refused("arc_eazy")
    assert "is no task of lm-eval" in message
    assert "arc_easy" in message
    assert "is a group of tasks" in refused("mmlu")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "VERSION", "0.0.1")
    assert "needs another version of lm-eval" in refused(write(tmp_path / "task"))
