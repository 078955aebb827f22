"""The projection of merged versions to MLflow: a run for each, and runs with charts over them.

Pure functions of a version's record and outcome. Names of metrics and of search tags never
change, because charts and searches depend on them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from restitch.merging.digests import canonical_json
from restitch.merging.errors import counted, shortlist
from restitch.registry.ledger.finetuned_models import Removal
from restitch.registry.ledger.outcomes import Outcome, merges_about
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.mlflow.projection import (
    MAX_PARAM,
    MAX_TAG,
    NAME_TAG,
    NOTE_TAG,
    PURGED_TAG,
    ROLE_TAG,
    USER_TAG,
    VERSION_TAG,
    DataProjection,
    RunProjection,
    VersionProjection,
    as_text,
    cut,
    identity,
    milliseconds,
    model_name,
    placeholder,
    shortened,
)
from restitch.registry.record import Interval

Chart = Literal["champions", "rejected"]
# The names of the runs. Rejected versions have a run of their own, so that no champion's curve
# falls where a version failed.
CHARTS: dict[Chart, str] = {
    "champions": "champions of {line}",
    "rejected": "rejected versions of {line}",
}
_NOTES: dict[Chart, str] = {
    "champions": "The measurements of the versions of line {line} that were in use. The step is "
    "the version number. `champion` is the version in use, or 0; its step is the number of the act "
    "in the audit trail.",
    "rejected": "The measurements of the versions of line {line} that failed their gates. The step "
    "is the version number.",
}

_MAX_DIGEST = 36  # of a data set, in hex digits


@dataclass(frozen=True)
class Point:
    """One value of a metric of the line's history."""

    metric: str
    value: float
    time: int
    step: int


def project_merged(
    record: MergedRecord, files: dict[str, bytes], outcome: Outcome, purge: Removal | None = None
) -> tuple[RunProjection, VersionProjection]:
    """The run and the registered version of a merged version."""
    digest = record.digest
    method = record.recipe.get("method")
    params = {
        "version": str(record.version),
        "method": _method(method),
        "members": ", ".join(f"{t} {m.version}" for t, m in sorted(record.members.items())),
        "recipe": record.recipe_digest,
        "patch": record.patch,
        "patch_bytes": str(record.patch_bytes),
        "record": digest,
    }
    settings = method.get("settings") if isinstance(method, dict) else None
    if isinstance(settings, dict):
        params |= {f"method.{k}": as_text(v) for k, v in sorted(settings.items())}
    params |= {f"software.{name}": v for name, v in sorted(record.software.items())}
    description = f"{describe(record)} {outcome.sentence}"
    tags = _tags_of_merged(record, outcome)
    if purge is not None:
        tags[PURGED_TAG] = str(purge)
    current = {NOTE_TAG: description, VERSION_TAG: str(record.version), **tags}
    if actor := _maker(record).get("actor"):
        current[USER_TAG] = str(actor)
    run = RunProjection(
        digest=digest,
        time=milliseconds(record.created_at),
        tags=cut({NAME_TAG: f"{record.line} {record.version}"}),
        current=cut(current),
        params=cut(params, MAX_PARAM),
        metrics=metrics_of(record),
        step=record.version,
        inputs=_inputs(record),
        artifacts={
            "restitch/object.json": placeholder(
                f"blobs/{record.patch}", record.patch, record.patch_bytes
            ),
            "record.json": canonical_json(record.to_json()),
            "recipe.json": canonical_json(record.recipe),
            **files,
        },
    )
    shown = VersionProjection(
        name=model_name(record.line),
        identity=identity(digest, record.version),
        tags=cut(tags),
        description=shortened(description, MAX_TAG),
    )
    return run, shown


def chart_digest(line: str, chart: Chart) -> str:
    """The digest tag of a run with charts of a line."""
    return f"{chart}.{line}"


def project_chart(line: str, chart: Chart, began: str) -> RunProjection:
    """The run whose charts show a line over its versions; points are added as they come."""
    return RunProjection(
        digest=chart_digest(line, chart),
        time=milliseconds(began),
        tags={
            NAME_TAG: CHARTS[chart].format(line=line),
            NOTE_TAG: _NOTES[chart].format(line=line),
        },
        params={"line": line},
    )


def charted(entry: Entry, chart: Chart) -> tuple[int, ...]:
    """The versions that an act adds to a chart."""
    if chart == "rejected":
        return merges_about(entry) if entry.kind == "rejected" else ()
    champion = entry.after.get("/champion")
    return (champion,) if isinstance(champion, int) else ()


def points_of(entry: Entry, chart: Chart, versions: Iterable[MergedRecord]) -> list[Point]:
    """The points that an act adds to a chart: those of versions, and which one is champion."""
    points = [
        Point(name, value, milliseconds(record.created_at), record.version)
        for record in versions
        for name, value in sorted(metrics_of(record).items())
    ]
    before, after = entry.before.get("/champion"), entry.after.get("/champion")
    changed = "/champion" in entry.after and (before, after) != (None, None)
    if chart == "champions" and changed:
        value = after if isinstance(after, int) else 0
        points.append(Point("champion", value, milliseconds(entry.time), entry.sequence))
    return points


def metrics_of(record: MergedRecord) -> dict[str, float]:
    """The metrics of a merged version by name."""
    metrics: dict[str, float | None] = {
        "mean/accuracy": record.mean_accuracy,
        "mean/normalized": record.mean_normalized,
        "patch/bytes": float(record.patch_bytes),
        "patch/kept": float(record.kept),
        "members": float(len(record.members)),
    }
    retention = record.retention
    if retention is not None:
        metrics |= {
            f"retention/{retention.metric}": retention.value,
            f"retention/base_{retention.metric}": retention.base,
            **{f"retention/{name}": value for name, value in retention.more.items()},
            **{f"retention/base_{name}": value for name, value in retention.base_more.items()},
            "retention/ratio": retention.ratio,
        }
        metrics |= _bounds("retention/", retention.interval)
        metrics |= _bounds("retention/ratio_", retention.ratio_interval)
    for task, result in record.results.items():
        metrics |= {
            f"task/{task}/{result.metric}": result.merged,
            f"task/{task}/normalized": result.normalized,
            f"task/{task}/gain": None if result.gain is None else result.gain.difference,
            f"task/{task}/base": result.base,
            f"task/{task}/finetuned": result.finetuned,
            f"task/{task}/grafted": result.grafted,
            **_bounds(f"task/{task}/", result.interval),
        }
    tournament = record.facts.get("tournament")
    if isinstance(tournament, dict):
        contestants: Any = tournament["contestants"]
        metrics |= {f"tournament/{_plain(one['label'])}": one["score"] for one in contestants}
    if record.gates:
        verdicts = [gate.verdict for gate in record.gates]
        metrics["gates/failed"] = float(verdicts.count("failed"))
        metrics["gates/not_measured"] = float(verdicts.count("not measured"))
    metrics |= {f"seconds/{step}": seconds for step, seconds in record.timings.items()}
    return {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}


def _plain(label: str) -> str:
    """A label without the characters that names of metrics may not have."""
    return re.sub(r"[^\w.\- ]", "", label)


def describe(record: MergedRecord) -> str:
    """Describe a merged version in two sentences, and one for each significant loss of a task."""
    names = sorted(record.members)
    method = _method(record.recipe.get("method"))
    first = (
        f"Version {record.version} of line {record.line}: {counted(len(names), 'task')} "
        f"({shortlist(names)}) stitched into one model with {method}."
    )
    facts = []
    if record.mean_accuracy is not None:
        facts.append(f"scores {record.mean_accuracy:.3f} on average over its tasks")
    if record.mean_normalized is not None:
        facts.append(
            f"reaches {record.mean_normalized:.1%} of the accuracy of the finetuned models"
        )
    if idle := [task for task, result in sorted(record.results.items()) if result.has_no_gain]:
        facts.append(f"holds {len(idle)} without a gain over the base ({', '.join(idle[:8])})")
    if record.retention is not None and record.retention.ratio is not None:
        facts.append(f"keeps {record.retention.ratio:.1%} of the base's {record.retention.metric}")
    *some, last = facts or ["was not evaluated"]
    lost = "".join(f" {loss}." for loss in record.losses)
    return f"{first} It {', '.join(some)}{' and ' if some else ''}{last}.{lost}"


def _tags_of_merged(record: MergedRecord, outcome: Outcome) -> dict[str, str]:
    """The tags to search merged versions by, the same on the run and on the model version."""
    tags = {
        ROLE_TAG: outcome.role,
        "restitch.gates": record.verdict,
        "restitch.recipe": record.recipe_digest,
        "restitch.patch": record.patch,
        "restitch.members": ",".join(sorted(record.members)),
        **{f"restitch.task.{task}": str(m.version) for task, m in sorted(record.members.items())},
    }
    if flow_run := _maker(record).get("flow_run"):
        tags["restitch.prefect_run"] = str(flow_run)
    return tags


def _maker(record: MergedRecord) -> dict[str, Any]:
    return record.made_by if isinstance(record.made_by, dict) else {}


def _inputs(record: MergedRecord) -> tuple[DataProjection, ...]:
    used = [(task, result.data) for task, result in sorted(record.results.items())]
    if record.retention is not None:
        used.append((record.retention.task, record.retention.data))
    # The benchmark may also be a task of the line: the same rows are one input.
    return tuple(
        dict.fromkeys(
            DataProjection(name, data.digest[:_MAX_DIGEST], data.path, data.split)
            for name, data in used
            if data is not None
        )
    )


def _bounds(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {}
    return {f"{prefix}low": interval.low, f"{prefix}high": interval.high}


def _method(method: Any) -> str:
    if isinstance(method, dict):
        return f"{method.get('name', 'unknown')}/{method.get('version', '?')}"
    return as_text(method)
