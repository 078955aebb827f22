import json

from registry import fates, image, image_merged
from registry.fates import Fate
from registry.history import Entry, TaskResult
from tests.registry.builders import digest, done, ledger, merge, model, ready, record, with_task

IN_USE = Fate("champion", "In use.")


def act(tmp_path, change, kind="registered") -> Entry:
    return done(ledger(tmp_path).act(kind, "ann", "a reason", change)).entry


def test_the_metrics_have_the_names_of_the_design():
    made = record(
        tasks=("a",),
        results={
            "a": TaskResult(base=0.4, finetuned=0.8, grafted=0.7, merged=0.6, normalized=0.75)
        },
        retention={
            "task": "general",
            "top1": 0.45,
            "top5": 0.8,
            "base_top1": 0.5,
            "ratio": 0.9,
        },
        timings={"stitch": 2.5},
    )
    assert image_merged.metrics_of(made) == {
        "retention/top1": 0.45,
        "retention/top5": 0.8,
        "retention/base_top1": 0.5,
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


def test_what_was_not_measured_is_no_metric():
    found = image_merged.metrics_of(record(results={}, retention=None))
    assert set(found) == {"patch/bytes", "patch/kept", "members"}


def test_a_version_is_described_in_two_sentences():
    assert image_merged.describe(record(3)) == (
        "Version 3 of line line: 2 tasks (a, b) stitched into one model with "
        "localize-and-stitch/1. It scores 0.600 on average over its tasks, reaches 75.0% of the "
        "finetuned models and keeps 90.0% of the base's accuracy."
    )
    many = record(tasks=tuple(f"t{n:02}" for n in range(12)), results={}, retention=None)
    assert image_merged.describe(many).endswith(
        "t07 and 4 more) stitched into one model with localize-and-stitch/1. It was not evaluated."
    )


def test_an_act_names_the_models_and_versions_that_it_was_about(tmp_path):
    registered = act(tmp_path / "1", lambda head: with_task(head, "a", model()))
    assert fates.touched_models(registered) == (("a", 1),)
    line = ledger(tmp_path / "2")
    line.act("registered", "t", "", lambda head: with_task(head, "b", ready("1")))
    more = done(line.act("registered", "t", "", lambda head: with_task(head, "b", model("2"))))
    assert fates.touched_models(more.entry) == (("b", 2),)
    state = done(
        line.act("retired", "t", "", lambda head: head.with_state("b", 1, "retired", "old"))
    )
    assert fates.touched_models(state.entry) == (("b", 1),)
    merge(line)
    promoted, merged, *_ = line.entries()
    assert fates.touched_merges(merged) == (1,)
    assert fates.touched_merges(promoted) == ()
    assert fates.touched_models(promoted) == ()
    run = image.of_act(promoted)
    assert run.params["champion.before"] == "none"
    assert run.params["champion.after"] == "1"


def test_an_act_is_shown_with_its_facts_as_params(tmp_path):
    entry = act(tmp_path, lambda head: with_task(head, "a", model()))
    run = image.of_act(entry)
    assert run.digest == entry.digest
    assert run.params["actor"] == "ann"
    assert run.params["reason"] == "a reason"
    assert run.params["models"] == "a 1"
    assert run.tags["mlflow.runName"] == "0002 registered"
    assert json.loads(run.artifacts["audit.json"]) == entry.to_json()


def test_what_mlflow_would_cut_or_refuse_is_cut_here(tmp_path):
    line = ledger(tmp_path)
    entry = done(line.act("configured", "t", "x" * 10_000, lambda h: h.with_pin(True))).entry
    run = image.of_act(entry)
    assert len(run.params["reason"]) < 6_000
    assert run.params["reason"].endswith("...")
    assert all(len(value) < 5_000 for value in run.tags.values())
    assert json.loads(run.artifacts["audit.json"])["reason"] == "x" * 10_000


def test_a_stand_in_says_where_the_model_really_is():
    run, version = image.of_model("line", "a", 1, model(), digest("base"))
    stand_in = json.loads(run.artifacts["restitch/object.json"])
    assert stand_in == {"uri": "/models/model", "digest": digest("model"), "size": 8}
    assert version.name == "line.a"
    assert version.identity[image.DIGEST_TAG] == digest("model")
    merged, shown = image_merged.of_merged(record(), {"report.html": b"<p>"}, IN_USE)
    assert json.loads(merged.artifacts["restitch/object.json"])["digest"] == digest("patch 1")
    assert merged.artifacts["report.html"] == b"<p>"
    assert shown.name == "line"


def test_the_same_record_gives_the_same_image():
    assert image_merged.of_merged(record(), {}, IN_USE) == image_merged.of_merged(
        record(), {}, IN_USE
    )
