import json
from typing import Any

import pytest

from restitch.registry.ledger import outcomes
from restitch.registry.ledger.finetuned_models import NO_GAIN, ModelFacts
from restitch.registry.ledger.measurements import Acceptance, Gain
from restitch.registry.ledger.outcomes import Outcome
from restitch.registry.ledger.records import Entry, MergedRecord, TaskResult
from restitch.registry.mlflow import projection, projection_merged
from restitch.registry.record import Interval
from tests.registry.builders import (
    TIME,
    digest,
    done,
    ledger,
    merge,
    model,
    ready,
    record,
    with_task,
)

IN_USE = Outcome("champion", "In use.")


def act(tmp_path, change, kind="registered") -> Entry:
    return done(ledger(tmp_path).act(kind, "ann", "a reason", change)).entry


def test_metrics_keep_their_names():
    made = record(
        tasks=("a",),
        results={
            "a": TaskResult(base=0.4, finetuned=0.8, grafted=0.7, merged=0.6, normalized=0.75)
        },
        retention={
            "task": "general",
            "value": 0.45,
            "more": {"top5": 0.8},
            "base": 0.5,
            "ratio": 0.9,
        },
        timings={"stitch": 2.5},
    )
    assert projection_merged.metrics_of(made) == {
        "retention/accuracy": 0.45,
        "retention/top5": 0.8,
        "retention/base_accuracy": 0.5,
        "retention/ratio": 0.9,
        "task/a/accuracy": 0.6,
        "task/a/normalized": 0.75,
        "task/a/base": 0.4,
        "task/a/finetuned": 0.8,
        "task/a/grafted": 0.7,
        "mean/accuracy": 0.6,
        "mean/normalized": 0.75,
        "patch/bytes": 100.0,
        "patch/kept": 10.0,
        "members": 1.0,
        "seconds/stitch": 2.5,
    }


def test_intervals_and_failed_gates_are_metrics_too():
    made = record(
        results={"a": TaskResult(merged=0.6, interval=Interval(low=0.5, high=0.7))},
        retention={
            "task": "general",
            "value": 0.45,
            "base": 0.5,
            "ratio": 0.9,
            "interval": {"low": 0.4, "high": 0.5},
            "ratio_interval": {"low": 0.85, "high": 0.95},
        },
        gates=[
            {"gate": "min_retention", "limit": 0.95, "value": 0.9, "passed": False},
            {"gate": "max_task_drop", "limit": 0.1, "value": 0.0, "passed": True, "task": "a"},
        ],
    )
    found = projection_merged.metrics_of(made)
    assert (found["retention/low"], found["retention/high"]) == (0.4, 0.5)
    assert (found["retention/ratio_low"], found["retention/ratio_high"]) == (0.85, 0.95)
    assert (found["task/a/low"], found["task/a/high"]) == (0.5, 0.7)
    assert (found["gates/failed"], found["gates/not_measured"]) == (1.0, 0.0)
    assert "gates/failed" not in projection_merged.metrics_of(record())


GATES = {
    "passed": {"gate": "min_retention", "limit": 0.5, "value": 0.9, "passed": True},
    "failed": {"gate": "min_retention", "limit": 0.95, "value": 0.9, "passed": False},
    "not measured": {"gate": "min_normalized", "limit": 0.5, "value": None, "passed": False},
}


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        ((), "none"),
        (("passed",), "passed"),
        (("passed", "not measured"), "not measured"),
        (("not measured", "failed"), "failed"),
    ],
)
def test_four_outcomes_of_gates_are_distinguished(gates, verdict, tmp_path):
    made = record(gates=[GATES[name] for name in gates])
    outcome = Outcome("champion", "In use.")
    _, version = projection_merged.project_merged(made, {}, outcome)
    assert version.tags["restitch.gates"] == verdict
    assert made.passed == (verdict in ("none", "passed"))
    missed = projection_merged.metrics_of(made).get("gates/not_measured")
    assert missed == (float("not measured" in gates) if gates else None)


def test_a_gate_that_only_warns_leaves_the_verdict_passed():
    made = record(gates=[{**GATES[name], "action": "warn"} for name in GATES])
    assert made.verdict == "passed"


def test_a_version_names_the_tasks_that_lost_significantly(tmp_path):
    drops = {
        "a": {"value": 0.034, "is_noise": False, "against": 3, "p_value": 0.001},
        "b": {"value": 0.02, "is_noise": True, "against": 3},
    }
    made = record(4, drops=drops)
    assert made.losses == ("a lost 0.0340 against version 3 (p = 0.001)",)
    assert projection_merged.describe(made).endswith(
        " a lost 0.0340 against version 3 (p = 0.001)."
    )
    assert MergedRecord.model_validate(made.to_json()) == made
    assert "drops" not in record().to_json()


def test_notes_of_retention_are_written_only_if_there_are_some():
    values = {"task": "general", "value": 0.4, "base": 0.5, "ratio": 0.8}
    assert "notes" not in record(retention=values).to_json()["retention"]
    noted = record(retention={**values, "notes": ["a row is left out"]})
    assert noted.to_json()["retention"]["notes"] == ["a row is left out"]
    assert MergedRecord.model_validate(noted.to_json()) == noted


def test_values_that_were_not_measured_are_no_metrics():
    found = projection_merged.metrics_of(record(results={}, retention=None))
    assert set(found) == {"patch/bytes", "patch/kept", "members"}


def test_a_version_is_described_in_two_sentences():
    assert projection_merged.describe(record(3)) == (
        "Version 3 of line line: 2 tasks (a, b) stitched into one model with "
        "localize-and-stitch/1. It scores 0.600 on average over its tasks, reaches 75.0% of the "
        "accuracy of the finetuned models and keeps 90.0% of the base's accuracy."
    )
    many = record(tasks=tuple(f"t{n:02}" for n in range(12)), results={}, retention=None)
    assert projection_merged.describe(many).endswith(
        "t04 and 7 more) stitched into one model with localize-and-stitch/1. It was not evaluated."
    )


def test_an_act_names_the_models_and_versions_that_it_was_about(tmp_path):
    registered = act(tmp_path / "1", lambda line_state: with_task(line_state, "a", model()))
    assert outcomes.touched_models(registered) == (("a", 1),)
    line = ledger(tmp_path / "2")
    line.act("registered", "t", "", lambda line_state: with_task(line_state, "b", ready("1")))
    more = done(
        line.act("registered", "t", "", lambda line_state: with_task(line_state, "b", model("2")))
    )
    assert outcomes.touched_models(more.entry) == (("b", 2),)
    state = done(
        line.act(
            "retired", "t", "", lambda line_state: line_state.with_state("b", 1, "retired", "old")
        )
    )
    assert outcomes.touched_models(state.entry) == (("b", 1),)
    merge(line)
    promoted, merged, *_ = line.entries()
    assert outcomes.touched_merges(merged) == (1,)
    assert outcomes.touched_merges(promoted) == ()
    assert outcomes.touched_models(promoted) == ()
    run = projection.project_act(promoted)
    assert run.params["champion.before"] == "none"
    assert run.params["champion.after"] == "1"


def test_an_act_is_about_the_versions_that_it_made_moved_or_rejected(tmp_path):
    line = ledger(tmp_path)
    merge(line)
    merge(line)
    rejected = done(
        line.act("rejected", "t", "version 1: too little", lambda line_state: line_state)
    )
    held = done(
        line.act(
            "held", "t", "version 1: of a task, not of the line", lambda line_state: line_state
        )
    )
    back = done(
        line.act("rolled-back", "t", "it was slow", lambda line_state: line_state.promoted(1))
    )
    promoted, merged, *_ = list(line.entries())[3:]
    assert outcomes.merges_about(merged) == (2,)
    assert outcomes.merges_about(promoted) == (1, 2)
    assert outcomes.merges_about(rejected.entry) == (1,)
    assert outcomes.merges_about(held.entry) == ()
    assert outcomes.merges_about(back.entry) == (1, 2)
    assert projection.project_act(promoted).current["restitch.versions"] == ",1,2,"


def test_the_last_move_is_found_without_reading_further(tmp_path):
    line = ledger(tmp_path)
    merge(line)
    merge(line)
    trail = line.entries()
    moves = outcomes.last_moves(trail, {2})
    assert [(n, entry.kind) for n, entry in moves.items()] == [(2, "promoted")]
    assert next(trail).kind == "merged"
    assert outcomes.last_moves(line.entries(), set()) == {}


def test_a_sentence_does_not_repeat_the_version_that_it_is_about(tmp_path):
    line = ledger(tmp_path)
    merge(line)
    promoted = next(iter(line.entries())).model_copy(
        update={"reason": "version 1: no\ngates.", "time": TIME}
    )
    outcome = outcomes.outcome_of(record(1), promoted)
    sentence = "In use since 2026-03-01 12:00:00 UTC, promoted by tester: no gates."
    assert outcome == Outcome("champion", sentence)


def test_an_act_is_shown_with_its_facts_as_params(tmp_path):
    entry = act(tmp_path, lambda line_state: with_task(line_state, "a", model()))
    run = projection.project_act(entry)
    assert run.digest == entry.digest
    assert run.params["actor"] == "ann"
    assert run.params["reason"] == "a reason"
    assert run.params["models"] == "a 1"
    assert run.current["mlflow.runName"] == "0002 registered a reason"
    assert json.loads(run.artifacts["audit.json"]) == entry.to_json()


def test_texts_are_cut_to_what_mlflow_accepts(tmp_path):
    line = ledger(tmp_path)
    entry = done(line.act("configured", "t", "x" * 10_000, lambda h: h.with_pin(True))).entry
    run = projection.project_act(entry)
    assert len(run.params["reason"]) < 6_000
    assert run.params["reason"].endswith("...")
    assert all(len(value) < 5_000 for value in run.tags.values())
    assert len(run.current["mlflow.runName"]) == 120
    assert json.loads(run.artifacts["audit.json"])["reason"] == "x" * 10_000


def test_a_long_reason_is_cut_in_descriptions_too(tmp_path):
    line = ledger(tmp_path)
    merge(line)
    promoted = next(iter(line.entries())).model_copy(update={"reason": "x" * 10_000})
    run, shown = projection_merged.project_merged(
        record(1), {}, outcomes.outcome_of(record(1), promoted)
    )
    assert len(shown.description) < 5_000
    assert run.current["mlflow.note.content"] == shown.description


def test_a_placeholder_holds_the_address_of_the_model():
    run, version = projection.project_model("line", "a", 1, model(), digest("base"))
    placeholder = json.loads(run.artifacts["restitch/object.json"])
    assert placeholder == {"uri": "/models/model", "digest": digest("model"), "size": 8}
    assert version.name == "line.a"
    assert version.identity[projection.DIGEST_TAG] == digest("model")
    merged, shown = projection_merged.project_merged(record(), {"report.html": b"<p>"}, IN_USE)
    assert json.loads(merged.artifacts["restitch/object.json"])["digest"] == digest("patch 1")
    assert merged.artifacts["report.html"] == b"<p>"
    assert shown.name == "line"


def gain(verdict: Any, difference: float) -> Gain:
    interval = Interval(low=difference - 0.1, high=difference + 0.1)
    return Gain(verdict=verdict, difference=difference, interval=interval, p_value=0.01)


def test_a_finetuned_model_shows_its_gain_and_who_accepted_it_without_one():
    facts = ModelFacts(
        gain=gain("worse", -0.2),
        measured_on=digest("task"),
        accepted={NO_GAIN: Acceptance(reason="noise", by="ann", at="2026-03-02")},
    )
    run, shown = projection.project_model("line", "a", 1, model(facts=facts), digest("base"))
    assert run.metrics["gain"] == -0.2
    assert shown.tags[projection.GAIN_TAG] == "worse"
    assert shown.tags[projection.ACCEPT_TAG] == "noise"
    unmeasured = model(facts=ModelFacts(measured_on=digest("task")))
    _, shown = projection.project_model("line", "a", 1, unmeasured, digest("base"))
    assert shown.tags[projection.GAIN_TAG] == "not measured"


def test_a_version_names_the_tasks_whose_models_have_no_gain():
    idle = TaskResult(merged=0.2, finetuned=0.2, base=0.4, gain=gain("worse", -0.2))
    made = record(results={"a": idle})
    assert "holds 1 without a gain over the base (a)" in projection_merged.describe(made)
    metrics = projection_merged.metrics_of(made)
    assert metrics["task/a/gain"] == -0.2
    assert not [name for name in metrics if "normalized" in name]


def test_the_same_record_gives_the_same_projection():
    assert projection_merged.project_merged(
        record(), {}, IN_USE
    ) == projection_merged.project_merged(record(), {}, IN_USE)
