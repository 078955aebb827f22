"""The main job through the command: register models, look at the line, export the model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from restitch.flows import export as export_module
from restitch.merging.digests import digest_file
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from tests.conftest import NewHome, Three
from tests.shell import Shell
from tests.worlds import SKILLS, World, write_rows, write_yaml


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def stitched(world: World, three: Three) -> dict[str, torch.Tensor]:
    """A simple reference: the k largest differences of each model, means where they overlap."""
    base = load_file(world.base / "model.safetensors")
    names = sorted(n for n in base if "encoder.layer." in n)
    sums = {n: torch.zeros(base[n].shape, dtype=torch.float64) for n in names}
    owners = {n: torch.zeros(base[n].shape, dtype=torch.int64) for n in names}
    for task in sorted(SKILLS):
        tuned = load_file(world.model(task) / "model.safetensors")
        ranked = sorted(
            (
                (-abs(float(d)), name, place)
                for name in names
                for place, d in enumerate((tuned[name] - base[name]).flatten().tolist())
            ),
        )
        for _, name, place in ranked[: int(0.3 * len(ranked) + 0.5)]:
            sums[name].view(-1)[place] += tuned[name].view(-1)[place].double()
            owners[name].view(-1)[place] += 1
    merged = dict(base)
    for name in names:
        mean = (sums[name] / owners[name].clamp(min=1)).float()
        merged[name] = torch.where(owners[name] > 0, mean, base[name])
    return merged


def test_every_registration_ends_in_a_champion_that_holds_all_models(three: Three) -> None:
    for number, (task, found) in enumerate(three.registered.items(), 1):
        assert (found["task"], found["version"], found["state"]) == (task, 1, "ready")
        assert found["already"] is False
        merged = found["merged"]
        assert (merged["action"], merged["version"], merged["champion"]) == (
            "promoted",
            number,
            number,
        )
        assert merged["localized"] == [], "the model is localized before the remerge"
        assert set(merged["record"]["members"]) == set(SKILLS[:number])
    assert three.shell.state().champion == 3


def test_results_belong_to_the_registered_models(three: Three) -> None:
    record = three.registered["animal"]["merged"]["record"]
    for task in SKILLS:
        result = record["results"][task]
        assert result["finetuned"] == 1.0, "its classes are what it says"
        assert result["base"] < 1.0
        assert result["normalized"] == result["merged"]
        assert result["interval"]["low"] < result["merged"] < result["interval"]["high"]
        assert result["count"] == 60
    kept = record["retention"]
    assert kept["base"] == 1.0
    assert kept["ratio"] == kept["value"] < 1.0
    assert kept["more"]["top5"] is not None


def test_status_shows_the_same_as_json_and_as_a_table(three: Three) -> None:
    found = three.shell.json("status")
    table = plain(three.shell("status").out)
    (line,) = found["lines"]
    assert line == three.shell.json("status", "demo")["lines"][0]
    assert (line["champion"], line["candidate"], line["pinned"]) == (3, None, False)
    assert f"champion 3, candidate -, normalized {line['mean_normalized']:.3f}" in table
    assert f"retention {line['retention']:.3f}" in table
    assert [m["task"] for m in line["models"]] == ["animal", "colour", "number"]
    for model in line["models"]:
        gain = f"{model['gain']['difference']:+.3f}"
        row = f"{model['task']} {model['version']} {model['state']} {gain} yes 30 %"
        assert row in table, row
        assert f"{model['merged']:.3f}" in table.split(row)[1].split("kB")[1]


def test_versions_are_the_same_as_json_and_as_a_table(three: Three) -> None:
    found = three.shell.json("history", "demo", "--versions")
    table = plain(three.shell("history", "demo", "--versions").out)
    assert [v["version"] for v in found["versions"]] == [3, 2, 1]
    assert [v["role"] for v in found["versions"]] == ["champion", None, None]
    assert [set(v["members"]) for v in found["versions"]] == [
        set(SKILLS[:count]) for count in (3, 2, 1)
    ]
    for version in found["versions"]:
        assert f"{version['mean_accuracy']:.3f}" in table
        assert [act["act"] for act in version["acts"]] == ["promoted"]
        assert version["made_by"]["actor"] in table


@pytest.mark.parametrize("version", ["champion", "1"])
def test_show_is_the_same_as_json_and_as_text(three: Three, version: str) -> None:
    found = three.shell.json("show", "demo", version)
    table = plain(three.shell("show", "demo", version).out)
    assert f"version {found['version']}" in table
    for task, result in found["results"].items():
        columns = ("base", "finetuned", "grafted", "merged")
        assert f"{task} " + " ".join(f"{result[c]:.3f}" for c in columns) in table
    assert found["recipe_digest"][:16] in table
    for member in found["members"].values():
        assert member["mask"][:12] in table
        assert member["facts"]["kept"] == 1334
    assert found["timings"].keys() == {"stitch", "evaluate"}


def test_evaluate_repeats_the_recorded_results(three: Three) -> None:
    before = three.shell.head_bytes()
    found = three.shell.json("evaluate", "demo", 2)
    record = three.shell.json("show", "demo", 2)
    assert found["results"] == record["results"]
    assert found["retention"] == record["retention"]
    assert three.shell.head_bytes() == before


def test_an_export_equals_a_simple_reference_and_loads(
    three: Three, world: World, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    out = tmp_path / "out"
    found = three.shell.json("export", "demo", "champion", out)
    expected = stitched(world, three)
    got = weights(out)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    model = AutoModel.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    live = model.state_dict()["encoder.layer.1.output.dense.weight"]
    assert torch.equal(live, expected["encoder.layer.1.output.dense.weight"])
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert sorted(found["files"]) == written
    assert found["bytes"] == sum((out / name).stat().st_size for name in written)
    assert {f"heads/{task}.safetensors" for task in SKILLS} <= set(written)
    record = json.loads((out / "restitch.json").read_text())
    assert record["recipe_digest"] in (out / "README.md").read_text()


@pytest.mark.parametrize("version", [1, 3])
def test_the_exported_model_reaches_the_recorded_results(
    three: Three, world: World, tmp_path: Path, version: int
) -> None:
    """It is loaded from its folder, with the head next to it."""
    three.shell("export", "demo", version, tmp_path / "out")
    family = get_family("text-encoder")
    model = family.load(tmp_path / "out")
    record = three.shell.ledger().merged(version)
    for task, result in record.results.items():
        text = (world.root / "data" / task / "test.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        head = Head.from_bytes((tmp_path / "out" / "heads" / f"{task}.safetensors").read_bytes())
        batch = family.preprocessor(world.base)([Example((r["text"],), None, "") for r in rows])
        with torch.inference_mode():
            guesses = family.logits(model, batch, head).argmax(1).tolist()
        right = sum(head.spec.classes[g] == r["label"] for g, r in zip(guesses, rows, strict=True))
        assert result.merged == right / len(rows)


def test_an_export_of_the_same_version_has_the_same_bytes(three: Three, tmp_path: Path) -> None:
    for name in ("one", "two"):
        three.shell("export", "demo", "3", tmp_path / name)
    digests = [
        {p.relative_to(folder): digest_file(p) for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert digests[0] == digests[1]


def test_an_export_can_be_sharded(three: Three, world: World, tmp_path: Path) -> None:
    three.shell("export", "demo", "champion", tmp_path / "whole")
    three.shell("export", "demo", "champion", tmp_path / "parts", "--shard-size", "10KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 2
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    whole, dealt = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == dealt.keys()
    assert all(torch.equal(whole[name], dealt[name]) for name in whole)


def test_an_export_replaces_a_model_only_with_overwrite(three: Three, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    three.shell("export", "demo", "1", out)  # an empty folder is free
    first = digest_file(out / "model.safetensors")
    done = three.shell("export", "demo", "2", out, code=3)
    assert "--overwrite" in done.err
    assert digest_file(out / "model.safetensors") == first
    three.shell("export", "demo", "2", out, "--overwrite")
    assert digest_file(out / "model.safetensors") != first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_no_model_is_never_replaced(three: Three, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    three.shell("export", "demo", "1", tmp_path, "--overwrite", code=3)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    three.shell("export", "demo", "1", tmp_path / "thesis.tex", "--overwrite", code=3)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_export_that_fails_leaves_nothing(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    out = tmp_path / "out"
    three.shell("export", "demo", "1", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", fail)
    three.shell("export", "demo", "2", out, "--overwrite", code=6)
    three.shell("export", "demo", "2", tmp_path / "other", code=6)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("version", ["4", "0", "-1", "latest", "candidate", "\u0661"])
def test_an_unknown_version_is_named(three: Three, version: str) -> None:
    done = three.shell("show", "demo", "--", version, code=3)
    assert version in done.err
    assert "champion" in done.err


def test_an_unknown_line_is_named_with_the_known_ones(three: Three) -> None:
    for command in ("history", "show", "remerge", "evaluate", "status"):
        done = three.shell(command, "dmeo", code=3)
        assert "'dmeo'" in done.err
        assert "demo" in done.err


def test_wrong_usage_exits_with_2(three: Three) -> None:
    for args in (("registr",), ("register", "demo"), ("status", "--jsno"), ("show",)):
        three.shell(*args, code=2)


@pytest.mark.usefixtures("without_mlflow")
def test_registering_the_same_model_again_changes_nothing(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    before = shell.head_bytes()
    found = shell.add(world, "colour")
    assert (found["already"], found["version"]) == (True, 1)
    assert found["merged"]["action"] == "unchanged"
    assert shell.head_bytes() == before
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    assert "already version 1" in shell("register", "demo", *files).out


@pytest.mark.usefixtures("without_mlflow")
def test_registering_the_same_model_again_finishes_unfinished_work(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    found = shell.add(world, "colour", "--no-remerge")
    assert (found["state"], found["merged"], shell.state().champion) == ("ready", None, None)
    found = shell.add(world, "colour")
    assert (found["already"], found["merged"]["action"]) == (True, "promoted")
    assert shell.kinds() == ["configured", "registered", "localized", "merged", "promoted"]


@pytest.mark.usefixtures("without_mlflow")
def test_other_weights_replace_the_member(world: World, new_home: NewHome, tmp_path: Path) -> None:
    shell, only = new_home("home"), new_home("only")
    for one in (shell, only):
        one("init", world.line(tmp_path / "line.yaml"))
        one.add(world, "number")
    shell.add(world, "colour")
    found = shell.add(world, "colour", model="colour-2")
    only.add(world, "colour", model="colour-2")
    assert (found["version"], found["already"], found["state"]) == (2, False, "ready")
    assert found["merged"]["record"]["members"]["colour"]["version"] == 2
    states = {n: m.state for n, m in shell.state().tasks["colour"].versions.items()}
    assert states == {1: "replaced", 2: "ready"}
    assert shell.patch_bytes() == only.patch_bytes()


def other_task(world: World, file: Path) -> Path:
    """The task `colour` on half of its rows."""
    rows = [json.loads(s) for s in (world.root / "data/colour/test.jsonl").read_text().splitlines()]
    write_rows(file.parent / "half" / "test.jsonl", rows[:30])
    return write_yaml(
        file,
        {
            "task": "colour",
            "data": {"path": "half", "test": "test.jsonl", "input": "text", "label": "label"},
            "head": {"labels": ["red", "green", "blue"], "templates": ["{}", "it is {}"]},
        },
    )


@pytest.mark.usefixtures("without_mlflow")
def test_another_task_file_needs_replace_task(world: World, shell: Shell, tmp_path: Path) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    before = shell.head_bytes()
    files = ("--task", other_task(world, tmp_path / "other.yaml"), "--model")
    done = shell("register", "demo", *files, world.model("colour-2"), code=3)
    assert "--replace-task" in done.err
    assert "differs in: data" in done.err
    assert shell.head_bytes() == before
    found = shell.json("register", "demo", *files, world.model("colour-2"), "--replace-task")
    assert (found["version"], found["merged"]["record"]["results"]["colour"]["count"]) == (2, 30)


@pytest.mark.usefixtures("without_mlflow")
def test_a_replaced_task_is_measured_again_with_the_same_weights(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    patch = shell.patch_bytes()
    other = other_task(world, tmp_path / "other.yaml")
    files = ("--task", other, "--model", world.model("colour"))
    found = shell.json("register", "demo", *files, "--replace-task")
    assert found["merged"]["record"]["results"]["colour"]["count"] == 30
    assert shell.json("show", "demo")["results"]["colour"]["count"] == 30
    assert shell.patch_bytes() == patch
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.json("register", "demo", *files)["already"] is True


@pytest.mark.usefixtures("without_mlflow")
def test_a_task_file_may_move(world: World, shell: Shell, tmp_path: Path) -> None:
    """The place of its files does not change a task."""
    shell("init", world.line(tmp_path / "line.yaml"))
    shell.add(world, "colour")
    rows = (world.root / "data/colour/test.jsonl").read_bytes()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "test.jsonl").write_bytes(rows)
    moved = write_yaml(
        tmp_path / "moved.yaml",
        {
            "task": "colour",
            "data": {"path": "moved", "test": "test.jsonl", "input": ["text"], "label": "label"},
            "head": {"labels": ["red", "green", "blue"], "templates": ["{}", "it is {}"]},
        },
    )
    files = ("--task", moved, "--model", world.model("colour"))
    assert shell.json("register", "demo", *files)["already"] is True


@pytest.mark.usefixtures("without_mlflow")
def test_a_task_without_data_is_merged_and_not_evaluated(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    task = write_yaml(tmp_path / "bare.yaml", {"task": "bare"})
    files = ("--task", task, "--model", world.model("number"))
    found = shell.json("register", "demo", *files)
    record = found["merged"]["record"]
    assert found["merged"]["action"] == "promoted"
    assert record["results"]["bare"]["merged"] is None
    assert record["results"]["bare"]["notes"] == ["no data: not evaluated"]
    assert record["retention"] is None
    assert record["kept"] == 1334
    for command in ("status", "history", "show", "evaluate"):
        shell(command, "demo")


@pytest.mark.usefixtures("without_mlflow")
def test_init_of_a_known_line_does_nothing_or_changes_settings_or_refuses(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    line = tmp_path / "line.yaml"
    first = shell.json("init", world.line(line))
    assert first["created"] is True
    assert first["localizable"]["coordinates"] == 4448
    before = shell.head_bytes()
    again = shell.json("init", line)
    assert (again["created"], again["changes"]) == (False, [])
    assert shell.head_bytes() == before
    changed = shell.json("init", world.line(line, gates={"min_retention": 0.5}))
    assert changed["changes"] == [["gates.min_retention", None, 0.5]]
    assert shell.kinds() == ["configured", "configured"]
    before = shell.head_bytes()
    for wrong in ({"base": str(world.model("number"))}, {"family": "clip"}):
        done = shell("init", world.line(line, **wrong), code=3)
        assert "cannot change" in done.err
        assert shell.head_bytes() == before
    done = shell("init", world.line(line, gates={"min_retention": 0.6}))
    assert "\n  gates.min_retention: 0.5 -> 0.6\n" in done.out


@pytest.mark.usefixtures("without_mlflow")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_changed_on_disk_is_refused(
    world: World, shell: Shell, tmp_path: Path, name: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    line = world.line(tmp_path / "line.yaml", base=str(base), retention=None)
    shell("init", line)
    before = shell.head_bytes()
    if name == "model.safetensors":
        shutil.copyfile(world.model("number") / name, base / name)
    else:
        (base / name).write_text((base / name).read_text() + " ")
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    for command in (("init", line), ("register", "demo", *files)):
        done = shell(*command, code=3)
        assert "changed" in done.err
    assert shell.head_bytes() == before


@pytest.mark.usefixtures("without_mlflow")
def test_the_card_of_an_export_states_the_licence_of_a_model_that_was_copied(
    world: World, shell: Shell, tmp_path: Path
) -> None:
    """The folder that it came from may be gone by then."""
    model = tmp_path / "model"
    shutil.copytree(world.model("colour"), model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    files = ("--task", world.task("colour"), "--model", model, "--copy", "--no-remerge")
    shell("register", "demo", *files)
    shutil.rmtree(model)
    shell("remerge", "demo")
    shell("export", "demo", "champion", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if line.startswith("| colour | `store://")]
    assert row.endswith("| apache-2.0 |")
