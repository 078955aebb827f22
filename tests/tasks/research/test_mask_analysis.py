"""The step that analyzes the masks of a merged version."""

import shutil
from pathlib import Path

import pytest

from restitch.merging.analysis.masks import MaskAnalysis
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.report import ReportInput, render
from restitch.tasks.research import mask_analysis as module
from restitch.tasks.research.mask_analysis import analyze, places_of
from restitch.tasks.runtime.engine import Cached
from restitch.tasks.runtime.refs import LineRef
from tests.conftest import Three
from tests.shell import Shell
from tests.worlds import SKILLS


def line_and_record(shell: Shell) -> tuple[LineRef, MergedRecord]:
    line_state = shell.state()
    assert line_state.champion is not None
    return LineRef(line_state.spec, line_state.base), shell.ledger().merged(line_state.champion)


@pytest.fixture
def home(three: Three, tmp_path: Path) -> Shell:
    """A home with three members in its champion and no analysis."""
    home = Path(shutil.copytree(three.shell.home, tmp_path / "home"))
    shutil.rmtree(home / "store" / "keys" / "analysis", ignore_errors=True)
    return Shell(home)


def test_an_analysis_has_the_overlaps_and_locations_of_masks(home: Shell) -> None:
    line, record = line_and_record(home)
    with home.inside():
        found = analyze(line, record)
    assert found["tasks"] == sorted(SKILLS)
    analysis = MaskAnalysis.from_json(found)
    assert sum(analysis.owners) == record.kept, "random weights all differ from the base"
    for i, task in enumerate(found["tasks"]):
        kept = record.members[task]
        assert found["shared"][i][i] == sum(found["kept"][task].values()), kept
        assert found["jaccard"][i][i] == 1
        assert found["cosine"][i][i] == pytest.approx(1)
    assert found["places"] == places_of(analysis)
    assert found["places"]["layers"] == ["0", "1"]
    assert found["places"]["components"] == ["layer norm", "attention", "mlp", "bias"]
    for group in ("by_layer", "by_component"):
        shares = found["places"][group]
        for share in (*shares["tasks"].values(), shares["all"]):
            assert sum(share.values()) == pytest.approx(1)


def test_a_stored_analysis_is_returned_without_reading_models(
    home: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, record = line_and_record(home)
    with home.inside():
        first = analyze.body(line, record)

        def absent(*_: object) -> None:
            raise AssertionError("the models are read again")

        monkeypatch.setattr(module, "open_base", absent)
        again = analyze.body(line, record)
    assert isinstance(again, Cached)
    assert again.value == first


def test_other_members_give_another_analysis(home: Shell) -> None:
    line, record = line_and_record(home)
    fewer = record.model_copy(update={"members": {"colour": record.members["colour"]}})
    with home.inside():
        analyze(line, record)
        found = analyze(line, fewer)
    assert found["tasks"] == ["colour"]
    assert len(found["owners"]) == 1


def test_a_version_without_members_has_an_empty_analysis(home: Shell) -> None:
    line, record = line_and_record(home)
    with home.inside():
        found = analyze(line, record.model_copy(update={"members": {}}))
    assert found["tasks"] == found["owners"] == []
    assert found["places"]["by_layer"] == {"tasks": {}, "all": {}}


def test_the_report_renders_the_json_of_the_commands(home: Shell) -> None:
    line, record = line_and_record(home)
    shown = home.json("show", "demo", record.version)
    acts = home.json("history", "demo")["acts"]
    with home.inside():
        analysis = analyze(line, record)
    found = ReportInput(
        version=shown,
        versions=home.json("history", "demo", "--versions")["versions"],
        changes=home.json("diff", "demo", record.version - 1, record.version),
        acts=[act for act in acts if record.version in act["versions"]],
        analysis=analysis,
    )
    report = render(found)
    for field in ("results.colour.merged", "retention.ratio", "changes.weights.differ"):
        assert f'data-field="{field}"' in report.html
    assert len(report.plots) == 8


def test_layers_of_two_towers_have_different_names() -> None:
    names = [
        "vision_model.encoder.layers.10.mlp.fc1.weight",
        "vision_model.encoder.layers.2.mlp.fc1.weight",
        "text_model.encoder.layers.2.self_attn.q_proj.weight",
        "visual_projection.weight",
    ]
    analysis = MaskAnalysis(
        tasks=("a", "b"),
        kept={"a": {names[0]: 3, names[3]: 1}, "b": {}},
        coordinates=dict.fromkeys(names, 5),
        shared=((4, 0), (0, 0)),
        jaccard=((1.0, 0.0), (0.0, None)),
        cosine=((1.0, None), (None, None)),
        owners=(4, 0),
    )
    places = places_of(analysis)
    assert places["layers"] == ["text 2", "vision 2", "vision 10", "outside"]
    assert places["by_layer"]["tasks"] == {"a": {"outside": 0.25, "vision 10": 0.75}, "b": {}}
    assert places["by_component"]["all"] == {"attention": 0.25, "mlp": 0.5, "other": 0.25}
