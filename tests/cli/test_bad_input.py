"""Bad input: one clear message, the exit code of its kind, and no change.

Unreadable input is refused before it is recorded. A readable model that cannot join is
quarantined by exactly one act, which names all its faults.
"""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import NewHome
from tests.shell import Shell
from tests.tiny_models import tiny_bert, tiny_roberta
from tests.worlds import World, copied, write_rows, write_yaml

WEIGHTS = "model.safetensors"
OUTSIDE = "embeddings.word_embeddings.weight"
BLOCK = "encoder.layer.0.attention.self.query.weight"

pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def line(world: World, shell: Shell, tmp_path: Path) -> Shell:
    """A line with one member."""
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    shell.add(world, "number")
    return shell


def retensored(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def reconfigured(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lies_about_sizes(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header[BLOCK]["shape"] = [1 << 20, 1 << 20]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def claims_a_huge_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def is_a_text(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def is_empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def lacks_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {BLOCK: "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def stored_files(shell: Shell) -> set[str]:
    """Everything in the store, and the models that MLflow knows."""
    store = shell.home / "store"
    return {str(file.relative_to(store)) for file in store.rglob("*") if file.is_file()}


def is_an_adapter(folder: Path) -> None:
    factors = {f"{BLOCK[:-7]}.lora_A.weight": torch.ones(2, 16)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / WEIGHTS).unlink()


def has_an_adapter_next_to_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def holds_adapter_factors(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{BLOCK[:-7]}.base_layer.weight"] = tensors.pop(BLOCK)
    tensors[f"{BLOCK[:-7]}.lora_A.default.weight"] = torch.ones(2, 16)
    tensors[f"{BLOCK[:-7]}.lora_B.default.weight"] = torch.ones(16, 2)


def holds_a_second_checkpoint(folder: Path) -> None:
    for number in (1, 2):
        save_file({"x": torch.ones(1)}, folder / f"model-0000{number}-of-00002.safetensors")


def in_8_bits(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if value.ndim == 2 and name.startswith("encoder.layer."):
                tensors[name] = value.to(dtype)

    return change


def lies_one_folder_below(folder: Path) -> None:
    (folder / "checkpoint-20").mkdir()
    (folder / WEIGHTS).rename(folder / "checkpoint-20" / WEIGHTS)


UNREADABLE = {
    "half of an adapter": (is_an_adapter, "lora_B missing"),
    "adapter next to weights": (has_an_adapter_next_to_it, "an adapter next to whole weights"),
    "factors in the weights": (retensored(holds_adapter_factors), "lora_A.default.weight"),
    "two checkpoints": (holds_a_second_checkpoint, "contains several checkpoints"),
    "fp8": (retensored(in_8_bits(torch.float8_e4m3fn)), BLOCK),
    "int8": (retensored(in_8_bits(torch.int8)), BLOCK),
    "quantized by its config": (
        reconfigured(quantization_config={"quant_method": "awq"}),
        "quantization_config: awq",
    ),
    "checkpoint below": (lies_one_folder_below, "checkpoint-20"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors"),
    "truncated": (cut, "model.safetensors"),
    "lying header": (lies_about_sizes, BLOCK),
    "huge header": (claims_a_huge_header, "model.safetensors"),
    "not safetensors": (is_a_text, "model.safetensors"),
    "empty file": (is_empty, "model.safetensors"),
    "missing shard": (lacks_a_shard, "model-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_model_is_refused(
    world: World, line: Shell, tmp_path: Path, case: str
) -> None:
    change, named = UNREADABLE[case]
    model = copied(world.model("colour"), tmp_path / "model", change)
    before, stored = line.head_bytes(), stored_files(line)
    for options in ((), ("--copy",)):
        files = ("--task", world.task("colour"), "--model", model)
        done = line("register", "demo", *files, *options, code=3)
        assert named in done.err
        assert str(model) in done.err.replace("\n", "")
    assert line.head_bytes() == before
    assert stored_files(line) == stored, "nothing is left of it"


class Mark:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter.pkl"])
def test_a_pickle_is_never_loaded_and_the_message_says_how_to_convert_it(
    world: World, line: Shell, tmp_path: Path, name: str
) -> None:
    mark = tmp_path / "it-was-loaded"

    def pickled(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Mark(mark)))

    model = copied(world.model("colour"), tmp_path / "model", pickled)
    before = line.head_bytes()
    files = ("--task", world.task("colour"), "--model")
    for source in (model, model / name):
        done = line("register", "demo", *files, source, code=3)
        assert name in done.err
        assert "save_pretrained" in done.err
    assert line.head_bytes() == before
    assert not mark.exists()


def poisoned(value: float, name: str = BLOCK) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = value

    return change


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def other_shapes(tensors: dict[str, torch.Tensor]) -> None:
    for name in (BLOCK, BLOCK.replace("query", "key")):
        tensors[name] = torch.zeros(4, 4)


def as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BLOCK] = tensors[BLOCK].to(torch.int64)


def breaks_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def has_several_faults(folder: Path) -> None:
    retensored(without(LATER))(folder)
    reconfigured(hidden_act="relu")(folder)


LATER = "encoder.layer.1.output.dense.bias"
CANNOT_JOIN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "nan": (retensored(poisoned(float("nan"))), (BLOCK,)),
    "infinity": (retensored(poisoned(float("-inf"))), (BLOCK,)),
    "nan outside of masks": (retensored(poisoned(float("nan"), OUTSIDE)), (OUTSIDE,)),
    "infinity outside of masks": (retensored(poisoned(float("inf"), OUTSIDE)), (OUTSIDE,)),
    "missing": (retensored(without(BLOCK, LATER)), (BLOCK, LATER)),
    "other shape": (retensored(other_shapes), (BLOCK, BLOCK.replace("query", "key"), "[4, 4]")),
    "integers": (retensored(as_integers), (BLOCK,)),
    "other keys": (
        reconfigured(hidden_act="relu", layer_norm_eps=0.5),
        ("hidden_act", "'gelu'", "'relu'", "layer_norm_eps"),
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "broken config": (breaks_the_config, ("config.json",)),
    "several faults": (has_several_faults, (LATER, "hidden_act")),
}


def check_quarantined(world: World, line: Shell, model: Path, named: tuple[str, ...]) -> None:
    before, champion, kinds = line.state(), line.patch_bytes(), line.kinds()
    found = line.json("register", "demo", "--task", world.task("colour"), "--model", model, code=4)
    assert found["state"] == "quarantined"
    assert found["merged"] is None
    for name in named:
        assert name in found["reason"]
    assert line.kinds() == [*kinds, "registered", "quarantined"]
    after = line.state()
    assert (after.champion, after.versions) == (before.champion, before.versions)
    assert after.members == before.members
    # Again: it is known, and nothing is written.
    bytes_before = line.head_bytes()
    again = line.json("register", "demo", "--task", world.task("colour"), "--model", model, code=4)
    assert (again["already"], again["reason"]) == (True, found["reason"])
    assert line.head_bytes() == bytes_before
    # The line goes on without it.
    assert line.json("remerge", "demo")["action"] == "unchanged"
    assert line.add(world, "colour")["version"] == 2
    assert line.state().members[0].version == 2
    assert line.patch_bytes() != champion


@pytest.mark.parametrize("case", CANNOT_JOIN)
def test_a_model_that_cannot_join_is_quarantined(
    world: World, line: Shell, tmp_path: Path, case: str
) -> None:
    change, named = CANNOT_JOIN[case]
    model = copied(world.model("colour"), tmp_path / "model", change)
    check_quarantined(world, line, model, named)


def test_a_model_that_is_the_base_is_quarantined(world: World, line: Shell) -> None:
    check_quarantined(world, line, world.base, ("same", "base"))


def test_another_architecture_is_quarantined(world: World, line: Shell, tmp_path: Path) -> None:
    check_quarantined(world, line, tiny_roberta(tmp_path / "model"), ("roberta", "bert"))


def test_another_size_is_quarantined_with_the_first_differences_and_their_number(
    world: World, line: Shell, tmp_path: Path
) -> None:
    """The configuration first, then names and shapes; both sides' names are shown."""
    model = tiny_bert(tmp_path / "model", hidden=8, layers=1)
    named = ("hidden_size", "num_hidden_layers", "missing: encoder.layer.1.", "- and ")
    check_quarantined(world, line, model, (*named, "its 32 localizable tensors, such as encoder."))


def test_a_quarantine_is_shown_with_its_reason(world: World, line: Shell, tmp_path: Path) -> None:
    model = copied(world.model("colour"), tmp_path / "model", reconfigured(hidden_act="relu"))
    files = ("--task", world.task("colour"), "--model", model)
    done = line("register", "demo", *files, code=4)
    assert "hidden_act" in done.out
    assert "hidden_act" in line("status", "demo").out
    (shown,) = [m for m in line.json("status", "demo")["lines"][0]["models"] if m["reason"]]
    assert (shown["task"], shown["state"]) == ("colour", "quarantined")


ROWS = [{"text": f"row {n}", "label": ("red", "green", "blue")[n % 3]} for n in range(9)]


def task_file(folder: Path, rows: list[dict[str, Any]] | str, **changes: Any) -> Path:
    if isinstance(rows, str):
        (folder / "data").mkdir()
        (folder / "data" / "test.jsonl").write_text(rows)
    else:
        write_rows(folder / "data" / "test.jsonl", rows)
    values: dict[str, Any] = {
        "task": "colour",
        "data": {"path": "data", "test": "test.jsonl", "input": "text", "label": "label"},
        "head": {"labels": ["red", "green", "blue"]},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and key in values:
            values[key] = values[key] | value
        else:
            values[key] = value
    return write_yaml(folder / "task.yaml", {k: v for k, v in values.items() if v is not None})


BAD_TASKS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "empty dataset": ([], {}, ("no rows", "test.jsonl")),
    "missing column": (ROWS, {"data": {"input": "sentence"}}, ("'sentence'", "text, label")),
    "missing label column": (ROWS, {"data": {"label": "class"}}, ("'class'", "text, label")),
    "label outside of the classes": (
        [*ROWS, {"text": "x", "label": "violet"}],
        {},
        ("row 9", "'violet'", "red, green, blue"),
    ),
    "index outside of the classes": ([*ROWS, {"text": "x", "label": 3}], {}, ("row 9", "3")),
    "no label": ([*ROWS, {"text": "x"}], {}, ("row 9",)),
    "a row without text": ([*ROWS, {"text": 7, "label": "red"}], {}, ("row 9", "'text'", "7")),
    "broken rows": ('{"text": "a", "label": "red"}\n{"text": ', {}, ("test.jsonl", "2")),
    "missing file": (ROWS, {"data": {"test": "tset.jsonl"}}, ("tset.jsonl", "test.jsonl")),
    "missing folder": (ROWS, {"data": {"path": "./nowhere"}}, ("nowhere",)),
    "unknown key": (ROWS, {"meric": "f1"}, ("meric", "'metric'")),
    "unknown inner key": (ROWS, {"head": {"lables": ["a"]}}, ("lables", "'labels'")),
    "unknown metric": (ROWS, {"metric": "acuracy"}, ("acuracy", "accuracy")),
    "no head": (ROWS, {"head": None}, ("head",)),
    "no place in a template": (ROWS, {"head": {"templates": ["a thing"]}}, ("a thing",)),
    "a label twice": (ROWS, {"head": {"labels": ["red", "red", "blue"]}}, ("'red'",)),
    "a name with a slash": (ROWS, {"task": "../colour"}, ("../colour",)),
    "negative scale": (ROWS, {"scale": -1}, ("scale",)),
    "a scale beyond float": (ROWS, {"scale": 1e39}, ("scale",)),
    "more tokens than the base reads": (ROWS, {"max_length": 100_000}, ("100000", "at most")),
    "a number beyond counting": (ROWS, {"max_length": 10**30}, ("max_length",)),
    "a sample beyond counting": (ROWS, {"data": {"sample": 10**30}}, ("sample",)),
    "three input columns": (ROWS, {"data": {"input": ["text"] * 3}}, ("input columns", "3")),
    "data at a web address": (
        ROWS,
        {"data": {"path": "http://data.invalid/pets"}},
        ("http://data.invalid/pets", "an address"),
    ),
    "data in a bucket": (ROWS, {"data": {"path": "s3://bucket/pets"}}, ("s3://bucket/pets",)),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_bad_task_is_refused(world: World, line: Shell, tmp_path: Path, case: str) -> None:
    rows, changes, named = BAD_TASKS[case]
    file = task_file(tmp_path, rows, **changes)
    before = line.head_bytes()
    files = ("--task", file, "--model", world.model("colour"))
    done = line("register", "demo", *files, code=3)
    for name in named:
        assert name in done.err
    assert line.head_bytes() == before


def test_a_file_that_is_not_yaml_is_refused(world: World, line: Shell, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    before = line.head_bytes()
    for text in ("task: [", "- a\n- b", "", "task: a\ntask: b", "!!python/object:os.system {}"):
        file.write_text(text)
        files = ("--task", file, "--model", world.model("colour"))
        assert str(file) in line("register", "demo", *files, code=3).err.replace("\n", "")
    file.write_bytes(b"\xff\xfe\x00")
    line("register", "demo", *files, code=3)
    line("register", "demo", "--task", tmp_path / "no.yaml", *files[2:], code=3)
    line("register", "demo", "--task", tmp_path, *files[2:], code=3)
    assert line.head_bytes() == before


BAD_LINES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown family": ({"family": "text-encodr"}, ("text-encodr", "'text-encoder'")),
    "unknown method": ({"method": "localise-and-stitch"}, ("'localize-and-stitch'",)),
    "unknown setting": (
        {"method": {"name": "localize-and-stitch", "settings": {"overlp": "mean"}}},
        ("overlp", "overlap"),
    ),
    "unknown rule": (
        {"method": {"name": "localize-and-stitch", "settings": {"overlap": "meen"}}},
        ("meen", "mean"),
    ),
    "unknown key": ({"gate": {}}, ("gate", "'gates'")),
    "unknown gate": ({"gates": {"min_retentoin": 1}}, ("min_retentoin", "'min_retention'")),
    "density above one": ({"localize": {"density": 5}}, ("density",)),
    "no density": ({"localize": {"density": 0}}, ("density",)),
    "unknown mode": ({"localize": {"mode": "datales"}}, ("datales", "dataless")),
    "missing base": ({"base": "./nowhere"}, ("nowhere",)),
    "missing retention": ({"retention": "./no.yaml"}, ("no.yaml",)),
    "a name with capitals": ({"line": "Demo"}, ("Demo",)),
    "a schedule that is none": ({"schedule": "hourly"}, ("hourly",)),
    "a minute that does not exist": ({"schedule": "61 * * * *"}, ("minute: 61", "minute 0-59")),
    "a date that does not exist": ({"schedule": "0 0 30 2 *"}, ("0 0 30 2 *", "never fires")),
    "a time zone that does not exist": (
        {"schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berln"}},
        ("Europe/Berln", "Europe/Berlin"),
    ),
    "a schedule without its cron line": ({"schedule": {"timezone": "UTC"}}, ("schedule.cron",)),
    "a density that keeps nothing": ({"localize": {"density": 1e-9}}, ("density", "1e-09")),
    "shots beyond counting": ({"localize": {"shots": 10**30}}, ("shots",)),
    "a bucket without a name": ({"base": "s3://"}, ("s3://",)),
    "a base of another family": (
        {"family": "clip"},
        ("BertModel", "a text encoder", "`family: text-encoder`"),
    ),
    "no family": ({"family": None}, ("a text encoder", "`family: text-encoder`")),
    "globs without a tensor": ({"localize": {"exclude": ["*"]}}, ("exclude",)),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused(world: World, shell: Shell, tmp_path: Path, case: str) -> None:
    changes, named = BAD_LINES[case]
    done = shell("init", world.line(tmp_path / "line.yaml", **changes), code=3)
    for name in named:
        assert name in done.err
    assert shell.json("status")["lines"] == []


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_base_is_refused(
    world: World, shell: Shell, tmp_path: Path, case: str
) -> None:
    change, named = UNREADABLE[case]
    base = copied(world.base, tmp_path / "base", change)
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(base)), code=3)
    # No part of an adapter is looked at: it cannot be a base.
    whole = "is an adapter, not a whole model"
    assert (whole if change is is_an_adapter else named) in done.err
    assert shell.json("status")["lines"] == []


def test_a_base_without_config_or_tokenizer_is_refused(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    base = copied(world.base, tmp_path / "base", lambda f: (f / "config.json").unlink())
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(base)), code=3)
    assert "config.json" in done.err
    assert shell.json("status")["lines"] == []


def test_a_base_with_weights_that_are_not_numbers_is_refused(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    base = copied(world.base, tmp_path / "base", retensored(poisoned(float("nan"), OUTSIDE)))
    done = shell("init", world.line(tmp_path / "line.yaml", base=str(base)), code=3)
    assert OUTSIDE in done.err
    assert shell.json("status")["lines"] == []


def test_an_unreadable_image_file_is_refused(
    clip_world: World, new_home: NewHome, tmp_path: Path
) -> None:
    line = new_home("clip")
    line("init", clip_world.line(tmp_path / "line.yaml", retention=None))
    before = line.head_bytes()
    data = copied(clip_world.root / "data" / "colour", tmp_path / "data")
    broken = sorted(data.rglob("*.png"))[-1]
    broken.write_bytes(broken.read_bytes()[:60])
    values = {
        "task": "colour",
        "data": {"path": "data", "test": "test"},
        "head": {"labels_from": "dataset", "templates": ["a {}"]},
    }
    files = ("--task", write_yaml(tmp_path / "colour.yaml", values), "--model")
    done = line("register", "demo", *files, clip_world.model("colour"), code=3)
    assert broken.name in done.err
    assert line.head_bytes() == before


def test_changed_data_is_refused_and_the_line_stays(
    world: World, line: Shell, tmp_path: Path
) -> None:
    file = task_file(tmp_path, ROWS)
    files = ("--task", file, "--model", world.model("colour"))
    line("register", "demo", *files, "--no-remerge")
    write_rows(tmp_path / "data" / "test.jsonl", ROWS[:-1])
    before = line.head_bytes()
    done = line("remerge", "demo", code=3)
    assert "colour" in done.err
    assert "--replace-task" in done.err
    assert line.head_bytes() == before


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD_ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(8)]
# A file of rows with one that is bad, and what the message names.
BAD_ROWS: dict[str, tuple[str, str | bytes, str]] = {
    "half of a character": (
        "bad.jsonl",
        lines_of([*GOOD_ROWS, {"text": "a \ud83d", "label": 0}]),
        "bad.jsonl row 8",
    ),
    "no text": ("bad.jsonl", lines_of([*GOOD_ROWS, {"text": None, "label": 0}]), "bad.jsonl row 8"),
    "no label": ("bad.jsonl", lines_of([*GOOD_ROWS, {"text": "a"}]), "bad.jsonl row 8"),
    "minus one": ("bad.csv", "text,label\na,0\nb,-1\n", "bad.csv row 1"),
    "too few fields": ("bad.tsv", "text\tlabel\na\t0\nb\n", "bad.tsv line 3"),
    "not UTF-8": ("bad.csv", b"text,label\na,0\n\xff,1\n", "bad.csv line 3"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_hinders_nobody_else(
    world: World, line: Shell, tmp_path: Path, case: str
) -> None:
    name, content, named = BAD_ROWS[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    values = {
        "task": "bad",
        "data": {"path": str(tmp_path), "test": name},
        "head": {"labels": ["red", "green"]},
    }
    task = write_yaml(tmp_path / "bad.yaml", values)
    before = line.head_bytes()
    for command in (
        ("register", "demo", "--task", task, "--model", world.model("colour")),
        ("task", "demo", "--task", task),
    ):
        done = line(*command, code=3)
        assert named in done.err.replace("\n", " ")
    assert line.head_bytes() == before
    line("remerge", "demo")
    assert "number" in line("status", "demo").out
