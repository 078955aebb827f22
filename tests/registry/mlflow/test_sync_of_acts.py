"""MLflow as the place to look: history, roles, tags, data sets, further artifacts."""

import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow.data import get_source

from restitch.registry.ledger.ledger import Ledger
from restitch.registry.mlflow.projection import StudyPart
from restitch.registry.mlflow.sync import MlflowProjection
from tests.registry.builders import digest, home_with_mlflow, merge, record
from tests.registry.mlflow_view import (
    DyingClient,
    KilledError,
    chart,
    descriptions,
    points,
    run_of,
    shown,
)

RETENTION = {"task": "general", "value": 0.45, "base": 0.5, "ratio": 0.9}
FAILED = {
    "gate": "min_retention",
    "limit": 0.9,
    "value": 0.2,
    "passed": False,
    "note": "retention 0.2 < 0.9",
}


REJECTED = "rejected versions of line"


def reject(line: Ledger, version: int) -> None:
    line.act("rejected", "t", f"version {version}: too little", lambda line_state: line_state)


def test_one_run_has_the_metrics_of_all_champions(mlflow, line):
    mlflow.repair(line)
    merge(line, tasks=("a", "b"), retention={**RETENTION, "ratio": 0.8})
    line.act("rolled-back", "ann", "worse", lambda line_state: line_state.promoted(2))
    mlflow.repair(line)
    assert points(mlflow, "retention/ratio") == [(1, 0.9), (2, 0.9), (3, 0.8)]
    assert points(mlflow, "members") == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert points(mlflow, "task/b/accuracy") == [(3, 0.6)]
    assert points(mlflow, "champion") == [(7, 1.0), (9, 2.0), (11, 3.0), (12, 2.0)]
    for version in (1, 2, 3):
        metrics = run_of(mlflow, version).data.metrics
        assert {name: dict(points(mlflow, name))[version] for name in metrics} == metrics
    run = chart(mlflow, "champions of line")
    assert run.info.status == "FINISHED"
    (point,) = (
        p
        for p in mlflow.client.get_metric_history(run.info.run_id, "retention/ratio")
        if p.step == 3
    )
    made = datetime.fromisoformat(line.merged(3).created_at)
    assert point.timestamp == int(made.timestamp() * 1000)
    assert chart(mlflow, REJECTED).data.metrics == {}


def test_rejected_versions_are_in_no_chart_of_champions(mlflow, line):
    candidate(line, gates=[FAILED], retention={**RETENTION, "ratio": 0.2})
    reject(line, 3)
    candidate(line)  # neither in use nor rejected
    mlflow.repair(line)
    assert points(mlflow, "retention/ratio") == [(1, 0.9), (2, 0.9)]
    assert points(mlflow, "retention/ratio", REJECTED) == [(3, 0.2)]
    assert points(mlflow, "champion", REJECTED) == []
    line.act("promoted", "ann", "version 3: I say so", lambda line_state: line_state.promoted(3))
    mlflow.repair(line)
    assert points(mlflow, "retention/ratio") == [(1, 0.9), (2, 0.9), (3, 0.2)]
    before = shown(mlflow)
    mlflow.repair(line, full=True)
    assert shown(mlflow) == before


def test_only_new_versions_are_read_and_added(mlflow, line, monkeypatch):
    for _ in range(5):
        merge(line, tasks=("a",))
    mlflow.repair(line)
    before, read = points(mlflow, "members"), []
    version = merge(line, tasks=("a",))
    merged = line.merged

    def noted(number):
        read.append(number)
        return merged(number)

    monkeypatch.setattr(line, "merged", noted)
    mlflow.repair(line)
    assert set(read) == {version, version - 1}, "the new champion and the one before"
    assert points(mlflow, "members") == [*before, (version, 1.0)]


def test_a_deleted_history_is_completed_after_any_crash(mlflow, line, home):
    mlflow.repair(line)
    before = shown(mlflow)
    experiment = mlflow.client.get_experiment_by_name("line.history").experiment_id
    for deaths in (1, 2, 3, 4, 5):
        for run in mlflow.client.search_runs([experiment]):
            mlflow.client.delete_run(run.info.run_id)
        dying = MlflowProjection(home)
        vars(dying)["client"] = DyingClient(mlflow.client, deaths)
        with pytest.raises(KilledError):
            dying.repair(line)
        assert mlflow.repair(line) == 0, "the rest is whole"
        assert shown(mlflow) == before


def test_a_projection_of_an_older_version_is_written_again(mlflow, line):
    mlflow.repair(line)
    before = shown(mlflow)
    audit = mlflow.client.get_experiment_by_name("line.audit").experiment_id
    mlflow.client.set_experiment_tag(audit, "restitch.complete_to", f"1:{line.state().entry}")
    run = run_of(mlflow, 2)
    mlflow.client.delete_tag(run.info.run_id, "restitch.members")
    assert mlflow.repair(line) == 9
    assert shown(mlflow) == before
    assert mlflow.repair(line) == 0


def roles(mlflow: MlflowProjection) -> dict[int, str]:
    """By version; runs and model versions must agree."""
    versions = mlflow.client.search_model_versions("name = 'line'")
    found = {int(v.tags["restitch.version"]): v.tags["restitch.role"] for v in versions}
    assert found == {n: run_of(mlflow, n).data.tags["restitch.role"] for n in found}
    return dict(sorted(found.items()))


def candidate(line: Ledger, **changes: Any) -> None:
    made = record(line.state().next_version, tasks=("a",), **changes)
    blob = line.objects.put_blob(made.to_bytes())
    line.act("merged", "t", "", lambda line_state: line_state.with_merged(blob, passed=made.passed))


def test_roles_follow_the_outcome_of_each_version(mlflow, line, tmp_path, empty_mlflow):
    mlflow.repair(line)
    assert roles(mlflow) == {1: "former champion", 2: "champion"}
    candidate(line, gates=[FAILED])
    line.act("rejected", "t", "version 3: too little", lambda line_state: line_state)
    mlflow.repair(line)
    assert roles(mlflow) == {1: "former champion", 2: "champion", 3: "rejected"}
    assert shown(mlflow)["aliases"].keys() == {"champion"}
    candidate(line)
    mlflow.repair(line)
    assert roles(mlflow)[4] == "candidate"
    candidate(line)
    mlflow.repair(line)
    line.act("promoted", "ann", "version 5: I say so", lambda line_state: line_state.promoted(5))
    line.act("rolled-back", "ann", "it was slow", lambda line_state: line_state.promoted(1))
    mlflow.repair(line)
    expected = {
        1: "champion",
        2: "former champion",
        3: "rejected",
        4: "superseded",
        5: "former champion",
    }
    assert roles(mlflow) == expected
    champion = mlflow.client.get_model_version_by_alias("line", "champion")
    assert champion.tags["restitch.role"] == "champion"
    assert re.search(
        r"In use since [-\d]+ [:\d]+ UTC, rolled back to by ann: it was slow\.$",
        champion.description,
    )
    notes = {n: run_of(mlflow, n).data.tags["mlflow.note.content"] for n in expected}
    assert notes[1] == champion.description
    assert re.search(r"In use until .* UTC, when version 5 replaced it\.$", notes[2])
    assert notes[3].endswith("It failed its gates: retention 0.2 < 0.9.")
    assert notes[4].endswith("It was never promoted.")
    assert re.search(r"rolled back to version 1 by ann: it was slow\.$", notes[5])
    # A look at all acts at once says the same as one after the other.
    again = MlflowProjection(home_with_mlflow(tmp_path / "again", empty_mlflow))
    again.repair(line)
    assert shown(again) == shown(mlflow)
    mlflow.repair(line, full=True)
    assert shown(again) == shown(mlflow)


def test_a_champion_without_a_successor_becomes_a_former_champion(mlflow, line):
    line.act(
        "retired",
        "ann",
        "a: too old",
        lambda line_state: line_state.model_copy(update={"champion": None}),
    )
    mlflow.repair(line)
    assert roles(mlflow) == {1: "former champion", 2: "former champion"}
    notes = run_of(mlflow, 2).data.tags["mlflow.note.content"]
    assert notes.endswith("when no member was left to merge: retired by ann: a: too old.")
    assert points(mlflow, "champion")[-1] == (10, 0.0)
    assert mlflow.client.get_registered_model("line").aliases == {}


def test_versions_are_found_by_their_tags(mlflow, line):
    merge(line, tasks=("a", "b"), made_by={"actor": "ann", "flow_run": "f-1"})
    candidate(line, gates=[FAILED])
    mlflow.repair(line)

    def versions(query: str) -> list[int]:
        found = mlflow.client.search_model_versions(f"name = 'line' and {query}")
        experiment = mlflow.client.get_experiment_by_name("line").experiment_id
        runs = mlflow.client.search_runs([experiment], query)
        numbers = sorted(int(v.tags["restitch.version"]) for v in found)
        assert numbers == sorted(int(r.data.tags["restitch.version"]) for r in runs)
        return numbers

    assert versions("tags.`restitch.members` = 'a,b'") == [3]
    assert versions("tags.`restitch.task.a` = '1'") == [1, 2, 3, 4]
    assert versions("tags.`restitch.task.b` = '1'") == [3]
    assert versions("tags.`restitch.gates` = 'failed'") == [4]
    assert versions("tags.`restitch.gates` = 'none'") == [1, 2, 3]
    assert versions("tags.`restitch.prefect_run` = 'f-1'") == [3]
    assert versions(f"tags.`restitch.patch` = '{digest('patch 2')}'") == [2]


def test_runs_show_their_actor_as_creator(mlflow, line):
    merge(line, tasks=("a",), made_by={"actor": "ann", "host": "gpu-1"})
    mlflow.repair(line)
    client = mlflow.client
    assert run_of(mlflow, 3).data.tags["mlflow.user"] == "ann"
    assert "mlflow.user" not in run_of(mlflow, 2).data.tags
    audit = client.get_experiment_by_name("line.audit").experiment_id
    assert len(client.search_runs([audit], "tags.`mlflow.user` = 'ann'")) == 2


def test_acts_are_found_by_the_version_that_they_are_about(mlflow, line):
    candidate(line, gates=[FAILED])
    line.act("rejected", "t", "version 3: too little", lambda line_state: line_state)
    mlflow.repair(line)
    audit = mlflow.client.get_experiment_by_name("line.audit").experiment_id

    def kinds(version: int) -> list[str]:
        query = f"tags.`restitch.versions` LIKE '%,{version},%'"
        runs = mlflow.client.search_runs([audit], query, order_by=["start_time ASC"])
        return [run.data.params["kind"] for run in runs]

    assert kinds(1) == ["merged", "promoted", "promoted"]
    assert kinds(3) == ["merged", "rejected"]


def test_the_data_of_an_evaluation_are_inputs_of_the_run(mlflow, line):
    rows = {"path": "/data/a", "split": "test", "digest": digest("rows")}
    hub = {"path": f"org/photos@{'a' * 40}", "split": "validation", "digest": digest("photos")}
    merge(
        line,
        results={"a": {"merged": 0.5, "data": rows}, "b": {"merged": 0.5}},
        retention={**RETENTION, "data": hub},
    )
    mlflow.repair(line)
    mlflow.repair(line, full=True)
    inputs = run_of(mlflow, 3).inputs.dataset_inputs
    found = {one.dataset.name: one for one in inputs}
    assert len(inputs) == 2
    assert found["a"].dataset.digest == digest("rows")[:36]
    assert [(t.key, t.value) for t in found["a"].tags] == [("mlflow.data.context", "test")]
    assert get_source(found["a"].dataset).to_dict() == {"uri": "/data/a"}
    source = get_source(found["general"].dataset).to_dict()
    assert (source["path"], source["revision"]) == ("org/photos", "a" * 40)
    experiment = mlflow.client.get_experiment_by_name("line").experiment_id
    (by_data,) = mlflow.client.search_runs([experiment], "dataset.name = 'general'")
    assert by_data.data.tags["restitch.version"] == "3"


def artifacts(mlflow: MlflowProjection, version: int, folder: Path) -> dict[str, bytes]:
    run = run_of(mlflow, version).info.run_id
    place = Path(mlflow.client.download_artifacts(run, "", str(folder)))
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_extra_artifacts_are_written_for_versions_that_an_act_is_about(mlflow, line, tmp_path):
    asked = []

    def report(version: int) -> dict[str, bytes]:
        asked.append(version)
        return {"report.html": f"{version} of {len(asked)}".encode(), "plots/x.png": b"png"}

    mlflow.repair(line, extras=report)
    assert asked == [1, 2]
    line.act("rolled-back", "ann", "worse", lambda line_state: line_state.promoted(1))
    candidate(line)
    line.act("configured", "ann", "", lambda line_state: line_state.with_pin(True))
    mlflow.repair(line, extras=report)
    assert asked == [1, 2, 1, 2, 3]
    line.act("rejected", "t", "version 3: too little", lambda line_state: line_state)
    mlflow.repair(line, extras=report)
    assert asked == [1, 2, 1, 2, 3, 3]
    assert mlflow.repair(line, extras=report) == 0
    assert asked == [1, 2, 1, 2, 3, 3]
    found = artifacts(mlflow, 1, tmp_path)
    assert found["report.html"] == b"1 of 3"
    assert found["plots/x.png"] == b"png"
    assert "record.json" in found


def test_extra_artifacts_are_written_before_a_projection_counts_as_complete(mlflow, line, tmp_path):
    def killed(_: int) -> dict[str, bytes]:
        raise KilledError

    with pytest.raises(KilledError):
        mlflow.repair(line, extras=killed)
    mlflow.repair(line, extras=lambda version: {"report.html": b"whole"})
    for version in (1, 2):
        (tmp_path / str(version)).mkdir()
        found = artifacts(mlflow, version, tmp_path / str(version))
        assert found["report.html"] == b"whole"


def names_of_acts(mlflow: MlflowProjection) -> list[str]:
    audit = mlflow.client.get_experiment_by_name("line.audit").experiment_id
    runs = mlflow.client.search_runs([audit], order_by=["start_time ASC"])
    return [run.info.run_name for run in runs]


def test_runs_of_acts_are_named_after_what_happened(mlflow, line):
    candidate(line)
    why = "version 3: min_retention of the general benchmark: 0.8690 < 0.9"
    line.act("rejected", "t", why, lambda line_state: line_state)
    mlflow.repair(line)
    assert names_of_acts(mlflow)[-4:] == [
        "0008 merged version 2: because",
        "0009 promoted no gates",
        "0010 merged version 3:",
        "0011 rejected version 3: min_retention 0.8690 < 0.9",
    ]


def test_a_name_that_somebody_or_an_older_projection_gave_is_corrected(mlflow, line):
    mlflow.repair(line)
    names = names_of_acts(mlflow)
    audit = mlflow.client.get_experiment_by_name("line.audit").experiment_id
    for run in mlflow.client.search_runs([audit]):
        mlflow.client.set_tag(run.info.run_id, "mlflow.runName", "0001 merged")
    mlflow.repair(line, full=True)
    assert names_of_acts(mlflow) == names


def test_experiments_and_registered_models_describe_the_line(mlflow, line):
    mlflow.repair(line)
    found = descriptions(mlflow)
    assert found.keys() == {
        *("line", "line.audit", "line.models", "line.history"),
        *("model line", "model line.a", "model line.b"),
    }
    for text in found.values():
        assert "`STORE`" in text, "where the weights are"
        assert "`line.audit`" in text, "where the history is"
        assert "restitch export line champion OUT" in text
    assert found["model line"].startswith("The merged model of line line: one model with")
    assert "`/base`" in found["model line"]
    assert found["model line.a"].startswith("The finetuned models of task a on line line")


def test_descriptions_follow_the_line_and_those_of_a_user_stay(mlflow, line):
    mlflow.repair(line)
    client = mlflow.client
    experiment = client.get_experiment_by_name("line.audit").experiment_id
    client.update_registered_model("line.a", "Ours, do not touch.")
    client.set_experiment_tag(experiment, "mlflow.note.content", "Read me first.")
    client.update_registered_model("line", "The merged model of line line, as it once was.")
    line.act("configured", "ann", "", lambda line_state: line_state.with_pin(True))
    again = MlflowProjection(mlflow.home)
    again.repair(line)
    again.repair(line, full=True)
    found = descriptions(mlflow)
    assert found["model line.a"] == "Ours, do not touch."
    assert found["line.audit"] == "Read me first."
    assert "one model with the skills" in found["model line"]


def test_a_store_s_credentials_are_in_no_description(home, line, empty_mlflow, tmp_path):
    made = home_with_mlflow(tmp_path / "other", empty_mlflow)
    secret = dataclasses.replace(made, store_url="s3://ann:pl4nted@bucket/prefix")
    other = MlflowProjection(secret)
    other.repair(line)
    found = descriptions(other)
    assert "pl4nted" not in str(found)
    assert secret.store_name == "s3://***@bucket/prefix"


def test_a_study_has_a_run_below_it_for_each_part(mlflow, line):
    mlflow.repair(line)
    parts = [
        StudyPart("ties", {"settings.density": 0.2}, {"mean/accuracy": 0.5}),
        StudyPart("averaging", {}, {"mean/accuracy": 0.4}),
    ]
    for _ in range(2):
        parent = mlflow.show_study("line", "compared", "d", "ann", {}, {}, {}, parts)
    studies = mlflow.client.get_experiment_by_name("line.studies").experiment_id
    below = mlflow.client.search_runs([studies], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name: run.data.metrics["mean/accuracy"] for run in below} == {
        "ties": 0.5,
        "averaging": 0.4,
    }
    assert {run.data.tags["mlflow.user"] for run in below} == {"ann"}
    assert len(mlflow.client.search_runs([studies])) == 3
    assert descriptions(mlflow)["line.studies"].startswith("Studies of line line: ")
