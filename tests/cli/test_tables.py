"""Tables in a terminal of 80 columns: nothing that a reader needs is cut."""

import io

from rich.console import Console

from restitch.cli.render import audit, models, storage
from tests.registry.builders import record


def test_the_table_of_versions_fits_into_80_columns() -> None:
    version = {
        "version": 12,
        "role": "champion",
        "mean_accuracy": 0.894,
        "mean_normalized": 0.911,
        "retention": 0.899,
        "retention_interval": {"low": 0.88, "high": 0.92},
        "created_at": "2026-11-30T22:54:41+00:00",
        "made_by": {"actor": "remerge@host-12"},
        "members": {"arrows": 1, "letters": 1, "radar": 10},
        "specialists": None,
        "purged": None,
        "forgotten": [],
    }
    out = io.StringIO()
    audit.versions({"versions": [version]}, Console(file=out, width=80, highlight=False))
    shown = out.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    words = ("12 champion", "0.899", "(0.88-0.92)", "2026-11-30", "22:54", "members")
    for word in (*words, "arrows 1,", "letters 1,", "radar 10"):
        assert word in shown, shown
    header, *lines = shown.splitlines()
    names = [line[header.index("by") : header.index("members")].strip() for line in lines]
    assert "".join(names) == "remerge@host-12", shown


def test_a_registration_by_workers_names_the_tasks_that_lost() -> None:
    drop = {"value": 0.034, "is_noise": False, "against": 3, "p_value": 0.001}
    values = {"line": "demo", "task": "b", "version": 1, "state": "ready", "reason": None}
    outcome = {"already": False, "merged": None, "paused": None, "handed_over": True}
    merged = {"champion": 4, "record": record(4, drops={"a": drop}).to_json()}
    out = io.StringIO()
    models.registered(values | outcome | merged | {"facts": {}}, Console(file=out, width=80))
    assert "a lost 0.0340 against version 3 (p = 0.001)" in out.getvalue()


def test_objects_that_are_too_young_to_remove_name_the_age_and_its_option() -> None:
    found = {"objects": 0, "bytes": 0, "kinds": {}, "in_use": 5, "young": 3, "removed": False}
    out = io.StringIO()
    storage.collected(found | {"older_than": 86400.0}, Console(file=out, width=80))
    assert "3 more are not in use, but younger than 24 hours (--older-than)" in out.getvalue()
