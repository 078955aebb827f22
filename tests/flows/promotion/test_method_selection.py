"""A tournament: the best method on validation rows merges, and the record has all of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from restitch.flows.promotion.method_selection import earlier_selection, select_method, summarize
from restitch.flows.promotion.snapshot import take_snapshot
from restitch.modeling.data.rows import Example
from restitch.modeling.families.family import get_family
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.method import TournamentSpec
from tests.cli.test_end_to_end import plain
from tests.conftest import NewHome
from tests.flows.test_localizing import SPLITS, add_with_splits, rows_of, with_splits
from tests.shell import Shell
from tests.worlds import LABELS, TEMPLATES, World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")

TASKS = ("colour", "number")
CONTESTANTS = [
    "averaging",
    {"name": "task-arithmetic", "settings": {"alpha": 0.1}},
    {"name": "task-arithmetic", "settings": {"alpha": 0.9}},
    "ties",
]
LABELLED = ("averaging", "task-arithmetic (alpha 0.1)", "task-arithmetic (alpha 0.9)", "ties")


def line_file(world: World, folder: Path, method: Any, **changes: Any) -> Path:
    changes = {"localize": None, "retention": None, **changes}
    return world.line(folder / "line.yaml", method=method, **changes)


def competing(shell: Shell, world: World, folder: Path, *tasks: str, **objective: Any) -> Shell:
    """A line whose methods compete, with members in this order."""
    method = {"tournament": CONTESTANTS, "objective": objective or "mean"}
    shell("init", line_file(world, folder, method))
    add_with_splits(shell, world, folder, *tasks)
    return shell


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, Path]:
    """A line that holds two members after a tournament, and the folder of its tasks' files."""
    folder = tmp_path_factory.mktemp("tournament")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
        return competing(Shell(folder / "home"), world, folder, *TASKS), folder


@pytest.fixture
def shell(made: tuple[Shell, Path], tmp_path: Path) -> Shell:
    """A copy of that line, in a home of its own."""
    shutil.copytree(made[0].home, tmp_path / "home")
    return Shell(tmp_path / "home")


def tournament(shell: Shell, version: int | None = None) -> dict[str, Any]:
    ledger = shell.ledger()
    found: Any = ledger.merged(version or ledger.state().champion or 0).facts["tournament"]
    return dict(found)


def reached(world: World, model: Path, task: str) -> float:
    """The accuracy of a folder's weights on validation rows, found without the exam's code."""
    family = get_family(world.family)
    rows = rows_of(world, task)[SPLITS["validation"]]
    spec = HeadSpec(labels=LABELS[task], templates=TEMPLATES)
    line_state = family.build_head(family.load(world.base), world.base, spec)
    batch = family.preprocessor(world.base)([Example((row["text"],), None, "") for row in rows])
    with torch.inference_mode():
        found: list[int] = family.logits(family.load(model), batch, line_state).argmax(1).tolist()
    right: list[bool] = [
        LABELS[task][one] == row["label"] for one, row in zip(found, rows, strict=True)
    ]
    return sum(right) / len(right)


def test_the_best_method_on_validation_rows_merges_and_the_record_has_all(
    world: World, shell: Shell, made: tuple[Shell, Path], tmp_path: Path
) -> None:
    found = tournament(shell)
    # Each contestant alone, as a line of its own, measured by hand.
    alone: dict[str, float] = {}
    for place, (label, method) in enumerate(zip(LABELLED, CONTESTANTS, strict=True)):
        name = f"alone{place}"
        shell("init", line_file(world, tmp_path / name, method, line=name))
        for task in TASKS:
            file = made[1] / task / "task.yaml"
            shell("register", name, "--task", file, "--model", world.model(task))
        shell("export", name, "champion", tmp_path / name / "out")
        values = [reached(world, tmp_path / name / "out", task) for task in TASKS]
        alone[label] = sum(values) / len(values)
    scores = {one["label"]: one["score"] for one in found["contestants"]}
    assert scores == pytest.approx(alone)
    assert [one["score"] for one in found["contestants"]] == sorted(alone.values(), reverse=True)
    best = next(label for label in LABELLED if alone[label] == max(alone.values()))
    assert found["winner"] == best == found["contestants"][0]["label"]
    assert found["rounds"] == [
        {"share": 1.0, "contestants": 4, "rows": {"colour": 20, "number": 20}}
    ]
    assert (found["reported"], found["cost"]) == ([], 4.0)
    # The version is what its winner alone would have made; its recipe says so.
    record = shell.ledger().merged(shell.state().champion or 0)
    assert shell.patch_bytes() == shell.patch_bytes(line=f"alone{LABELLED.index(best)}")
    recipe: Any = record.recipe
    assert recipe["method"]["settings"] == found["contestants"][0]["settings"]
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2]
    reason = [act.reason for act in shell.acts() if act.kind == "merged"][-1]
    assert f"{best} ({max(alone.values()):.4f}) won over" in reason
    shown = plain(shell("show", "demo", "champion").out)
    for label in (*LABELLED, reason):
        assert label in (shown if label != reason else plain(shell("history", "demo").out))
    assert "the best of averaging" in plain(shell("status", "demo").out)


def test_the_better_half_is_evaluated_on_more_rows(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {one["label"]: one for one in tournament(shell)["contestants"]}
    monkeypatch.setattr("restitch.tasks.method_selection.LEAST_ROWS", 5)
    with shell.inside():
        snapshot = take_snapshot(shell.ledger())
        found = select_method(snapshot.line, snapshot.members, None, (), None).outcome
    assert found is not None
    assert found["rounds"] == [
        {"share": 0.5, "contestants": 4, "rows": {"colour": 10, "number": 10}},
        {"share": 1.0, "contestants": 2, "rows": {"colour": 20, "number": 20}},
    ]
    assert found["cost"] == 4.0
    assert [one["round"] for one in found["contestants"]] == [2, 2, 1, 1]
    # Who was asked all rows reached on them what was found of it when all were.
    last, others = found["contestants"][:2], found["contestants"][2:]
    sentence = summarize(found).partition("; eliminated earlier, on fewer rows: ")
    assert [one["label"] in sentence[0] for one in found["contestants"]] == [True] * 2 + [False] * 2
    assert all(f"{one['label']} ({one['score']:.4f})" in sentence[2] for one in others)
    assert [one["tasks"] for one in last] == [whole[one["label"]]["tasks"] for one in last]
    for some in (last, others):
        scores = [one["score"] for one in some]
        assert scores == sorted(scores, reverse=True)


def test_an_unchanged_line_runs_no_tournament(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restitch.tasks.method_selection._SuccessiveHalving.run", held_again)
    before = shell.head_bytes()
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.json("remerge", "demo", "--force")["action"] == "unchanged"
    # Nor where the outcome is not kept any more: the version's record has it.
    shutil.rmtree(shell.home / "store" / "keys" / "method-selection")
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.head_bytes() == before
    # Another rule, the same winner: one contest, and the version stays.
    monkeypatch.undo()
    monkeypatch.setattr(MlflowProjection, "repair", lambda *_, **__: 0)
    again = {"tournament": CONTESTANTS, "objective": {"accuracy": 2.0}}
    shell("init", line_file(world, tmp_path, again))
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.state().newest == 2


def held_again(*_: object) -> None:
    raise AssertionError("a contest was held again")


def test_other_commands_take_the_method_in_use(
    made: tuple[Shell, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, _ = made
    with shell.inside():
        spec = take_snapshot(shell.ledger()).line_in_use.spec
    best = tournament(shell)["contestants"][0]
    assert (spec.method.name, spec.method.settings) == (best["name"], best["settings"])
    monkeypatch.setattr("restitch.flows.research.compare.publish_study", lambda *_, **__: None)
    (row,) = shell.json("compare", "demo", "--methods", best["name"])["methods"]
    assert row["settings"] == best["settings"]
    assert row["patch"] == shell.ledger().merged(shell.state().champion or 0).patch


def test_with_a_limit_of_two_the_champion_s_method_meets_the_one_that_waited_longest(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("turns")
    shell("init", line_file(world, tmp_path, {"tournament": CONTESTANTS, "at_most": 2}))
    waiting, won = list(LABELLED), None
    for version, task in enumerate((*TASKS, "animal"), 1):
        add_with_splits(shell, world, tmp_path, task)
        found = tournament(shell, version)
        ranked = [one["label"] for one in found["contestants"]]
        # The one in use and whose turn it is; the loser goes to the end, the winner behind it.
        challengers = [label for label in waiting if label != won]
        expected = {won or challengers.pop(0), challengers.pop(0)}
        assert set(ranked) == expected
        waiting, won = [*challengers, ranked[1], ranked[0]], ranked[0]
        assert [one["label"] for one in found["waiting"]] == waiting[:2]
        assert found["cost"] <= 2.0
        assert set(challengers) == set(waiting[:2])
    assert {*LABELLED} == {*waiting}, "all had their turn"
    before = shell.head_bytes()
    assert shell.json("remerge", "demo")["action"] == "unchanged"
    assert shell.head_bytes() == before
    assert shell.json("verify", "demo")["rebuilt"] == [1, 2, 3]
    assert "2 did not take part" in plain(shell("show", "demo", "champion").out)
    assert "at most 2 at each merge" in plain(shell("status", "demo").out)


def test_a_method_that_gives_experts_is_no_contestant(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    method = {"tournament": ["tall", "averaging"]}
    done = new_home("bare")("init", line_file(world, tmp_path, method), code=3)
    assert "the method tall gives no merged model" in done.err


def test_the_order_of_registration_does_not_matter(
    world: World, made: tuple[Shell, Path], new_home: NewHome, tmp_path: Path
) -> None:
    other = competing(new_home("other"), world, tmp_path, *reversed(TASKS))
    assert tournament(made[0]) == tournament(other)
    assert made[0].patch_bytes() == other.patch_bytes()


def test_a_tournament_is_not_repeated_after_a_kill(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("restitch.flows.promotion.candidates.stitch", killed)
        shell("register", "demo", *_files(world, tmp_path, "animal"), code=130)
    assert shell.state().champion == 2
    monkeypatch.setattr("restitch.tasks.method_selection._SuccessiveHalving.run", held_again)
    assert shell.json("remerge", "demo")["action"] == "promoted"
    assert shell.state().champion == 3


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_retention_is_scored_on_rows_that_are_not_reported(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    benchmark = str(sampled(world, tmp_path, "general", 40))
    method = {"tournament": CONTESTANTS, "objective": {"accuracy": 0, "retention": 1}}
    shell = new_home("retention")
    shell("init", line_file(world, tmp_path, method, retention=benchmark))
    shell("register", "demo", *_files(world, tmp_path, "colour"))
    found = tournament(shell)
    assert found["benchmark"] == "general"
    assert found["rounds"][-1]["rows"] == {"colour": 20, "general (retention)": 20}
    kept = {one["label"]: one["retention"] for one in found["contestants"]}
    assert max(kept.values()) == kept[found["winner"]] == found["contestants"][0]["score"]
    # A method that retains too little ranks below all that retain enough, for any score.
    limit = max(kept.values())
    gated = {"tournament": CONTESTANTS}
    gates = {"min_retention": limit, "warn": ["min_retention"]}
    file = line_file(world, tmp_path, gated, retention=benchmark, gates=gates)
    shell("init", file)
    chosen = shell.state().spec.method
    assert isinstance(chosen, TournamentSpec)
    assert chosen.objective.min_retention == limit
    shell("remerge", "demo")
    with shell.inside():
        snapshot = take_snapshot(shell.ledger())
        held = earlier_selection(snapshot.line, snapshot.members, snapshot.benchmark, ())
    assert held is not None
    assert held.outcome is not None
    assert held.outcome["winner"] == max(kept, key=lambda label: kept[label])
    assert summarize(held.outcome).count("retains too little") == sum(
        v < limit for v in kept.values()
    )
    assert {one["label"]: one["meets"] for one in held.outcome["contestants"]} == {
        label: value >= limit for label, value in kept.items()
    }


def sampled(world: World, folder: Path, task: str, rows: int) -> Path:
    """The file of a task whose results are reported on a sample of its test rows."""
    values = yaml.safe_load(Path(world.task(task)).read_text())
    values["data"]["sample"] = rows
    return write_yaml(folder / f"{task}.yaml", values)


def _files(world: World, folder: Path, task: str) -> tuple[object, ...]:
    return ("--task", with_splits(world, folder / task, task), "--model", world.model(task))


def test_mistakes_in_a_tournament_are_explained(
    world: World, new_home: NewHome, tmp_path: Path
) -> None:
    shell = new_home("bare")

    def refused(tournament: Any, objective: Any = "mean", **changes: Any) -> str:
        method = {"tournament": tournament, "objective": objective}
        return shell("init", line_file(world, tmp_path, method, **changes), code=3).err

    mixed = refused(["ties", "weighted-stitch"])
    assert "whole task vectors: ties; sparse deltas: weighted-stitch" in mixed
    assert "did you mean 'ties'" in refused(["averaging", "tie"])
    assert "twice" in refused(["ties", {"name": "ties", "settings": {"alpha": 1.0}}])
    assert "tournament" in refused(["ties"])
    assert "a weight above 0" in refused(["ties", "averaging"], {"accuracy": 0})
    no_rows = refused(["ties", "averaging"], {"retention": 1}, retention=str(world.task("general")))
    assert "none for general" in no_rows
    assert "min_retention: 0" in no_rows
    assert "no benchmark" in refused(["ties", "averaging"], {"min_retention": 0.9})
    whole = sampled(world, tmp_path, "general", 1000)
    no_rest = refused(["ties", "averaging"], {"retention": 1}, retention=str(whole))
    assert "task general has no rows to choose by" in no_rest
    shell("init", line_file(world, tmp_path, {"tournament": ["ties", "averaging"]}))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    done = shell("register", "demo", *files, code=3)
    assert "none for colour" in done.err
    assert "--replace-task" in done.err
    files = ("--task", sampled(world, tmp_path, "number", 1000), "--model", world.model("number"))
    done = shell("register", "demo", *files, code=3)
    assert "task number has no rows to choose by" in done.err
    assert "number" not in shell.state().tasks
