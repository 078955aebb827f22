"""The papers' figures for a line: nested masks, two members merged, and plots."""

import json
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import Unavailable
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.tasks.evaluate import Exam
from restitch.tasks.localizers import Localizer, Ranking
from tests.cli.test_end_to_end import plain
from tests.conftest import NewHome
from tests.flows.research.runs import study_runs
from tests.flows.test_localizing import with_splits
from tests.shell import Shell
from tests.worlds import World

TASKS = ("colour", "number")
ALL = "dataless,fisher,distilled,trained,random"


@pytest.fixture(scope="module")
def shell(world: World, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Shell:
    """Two members with train, validation and test rows, and one with test rows alone."""
    root = tmp_path_factory.mktemp("analyze")
    (root / "home").mkdir()
    (root / "home" / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    shell = Shell(root / "home")
    shell("init", world.line(root / "line.yaml", retention=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MlflowProjection, "repair", lambda *_, **__: 0
        )  # most of the time of a registration
        for task in TASKS:
            file = with_splits(world, root / task, task)
            shell("register", "demo", "--task", file, "--model", world.model(task))
        shell.add(world, "animal")
    return shell


@pytest.fixture(scope="module")
def everything(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two tasks by every localizer; the folder holds the printed result and the plots."""
    out = tmp_path_factory.mktemp("out")
    before = shell.head_bytes()
    given = ("--task", "number,colour", "--localizers", ALL, "--densities", "0.3,1,0.05")
    found: dict[str, Any] = shell.json("analyze", "demo", *given, "--out", out)
    assert shell.head_bytes() == before, "the line stays as it is"
    assert json.loads((out / "analysis.json").read_bytes()) == found
    plots = {file.stem for file in out.glob("*.png")}
    assert plots == {
        *(f"grafted-{task}" for task in TASKS),
        *("conflict", "jaccard", "cosine", "layers", "components", "owners"),
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in out.glob("*.png"))
    return found


def test_at_density_1_every_localizer_gives_the_finetuned_model(
    shell: Shell, everything: dict[str, Any]
) -> None:
    for task in TASKS:
        found = everything["tasks"][task]
        assert set(found["curves"]) == set(ALL.split(","))
        assert found["left_out"] == {}
        for curve in found["curves"].values():
            last = curve["points"][-1]
            assert last["density"] == 1.0
            # Finetuning changed only localizable tensors in this world, and skills score 1.
            for key in ("value", "interval", "count"):
                assert last[key] == found["finetuned"][key]
            assert last["interval"]["low"] < last["value"] == 1.0


def test_masks_are_cut_at_every_density_and_name_their_calibration_rows(
    everything: dict[str, Any],
) -> None:
    curves = everything["tasks"]["colour"]["curves"]
    coordinates = curves["random"]["points"][-1]["kept"]
    for curve in curves.values():
        densities = [point["density"] for point in curve["points"]]
        assert densities == everything["densities"] == [0.05, 0.3, 1.0]
        for point in curve["points"]:
            assert point["kept"] == pytest.approx(point["density"] * coordinates, abs=0.51)
            assert point["count"] == 20
    used = {name: curve["points"][0]["calibrated_with"] for name, curve in curves.items()}
    inputs = dict.fromkeys(("fisher", "distilled"), "inputs")
    nothing = dict.fromkeys(("dataless", "random"), "nothing")
    assert used == {"trained": "labels", **inputs, **nothing}


def test_the_lines_own_density_gives_the_mask_in_use(everything: dict[str, Any]) -> None:
    found = everything["tasks"]["number"]
    at = next(p for p in found["curves"]["dataless"]["points"] if p["density"] == 0.3)
    assert found["own"]["kept"] == at["kept"]
    assert found["own"]["value"] == at["value"]
    assert found["own"]["localizer"] == found["curves"]["dataless"]["label"]


def test_growing_masks_of_a_pair_overlap_more_until_they_give_the_average(
    everything: dict[str, Any],
) -> None:
    pair = everything["pair"]
    assert pair["tasks"] == list(TASKS)
    shares = [point["share"] for point in pair["points"]]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    last = pair["points"][-1]
    assert last["shared"] == last["kept"]
    # The mean over all owners of everything is plain averaging.
    assert last["tasks"] == pair["averaging"]["tasks"]
    middle = pair["points"][1]
    tasks = everything["masks"]["tasks"]
    places = [tasks.index(task) for task in TASKS]
    assert middle["shared"] == everything["masks"]["shared"][places[0]][places[1]]
    for point in pair["points"]:
        values = [point["tasks"][task]["value"] for task in TASKS]
        assert point["mean"] == pytest.approx(sum(values) / 2)


def test_a_second_run_computes_only_what_is_new(
    shell: Shell, everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from restitch.tasks.research import density_curves

    asked: list[str] = []
    take, rank = Exam.take, density_curves._rank

    def counted(self: Exam, *rest: Any) -> Any:
        asked.append(f"evaluate {self.spec.task}")
        return take(self, *rest)

    def ranked(found_by: Localizer, member: Member, *rest: Any) -> Ranking:
        asked.append(f"rank {member.task}")
        return rank(found_by, member, *rest)

    monkeypatch.setattr(Exam, "take", counted)
    monkeypatch.setattr(density_curves, "_rank", ranked)
    given = ("--task", "colour,number", "--localizers", ALL)
    again = shell.json("analyze", "demo", *given, "--densities", "0.05,0.3,1")
    assert asked == []
    for part in ("tasks", "pair", "masks"):
        assert again[part] == everything[part]
    one = ("--task", "colour", "--localizers", "random", "--densities", "0.05,0.5")
    more = shell.json("analyze", "demo", *one)
    assert asked == ["rank colour", "evaluate colour"]
    assert more["pair"] is None, "one task is no pair"
    first, _ = more["tasks"]["colour"]["curves"]["random"]["points"]
    assert first == again["tasks"]["colour"]["curves"]["random"]["points"][0]


def test_the_tables_have_every_task_and_by_default_only_cheap_localizers(
    shell: Shell,
) -> None:
    done = shell("analyze", "demo", "--densities", "0.3", "--pair", "animal,colour")
    table = plain(done.out)
    for words in ("colour, grafted accuracy", "animal and colour", "averaging", "Jaccard", "owner"):
        assert words in table
    assert "random" in table
    assert "fisher" not in table


@pytest.mark.usefixtures("without_mlflow")
def test_a_line_of_whole_task_vectors_stitches_its_pair(
    shell: Shell, everything: dict[str, Any], world: World, tmp_path: Path
) -> None:
    whole = {"method": "averaging", "localize": None, "retention": None}
    shell("init", world.line(tmp_path / "whole.yaml", line="whole", **whole))
    for task in TASKS:
        again = with_splits(world, tmp_path / task, task)
        shell("register", "whole", "--task", again, "--model", world.model(task))
    found = shell.json("analyze", "whole", "--densities", "0.3,1")
    assert found["pair"]["method"] == "localize-and-stitch"
    assert found["pair"]["averaging"] == everything["pair"]["averaging"]
    assert [p["mean"] for p in found["pair"]["points"]] == [
        p["mean"] for p in everything["pair"]["points"][1:]
    ]
    assert found["masks"]["owners"][0] == 0, "every coordinate has both owners"


def test_a_localizer_is_left_out_if_the_task_lacks_its_rows(shell: Shell) -> None:
    given = ("--localizers", "fisher,trained,random", "--densities", "0.3", "--task", "animal")
    found = shell.json("analyze", "demo", *given)["tasks"]["animal"]
    assert set(found["curves"]) == {"random"}
    assert found["left_out"] == {"fisher": "train rows", "trained": "train rows"}


def test_an_analysis_is_a_run_in_mlflow(shell: Shell, everything: dict[str, Any]) -> None:
    run, _ = study_runs(shell)[f"masks of demo {everything['version']} analyzed"]
    for task in TASKS:
        for name, curve in everything["tasks"][task]["curves"].items():
            for point in curve["points"]:
                shown = run.data.metrics[f"{task}/{name}/{point['density']:g}"]
                assert shown == pytest.approx(point["value"])


def test_without_mlflow_an_analysis_warns(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("MLflow is away")

    monkeypatch.setattr(MlflowProjection, "show_study", away)
    given = ("--task", "colour", "--localizers", "random", "--densities", "0.05")
    done = shell("analyze", "demo", *given, "--json")
    assert "the study is not in MLflow" in done.err
    assert done.json["tasks"]["colour"]["curves"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--localizers", "datales"), "did you mean 'dataless'"),
        (("--task", "color"), "did you mean 'colour'"),
        (("--pair", "colour,nine"), "unknown task"),
        (("--pair", "colour"), "a pair is two tasks"),
        (("--densities", "0.1,2"), "cannot be used"),
        (("--densities", "few"), "is not a number"),
    ],
)
def test_wrong_options_are_refused(shell: Shell, given: tuple[str, ...], message: str) -> None:
    assert message in shell("analyze", "demo", *given, code=3).err


def test_a_line_without_members_has_nothing_to_analyze(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "empty.yaml", line="empty"))
    assert "no members to analyze" in shell("analyze", "empty", code=3).err


def test_pairs_have_signals_their_loss_and_correlations(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shell.head_bytes()
    page = tmp_path / "report.html"
    shell("report", "demo", "champion", page)
    assert 'id="pairs"' not in page.read_text(), "nobody has measured pairs"
    found = shell.json("analyze", "demo", "--pairs", "--out", tmp_path / "out")
    assert shell.head_bytes() == before, "the line stays as it is"
    assert [pair["tasks"] for pair in found["pairs"]] == [
        ["animal", "colour"],
        ["animal", "number"],
        ["colour", "number"],
    ]
    for pair in found["pairs"]:
        assert 0 < pair["shared"] < 1
        assert 0 < pair["sign_conflict"] < 1
        assert -1 <= pair["cosine"] <= 1
        assert 0 <= pair["subspace_overlap"] <= 1
        sides = pair["by_task"].values()
        assert pair["loss"] == pytest.approx(sum(side["loss"] for side in sides) / 2)
        for side in sides:  # the finetuned models have all rows right
            assert side["loss"] == pytest.approx(side["alone"] - side["merged"])
    # Only these two have train rows with labels.
    aligned = [p["tasks"] for p in found["pairs"] if p["gradient_alignment"] is not None]
    assert aligned == [["colour", "number"]]
    assert found["correlations"]["cosine"]["pairs"] == 3
    assert found["correlations"]["gradient_alignment"] == {"rho": None, "p_value": None, "pairs": 1}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("pairs.json", "pairs.csv", "pairs.png"),
    }
    shell("report", "demo", "champion", page)
    assert "Pairs of members, with their signals and their loss" in page.read_text()
    assert 'id="pairs-title"' in page.read_text()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("all of it is stored")

    monkeypatch.setattr(Exam, "take", never)
    monkeypatch.setattr("restitch.tasks.research.pairs.pair_signals", never)
    text = shell("analyze", "demo", "--pairs", "--task", "animal,colour,number").out
    assert "colour + number" in text
    assert "cosine: rank correlation with the loss" in text
    assert "gradient alignment: no rank correlation from 1 pair" in text


def test_the_loss_of_a_pair_is_that_of_a_line_with_two_members(
    shell: Shell, world: World, new_home: NewHome, tmp_path: Path
) -> None:
    other = new_home("two")
    other("init", world.line(tmp_path / "line.yaml", retention=None))
    for task in TASKS:
        file = with_splits(world, tmp_path / task, task)
        other("register", "demo", "--task", file, "--model", world.model(task), "--no-remerge")
    results = other.json("remerge", "demo")["record"]["results"]
    found = shell.json("analyze", "demo", "--pairs", "--task", "colour,number")
    (pair,) = found["pairs"]
    for task in TASKS:
        assert pair["by_task"][task]["merged"] == results[task]["merged"]
        assert pair["by_task"][task]["alone"] == results[task]["grafted"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--pair", "colour,number"), "--pairs cannot be used with --pair"),
        (("--task", "colour"), "fewer than two members to pair"),
        (("--task", "colour,colours"), "did you mean 'colour'"),
    ],
)
def test_pairs_that_cannot_be_measured_are_refused(
    shell: Shell, given: tuple[str, ...], told: str
) -> None:
    assert told in shell("analyze", "demo", "--pairs", *given, code=3).err
