"""The papers' studies for a line: their tables add up, and nothing is computed twice."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.flows.promotion.snapshot import take_snapshot
from restitch.flows.research.study import STUDIES
from restitch.flows.research.study.continual import FINETUNING
from restitch.merging.errors import Unavailable
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.inputs.checkpoints import open_base, open_sparse
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.research.finetune import finetune
from restitch.tasks.runtime.workspace import workspace
from tests.cli.test_end_to_end import plain
from tests.flows.research.runs import study_runs
from tests.flows.test_localizing import add_with_splits
from tests.shell import Shell
from tests.worlds import SKILLS, World

Made = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shell(world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Shell:
    """Three members with train, validation and test rows, registered in this order."""
    root = tmp_path_factory.mktemp("studies")
    (root / "home").mkdir()
    (root / "home" / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    shell = Shell(root / "home")
    shell("init", world.line(root / "line.yaml", retention=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
        add_with_splits(shell, world, root, *SKILLS)
    return shell


def smaller(patch: pytest.MonkeyPatch) -> None:
    """Studies with fewer points."""
    patch.setattr("restitch.flows.research.study.tasks.MOST", 2)
    patch.setattr("restitch.flows.research.study.continual.OTHERS", ("task-arithmetic",))
    patch.setattr("restitch.flows.research.study.shots.SHOTS", (1, 4))
    patch.setattr("restitch.flows.research.study.density.DENSITIES", (0.05, 0.3))


@pytest.fixture(scope="module")
def made(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All studies; the folder holds the printed result."""
    before, found = shell.head_bytes(), {}
    with pytest.MonkeyPatch.context() as patch:
        smaller(patch)
        for name in STUDIES:
            out = tmp_path_factory.mktemp(name)
            found[name] = shell.json("study", name, "demo", "--out", out)
            assert json.loads((out / f"{name}.json").read_bytes()) == found[name]
            rows = list(csv.DictReader(io.StringIO((out / f"{name}.csv").read_text())))
            assert [list(row) for row in rows] == [found[name]["columns"]] * len(rows)
            texts = {k: "" if v is None else str(v) for k, v in found[name]["rows"][-1].items()}
            assert rows[-1] == texts
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert shell.head_bytes() == before, "the line stays as it is"
    return found


def test_a_second_study_computes_nothing(
    shell: Shell, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def published(*_: object, **__: object) -> None:
        raise AssertionError("something was made again")

    monkeypatch.setattr(ObjectStore, "publish", published)
    smaller(monkeypatch)
    monkeypatch.setattr("restitch.flows.research.study.flow.publish_study", lambda *_, **__: None)
    for name in STUDIES:
        assert shell.json("study", name, "demo")["rows"] == made[name]["rows"]


def of_method(found: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["method"] == method]


def test_all_members_merged_by_the_lines_method_score_like_the_champion(
    shell: Shell, made: Made
) -> None:
    champion = shell.ledger().merged(shell.state().champion or 0)
    for name in ("continual", "tasks"):
        last = of_method(made[name], "localize-and-stitch")[-1]
        assert last["mean"] == champion.mean_accuracy
        assert last["normalized"] == pytest.approx(champion.mean_normalized)
    # The line keeps 30 % of the weights.
    means = {row["density"]: row["mean"] for row in made["density"]["rows"]}
    assert means[0.3] == champion.mean_accuracy


def test_members_join_in_the_order_in_which_they_were_registered(made: Made) -> None:
    found = made["continual"]
    methods = {"localize-and-stitch": 1, "task-arithmetic": 11, FINETUNING: 0}
    assert [row["method"] for row in found["rows"]] == [*methods] * 2
    for method in methods:
        assert [row["joined"] for row in of_method(found, method)] == list(SKILLS[1:])
    assert f"in the order {', '.join(SKILLS)}" in found["notes"]
    for row in found["rows"]:
        assert row["merges"] == methods[row["method"]]
        seconds = (row["localize"] or 0.0) + row["merges"] * (row["merge"] or 0.0)
        assert row["seconds"] == pytest.approx(seconds + (row["finetune"] or 0.0))
        assert row["tuned"] == (row["tuned"] if row["merges"] > 1 else None)


def test_continual_finetuning_starts_from_its_last_state_and_does_not_change_the_base(
    shell: Shell, made: Made
) -> None:
    last = of_method(made["continual"], FINETUNING)[-1]
    assert all(last[task] is not None for task in SKILLS)
    notes = [note for note in made["continual"]["notes"] if "finetun" in note]
    assert len(notes) == 1, "what it reaches on the first task alone"
    with shell.inside():
        snapshot = take_snapshot(shell.ledger())
        line, members = snapshot.line_in_use, {m.task: m for m in snapshot.members}
        before = None
        for task in SKILLS:
            patch = finetune(line, members[task], before)
            alone = finetune(line, members[task])
            assert (alone.blob == patch.blob) == (before is None)
            before = patch.blob
        assert patch.seconds == last["finetune"], "it was in the store"
        base = open_base(line, workspace())
        live = live_base(base, "test")
        learned = open_sparse(str(before), workspace(), base.checkpoint)
        assert set(learned.names) <= set(base.names)
        for name in base.names:
            assert torch.equal(live.parameters[name], base.checkpoint.tensor(name))


def test_a_gpu_that_is_too_small_for_finetuning_is_reported(
    shell: Shell, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(parameters: dict[str, torch.Tensor], names: list[str], *_: object, **__: Any) -> None:
        with torch.no_grad():
            parameters[names[0]].zero_()
        raise torch.OutOfMemoryError("Tried to allocate 20 MiB\nand more")

    monkeypatch.setattr("restitch.tasks.research.finetune.learn", learn)
    monkeypatch.setattr("restitch.tasks.research.finetune.MOST_ROWS", 7)
    with shell.inside():
        snapshot = take_snapshot(shell.ledger())
        line, member = snapshot.line_in_use, snapshot.members[0]
        with pytest.raises(Unavailable, match="memory") as raised:
            finetune(line, member)
        assert raised.value.found == "Tried to allocate 20 MiB"
        base = open_base(line, workspace())
        live = live_base(base, "test").parameters[base.names[0]]
        assert torch.equal(live, base.checkpoint.tensor(base.names[0]))


def test_more_agreement_keeps_fewer_weights_and_none_keeps_the_whole_sum(
    shell: Shell, made: Made
) -> None:
    rows = of_method(made["threshold"], "consensus-ta")
    assert [row["agreement"] for row in rows] == [0, 1, 2, 3]
    changed = [row["changed"] for row in rows]
    assert changed == sorted(changed, reverse=True)
    facts = shell.state().tasks["colour"].versions[1].facts
    assert changed[0] == facts.coordinates


def test_every_weight_is_counted_once_per_kind_of_masks(shell: Shell, made: Made) -> None:
    rows = made["agreement"]["rows"]
    for masks in dict.fromkeys(row["masks"] for row in rows):
        some = [row for row in rows if row["masks"] == masks]
        assert [row["agreeing"] for row in some] == [0, 1, 2, 3]
        assert sum(row["share"] for row in some) == pytest.approx(1)
        assert [row["kind"].split()[0] for row in some] == [
            *("catastrophic", "selfish", "general", "universal")
        ]
    own = [row["weights"] for row in rows if row["masks"] == "the line's masks"]
    assert own[1:] == shell.json("analyze", "demo", "--densities", "1")["masks"]["owners"]


def test_similar_subsets_come_before_dissimilar_ones(made: Made) -> None:
    rows = of_method(made["subsets"], "localize-and-stitch")
    likeness = [row["similarity"] for row in rows]
    assert likeness == sorted(likeness, reverse=True)
    assert {row["group"] for row in rows} == {"similar", "dissimilar"}
    assert len({row["tasks"] for row in rows}) == len(rows) == 3


def test_localizers_get_the_rows_that_the_study_reports(made: Made) -> None:
    rows = made["shots"]["rows"]
    assert [(row["localizer"], row["shots"]) for row in rows] == [
        *(("fisher", 1), ("fisher", 4), ("dataless", 0))
    ]
    classes = 3 + 2 + 4
    assert rows[0]["rows"] <= classes < rows[1]["rows"] <= 4 * classes


def test_every_method_is_timed(made: Made) -> None:
    from restitch.merging.methods.registry import get_method, method_names

    rows = made["runtime"]["rows"]
    merged = {name for name in method_names() if get_method(name).kind == "merged"}
    assert {row["what"] for row in rows if row["step"] == "merge"} == merged
    assert all(row["seconds"] > 0 for row in rows)


def test_a_study_is_a_run_in_mlflow(shell: Shell, made: Made) -> None:
    shown = study_runs(shell)
    assert set(shown) >= {f"{name} of demo" for name in STUDIES}
    run, files = shown["tasks of demo"]
    assert run.data.metrics["001/mean"] == pytest.approx(made["tasks"]["rows"][0]["mean"])
    assert files >= {"tasks.csv", "tasks.json", "tasks.png"}


def test_the_help_lists_every_study_and_the_table_is_printed(shell: Shell, made: Made) -> None:
    help_text = plain(shell("study", "--help").out)
    assert all(name in help_text for name in STUDIES)
    shown = plain(shell("study", "agreement", "demo").out)
    assert "universal (3)" in shown
    assert "catastrophic" in made["agreement"]["notes"][0]


def test_unknown_studies_and_lines_without_data_are_refused(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    assert "Did you mean 'density'" in shell("study", "densty", "demo", code=2).err
    small = Shell(tmp_path / "home")
    shutil.copytree(shell.home, small.home)
    small("init", world.line(tmp_path / "empty.yaml", line="empty"))
    assert "too few members" in small("study", "tasks", "empty", code=3).err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
        bare = ("--task", world.task("number"), "--model", world.model("number"))
        small("register", "demo", *bare, "--replace-task")
        assert "no train rows" in small("study", "shots", "demo", code=3).err
        smaller(patch)
        found = small.json("study", "continual", "demo")
        assert f"{FINETUNING} is left out: number lacks train rows" in found["notes"]
        assert of_method(found, FINETUNING) == []
        small("retire", "demo", "number", "--reason", "a test")
    assert "one subset" in small("study", "subsets", "demo", code=3).err
