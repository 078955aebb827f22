import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source

from merging.errors import Unavailable
from registry.catalog import Catalog, without_credentials
from registry.home import Home
from registry.ledger import Ledger
from registry.mlflow_writer import Writer
from registry.objects import ObjectStore
from registry.store import FolderStore
from tests.hub_server import ROOT
from tests.registry.builders import (
    digest,
    home_with_mlflow,
    ledger,
    line_spec,
    merge,
    model,
    model_ref,
    record,
    with_task,
)

RETENTION = {"task": "general", "top1": 0.45, "base_top1": 0.5, "ratio": 0.9}
FAILED = {
    "gate": "min_retention",
    "limit": 0.9,
    "value": 0.2,
    "passed": False,
    "note": "retention 0.2 < 0.9",
}


@pytest.fixture
def home(tmp_path, mlflow_template):
    return home_with_mlflow(tmp_path / "home", mlflow_template)


@pytest.fixture
def catalog(home):
    return Catalog(home)


@pytest.fixture
def line(home):
    """A line with a model that joined and one that could not, and two merged versions."""
    made = ledger(home.store_path)
    made.act("registered", "ann", "new", lambda head: with_task(head, "a", model("a")))
    made.act(
        "localized",
        "worker",
        "done",
        lambda head: head.with_state(
            "a", 1, "ready", mask=digest("mask"), delta=digest("delta"), facts={"density": 0.05}
        ),
    )
    made.act("registered", "ann", "new", lambda head: with_task(head, "b", model("b")))
    made.act(
        "quarantined", "worker", "NaN", lambda head: head.with_state("b", 1, "quarantined", "NaN")
    )
    merge(made, tasks=("a",))
    merge(made, tasks=("a",), files={"report.html": made.objects.put_blob(b"<p>report</p>")})
    return made


def shown(catalog: Catalog, line: str = "line") -> dict[str, Any]:
    """Everything that MLflow holds of a line, without its own ids."""
    client = catalog.client
    found: dict[str, Any] = {}
    for experiment in (line, f"{line}.audit", f"{line}.models", f"{line}.history"):
        exists = client.get_experiment_by_name(experiment)
        runs = client.search_runs([exists.experiment_id]) if exists else []
        found[experiment] = sorted(repr(whole(client, run)) for run in runs)
    for name in (line, f"{line}.a", f"{line}.b"):
        found[f"model {name}"] = sorted(
            repr((sorted(version.tags.items()), version.description))
            for version in client.search_model_versions(f"name = '{name}'")
        )
    models = client.search_registered_models(f"name = '{line}'")
    found["aliases"] = {
        alias: client.get_model_version(line, str(version)).tags["restitch.version"]
        for made in models
        for alias, version in made.aliases.items()
    }
    return found


def whole(client: MlflowClient, run: Any) -> tuple[Any, ...]:
    """All that a run holds; of tags, what is ours."""
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("restitch.")}
    inputs = [
        (one.dataset.name, one.dataset.digest, one.dataset.source, [t.value for t in one.tags])
        for one in run.inputs.dataset_inputs
    ]
    points = sorted(
        (point.key, point.step, point.timestamp, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
    return run.info.status, sorted(run.data.params.items()), sorted(tags.items()), inputs, points


def counts(catalog: Catalog) -> dict[str, int]:
    return {name: len(things) for name, things in shown(catalog).items()}


WHOLE = {
    "line": 2,
    "line.audit": 9,
    "line.models": 2,
    "line.history": 1,
    "model line": 2,
    "model line.a": 1,
    "model line.b": 1,
    "aliases": 1,
}


def test_a_line_is_shown_whole(catalog, line):
    assert catalog.repair(line) == 9
    assert counts(catalog) == WHOLE
    client = catalog.client
    champion = client.get_model_version_by_alias("line", "champion")
    assert champion.tags["restitch.version"] == "2"
    run = client.get_run(champion.run_id)
    assert run.data.metrics["retention/ratio"] == 0.9
    assert run.data.metrics["mean/accuracy"] == 0.6
    assert [m.step for m in client.get_metric_history(run.info.run_id, "mean/accuracy")] == [2]
    assert champion.source == f"runs:/{champion.run_id}/restitch"
    artifacts = {file.path for file in client.list_artifacts(champion.run_id)}
    assert artifacts == {"recipe.json", "record.json", "report.html", "restitch"}
    assert "Version 2 of line line" in champion.description
    (joined,) = client.search_model_versions("name = 'line.a'")
    assert joined.tags["restitch.state"] == "ready"
    (refused,) = client.search_model_versions("name = 'line.b'")
    assert (refused.tags["restitch.state"], refused.tags["restitch.reason"]) == (
        "quarantined",
        "NaN",
    )
    assert catalog.run_of(line.merged(2)) == champion.run_id


def test_what_the_command_line_answers_is_found_by_a_search(catalog, line):
    catalog.repair(line)
    client = catalog.client
    audit = client.get_experiment_by_name("line.audit").experiment_id
    (run,) = client.search_runs(
        [audit], "params.kind = 'promoted' and params.`champion.after` = '2'"
    )
    assert run.data.params["champion.before"] == "1"
    (run,) = client.search_runs([audit], f"tags.`restitch.digest` = '{line.head().entry}'")
    assert run.data.params["sequence"] == "9"
    found = client.search_model_versions(
        f"name = 'line.a' and tags.`restitch.digest` = '{digest('a')}'"
    )
    assert len(found) == 1


def test_a_second_repair_looks_at_nothing_and_is_fast(catalog, line):
    catalog.repair(line)
    before = shown(catalog)
    began = time.process_time()
    assert catalog.repair(line) == 0
    assert time.process_time() - began < 0.5
    assert Catalog(catalog.home).repair(line) == 0
    assert shown(catalog) == before


def test_a_full_repair_of_a_whole_image_changes_nothing(catalog, line):
    catalog.repair(line)
    before = shown(catalog)
    assert catalog.repair(line, full=True) == 9
    assert shown(catalog) == before


def test_only_new_acts_are_looked_at(catalog, line):
    catalog.repair(line)
    line.act("retired", "ann", "old", lambda head: head.with_state("a", 1, "retired", "old"))
    assert catalog.repair(line) == 1
    (version,) = catalog.client.search_model_versions("name = 'line.a'")
    assert version.tags["restitch.state"] == "retired"
    assert "retired" in version.description


def points(catalog: Catalog, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the run of the line's history."""
    client = catalog.client
    experiment = client.get_experiment_by_name("line.history")
    (run,) = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in found)


def run_of(catalog: Catalog, version: int) -> Any:
    experiment = catalog.client.get_experiment_by_name("line").experiment_id
    wanted = f"tags.`restitch.version` = '{version}'"
    (run,) = catalog.client.search_runs([experiment], wanted)
    return run


def test_one_run_has_the_metrics_of_all_versions(catalog, line):
    catalog.repair(line)
    merge(line, tasks=("a", "b"), retention={**RETENTION, "ratio": 0.8})
    line.act("rolled-back", "ann", "worse", lambda head: head.promoted(2))
    catalog.repair(line)
    assert points(catalog, "retention/ratio") == [(1, 0.9), (2, 0.9), (3, 0.8)]
    assert points(catalog, "members") == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert points(catalog, "task/b/accuracy") == [(3, 0.6)]
    assert points(catalog, "champion") == [(7, 1.0), (9, 2.0), (11, 3.0), (12, 2.0)]
    for version in (1, 2, 3):
        metrics = run_of(catalog, version).data.metrics
        assert {name: dict(points(catalog, name))[version] for name in metrics} == metrics
    experiment = catalog.client.get_experiment_by_name("line.history")
    (run,) = catalog.client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("history of line", "FINISHED")
    (point,) = (
        p
        for p in catalog.client.get_metric_history(run.info.run_id, "retention/ratio")
        if p.step == 3
    )
    made = datetime.fromisoformat(line.merged(3).created_at)
    assert point.timestamp == int(made.timestamp() * 1000)


def test_only_new_versions_are_read_and_added(catalog, line, monkeypatch):
    for _ in range(5):
        merge(line, tasks=("a",))
    catalog.repair(line)
    before, read = points(catalog, "members"), []
    version = merge(line, tasks=("a",))
    found = line.merged
    monkeypatch.setattr(line, "merged", lambda number: read.append(number) or found(number))
    catalog.repair(line)
    assert set(read) == {version, version - 1}, "the new champion and the one before"
    assert points(catalog, "members") == [*before, (version, 1.0)]


def test_a_deleted_history_comes_back_whole_whoever_dies_meanwhile(catalog, line, home):
    catalog.repair(line)
    before = shown(catalog)
    experiment = catalog.client.get_experiment_by_name("line.history").experiment_id
    for deaths in (1, 2, 3, 4, 5):
        (run,) = catalog.client.search_runs([experiment])
        catalog.client.delete_run(run.info.run_id)
        dying = Catalog(home)
        vars(dying)["client"] = _DyingClient(catalog.client, deaths)
        with pytest.raises(_KilledError):
            dying.repair(line)
        assert catalog.repair(line) == 0, "the rest is whole"
        assert shown(catalog) == before


def test_an_image_of_an_older_kind_is_looked_at_again(catalog, line):
    catalog.repair(line)
    before = shown(catalog)
    audit = catalog.client.get_experiment_by_name("line.audit").experiment_id
    catalog.client.set_experiment_tag(audit, "restitch.complete_to", f"1:{line.head().entry}")
    run = run_of(catalog, 2)
    catalog.client.delete_tag(run.info.run_id, "restitch.members")
    assert catalog.repair(line) == 9
    assert shown(catalog) == before
    assert catalog.repair(line) == 0


def roles(catalog: Catalog) -> dict[int, str]:
    """By version; runs and model versions must agree."""
    versions = catalog.client.search_model_versions("name = 'line'")
    found = {int(v.tags["restitch.version"]): v.tags["restitch.role"] for v in versions}
    assert found == {n: run_of(catalog, n).data.tags["restitch.role"] for n in found}
    return dict(sorted(found.items()))


def candidate(line: Ledger, **changes: Any) -> None:
    made = record(line.head().next_version, tasks=("a",), **changes)
    blob = line.objects.put_blob(made.to_bytes())
    line.act("merged", "t", "", lambda head: head.with_merged(blob))


def test_roles_follow_what_became_of_each_version(catalog, line, tmp_path, mlflow_template):
    catalog.repair(line)
    assert roles(catalog) == {1: "former champion", 2: "champion"}
    candidate(line, gates=[FAILED])
    line.act("rejected", "t", "version 3: too little", lambda head: head)
    catalog.repair(line)
    assert roles(catalog) == {1: "former champion", 2: "champion", 3: "candidate"}
    candidate(line)
    catalog.repair(line)
    candidate(line)
    catalog.repair(line)
    line.act("promoted", "ann", "version 5: I say so", lambda head: head.promoted(5))
    line.act("rolled-back", "ann", "it was slow", lambda head: head.promoted(1))
    catalog.repair(line)
    expected = {
        1: "champion",
        2: "former champion",
        3: "rejected",
        4: "superseded",
        5: "former champion",
    }
    assert roles(catalog) == expected
    champion = catalog.client.get_model_version_by_alias("line", "champion")
    assert champion.tags["restitch.role"] == "champion"
    assert re.search(
        r"In use since [-\d]+ [:\d]+ UTC, rolled back to by ann: it was slow\.$",
        champion.description,
    )
    said = {n: run_of(catalog, n).data.tags["mlflow.note.content"] for n in expected}
    assert said[1] == champion.description
    assert re.search(r"In use until .* UTC, when version 5 took its place\.$", said[2])
    assert said[3].endswith("It failed its gates: retention 0.2 < 0.9.")
    assert said[4].endswith("It was never promoted.")
    assert re.search(r"rolled back to version 1 by ann: it was slow\.$", said[5])
    # A look at all acts at once says the same as one after the other.
    again = Catalog(home_with_mlflow(tmp_path / "again", mlflow_template))
    again.repair(line)
    assert shown(again) == shown(catalog)
    catalog.repair(line, full=True)
    assert shown(again) == shown(catalog)


def test_versions_are_found_by_their_tags(catalog, line):
    merge(line, tasks=("a", "b"), made_by={"actor": "ann", "flow_run": "f-1"})
    candidate(line, gates=[FAILED])
    catalog.repair(line)

    def versions(wanted: str) -> list[int]:
        found = catalog.client.search_model_versions(f"name = 'line' and {wanted}")
        experiment = catalog.client.get_experiment_by_name("line").experiment_id
        runs = catalog.client.search_runs([experiment], wanted)
        numbers = sorted(int(v.tags["restitch.version"]) for v in found)
        assert numbers == sorted(int(r.data.tags["restitch.version"]) for r in runs)
        return numbers

    assert versions("tags.`restitch.members` = 'a,b'") == [3]
    assert versions("tags.`restitch.task.a` = '1'") == [1, 2, 3, 4]
    assert versions("tags.`restitch.task.b` = '1'") == [3]
    assert versions("tags.`restitch.gates` = 'failed'") == [4]
    assert versions("tags.`restitch.prefect_run` = 'f-1'") == [3]
    assert versions(f"tags.`restitch.patch` = '{digest('patch 2')}'") == [2]


def test_acts_are_found_by_the_version_that_they_are_about(catalog, line):
    candidate(line, gates=[FAILED])
    line.act("rejected", "t", "version 3: too little", lambda head: head)
    catalog.repair(line)
    audit = catalog.client.get_experiment_by_name("line.audit").experiment_id

    def kinds(version: int) -> list[str]:
        wanted = f"tags.`restitch.versions` LIKE '%,{version},%'"
        runs = catalog.client.search_runs([audit], wanted, order_by=["start_time ASC"])
        return [run.data.params["kind"] for run in runs]

    assert kinds(1) == ["merged", "promoted", "promoted"]
    assert kinds(3) == ["merged", "rejected"]


def test_the_data_that_a_version_was_measured_on_are_its_inputs(catalog, line):
    rows = {"path": "/data/a", "split": "test", "digest": digest("rows")}
    hub = {"path": f"org/photos@{'a' * 40}", "split": "validation", "digest": digest("photos")}
    merge(
        line,
        results={"a": {"merged": 0.5, "data": rows}, "b": {"merged": 0.5}},
        retention={**RETENTION, "data": hub},
    )
    catalog.repair(line)
    catalog.repair(line, full=True)
    inputs = run_of(catalog, 3).inputs.dataset_inputs
    found = {one.dataset.name: one for one in inputs}
    assert len(inputs) == 2
    assert found["a"].dataset.digest == digest("rows")[:36]
    assert [(t.key, t.value) for t in found["a"].tags] == [("mlflow.data.context", "test")]
    assert get_source(found["a"].dataset).to_dict() == {"uri": "/data/a"}
    source = get_source(found["general"].dataset).to_dict()
    assert (source["path"], source["revision"]) == ("org/photos", "a" * 40)
    experiment = catalog.client.get_experiment_by_name("line").experiment_id
    (by_data,) = catalog.client.search_runs([experiment], "dataset.name = 'general'")
    assert by_data.data.tags["restitch.version"] == "3"


def artifacts(catalog: Catalog, version: int, folder: Path) -> dict[str, bytes]:
    run = run_of(catalog, version).info.run_id
    place = Path(catalog.client.download_artifacts(run, "", str(folder)))
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_further_artifacts_are_written_where_an_act_is_about_a_version(catalog, line, tmp_path):
    asked = []

    def report(version: int) -> dict[str, bytes]:
        asked.append(version)
        return {"report.html": f"{version} of {len(asked)}".encode(), "plots/x.png": b"png"}

    catalog.repair(line, extras=report)
    assert asked == [1, 2]
    line.act("rolled-back", "ann", "worse", lambda head: head.promoted(1))
    candidate(line)
    line.act("configured", "ann", "", lambda head: head.with_pin(True))
    catalog.repair(line, extras=report)
    assert asked == [1, 2, 1, 2, 3]
    line.act("rejected", "t", "version 3: too little", lambda head: head)
    catalog.repair(line, extras=report)
    assert asked == [1, 2, 1, 2, 3, 3]
    assert catalog.repair(line, extras=report) == 0
    assert asked == [1, 2, 1, 2, 3, 3]
    found = artifacts(catalog, 1, tmp_path)
    assert found["report.html"] == b"1 of 3"
    assert found["plots/x.png"] == b"png"
    assert "record.json" in found


def test_further_artifacts_are_there_before_an_image_counts_as_complete(catalog, line, tmp_path):
    def killed(_: int) -> dict[str, bytes]:
        raise _KilledError

    with pytest.raises(_KilledError):
        catalog.repair(line, extras=killed)
    catalog.repair(line, extras=lambda version: {"report.html": b"whole"})
    for version in (1, 2):
        (tmp_path / str(version)).mkdir()
        found = artifacts(catalog, version, tmp_path / str(version))
        assert found["report.html"] == b"whole"


def test_a_repair_that_is_killed_again_and_again_is_completed(home, tmp_path, mlflow_template):
    line = ledger(home.store_path)
    line.act("registered", "ann", "", lambda head: with_task(head, "a", model("a")))
    merge(line, tasks=("a",))
    reference = Catalog(home_with_mlflow(tmp_path / "reference", mlflow_template))
    reference.repair(line)
    catalog = Catalog(home)
    chance = random.Random(0)
    killed = 0
    while True:
        dying = Catalog(home)
        vars(dying)["client"] = _DyingClient(catalog.client, chance.randint(1, 5))
        try:
            dying.repair(line)
            break
        except _KilledError:
            killed += 1
            assert killed < 200
    assert killed > 10
    assert shown(catalog) == shown(reference)
    assert catalog.repair(line) == 0


class _KilledError(BaseException):
    """The process is gone."""


class _DyingClient:
    """A client whose process dies before its n-th write."""

    WRITES = ("create", "log", "set", "delete", "update")

    def __init__(self, client: Any, writes: int) -> None:
        self._client, self._left = client, writes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not name.startswith(self.WRITES):
            return found

        def write(*arguments: Any, **keywords: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise _KilledError
            return found(*arguments, **keywords)

        return write


def test_two_workers_at_once_do_not_double_anything(home, line):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: Catalog(home).repair(line), range(2)))
    assert counts(Catalog(home)) == WHOLE


def test_what_other_hosts_doubled_is_made_single(home, catalog, monkeypatch):
    line = ledger(home.store_path)
    merge(line)
    # Another host holds another lock, and its search came before our creation.
    monkeypatch.setattr(Writer, "runs", lambda *_: [])
    monkeypatch.setattr(Writer, "versions", lambda *_: [])
    catalog.repair(line)
    catalog.repair(line, full=True)
    found = counts(catalog)
    assert (found["line"], found["line.audit"], found["model line"]) == (2, 6, 2)
    monkeypatch.undo()
    catalog.repair(line, full=True)
    found = counts(catalog)
    assert (found["line"], found["line.audit"], found["model line"]) == (1, 3, 1)
    assert found["aliases"] == 1


def test_aliases_follow_the_head(catalog, line):
    catalog.repair(line)
    line.act("rolled-back", "ann", "worse", lambda head: head.promoted(1))
    catalog.repair(line)
    assert shown(catalog)["aliases"] == {"champion": "1"}
    line.act("merged", "t", "", lambda head: head.with_merged(line.head().versions[2]))
    version = catalog.client.search_model_versions("name = 'line'")[0].version
    catalog.client.set_registered_model_alias("line", "champion", str(version))
    catalog.client.set_registered_model_alias("line", "mine", str(version))
    catalog.repair(line)
    assert shown(catalog)["aliases"]["champion"] == "1"
    assert shown(catalog)["aliases"]["mine"], "an alias of somebody else is left alone"


def test_a_candidate_has_its_alias_while_it_is_one(catalog, line):
    record = line.merged(2).model_copy(update={"version": 3})
    blob = line.objects.put_blob(record.to_bytes())
    line.act("merged", "t", "", lambda head: head.with_merged(blob))
    catalog.repair(line)
    assert shown(catalog)["aliases"] == {"champion": "2", "candidate": "3"}
    line.act("rejected", "t", "gate", lambda head: head.without_candidate())
    catalog.repair(line)
    assert shown(catalog)["aliases"] == {"champion": "2"}


def test_a_deleted_model_and_a_deleted_database_are_made_again(catalog, line, mlflow_template):
    catalog.repair(line)
    before = shown(catalog)
    catalog.client.delete_registered_model("line")
    Catalog(catalog.home).repair(line)
    assert shown(catalog) == before
    experiment = catalog.client.get_experiment_by_name("line.audit")
    catalog.client.delete_experiment(experiment.experiment_id)
    Catalog(catalog.home).repair(line, full=True)
    assert shown(catalog) == before


def test_two_lines_do_not_disturb_each_other(catalog, line):
    other = Ledger(line.objects, "other")
    other.create(line_spec("other"), model_ref("base"), "t", "")
    merge(other)
    catalog.repair(line)
    catalog.repair(other)
    assert counts(catalog) == WHOLE
    assert len(shown(catalog, "other")["other"]) == 1


def test_mlflow_away_is_unavailable_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = tmp_path / "store"
    line = ledger(store)
    home = Home(tmp_path / "home", str(store), "http://ann:secret@127.0.0.1:9")
    with pytest.raises(Unavailable) as raised:
        Catalog(home).repair(line)
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(raised.value.__cause__)
    assert raised.value.__suppress_context__
    assert "remerge completes" in str(raised.value)
    assert without_credentials("at postgresql://u:p@host/db and s3://k:s@b") == (
        "at postgresql://***@host/db and s3://***@b"
    )


def test_a_database_that_is_none_is_unavailable(tmp_path):
    line = ledger(tmp_path / "home" / "store")
    (tmp_path / "home" / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(Unavailable, match="cannot be used"):
        Catalog(Home(tmp_path / "home")).repair(line)


def test_nothing_is_written_beside_the_home(line, home, tmp_path):
    """Parts of MLflow ask for a global address and make ./mlflow.db where there is none."""
    work = tmp_path / "work"
    work.mkdir()
    code = f"""
from pathlib import Path
from registry.catalog import Catalog
from registry.home import Home, prepare_environment
from registry.ledger import Ledger
from registry.mlflow_writer import Writer
from registry.objects import ObjectStore
home = Home(Path({str(home.root)!r}))
prepare_environment(home)
print(Catalog(home).repair(Ledger(ObjectStore(home.open_store()), "line")))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=work,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": str(work)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "9"
    assert "INFO" not in ran.stderr
    assert list(work.iterdir()) == []


def test_the_store_alone_is_enough_for_another_mlflow(line, catalog, tmp_path, mlflow_template):
    catalog.repair(line)
    elsewhere = Catalog(home_with_mlflow(tmp_path / "elsewhere", mlflow_template))
    copy = Ledger(ObjectStore(FolderStore(line.objects.store.root)), "line")
    elsewhere.repair(copy)
    assert shown(elsewhere) == shown(catalog)


@pytest.mark.slow
def test_a_server_is_shown_the_same_as_a_database(line, catalog, tmp_path):
    catalog.repair(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    database = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    artifacts = ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        [*command, *database, *artifacts], cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        deadline = time.time() + 120
        while time.time() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        home = Home(tmp_path / "client", str(catalog.home.store_path), f"http://127.0.0.1:{port}")
        remote = Catalog(home)
        remote.repair(line)
        assert remote.repair(line, full=True) == 9
        assert shown(remote) == shown(catalog)
        champion = remote.client.get_model_version_by_alias("line", "champion")
        found = resolve_object(home, f"runs:/{champion.run_id}/restitch/object.json")
        assert found["digest"] == line.merged(2).patch
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def resolve_object(home: Home, uri: str) -> dict[str, Any]:
    from mlflow.artifacts import download_artifacts

    path = download_artifacts(
        artifact_uri=uri, dst_path=str(home.scratch), tracking_uri=home.mlflow_uri
    )
    return dict(json.loads(Path(path).read_bytes()))
