"""The projection of a line's acts and finetuned models to MLflow: pure functions of records.

Everything here is derived from the store and can be made again. A `RunProjection` or
`VersionProjection` is the desired content, which `registry.mlflow.writer` writes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from restitch.merging.digests import canonical_json
from restitch.registry.ledger.finetuned_models import NO_GAIN, MlflowVersion, ModelVersion
from restitch.registry.ledger.outcomes import headline, merges_about, touched_merges, touched_models
from restitch.registry.ledger.records import Entry

# The tag with the digest of the object that a run or a model version shows.
DIGEST_TAG = "restitch.digest"
VERSION_TAG = "restitch.version"
STATE_TAG = "restitch.state"
REASON_TAG = "restitch.reason"
GAIN_TAG = "restitch.gain"
# A training job may set it, too: the reason to merge a model without a gain over the base.
ACCEPT_TAG = "restitch.accept_no_gain"
ROLE_TAG = "restitch.role"
# The tags of what was taken out of use, and of what has no weights any more, with the reason.
ARCHIVED_TAG = "restitch.archived"
PURGED_TAG = "restitch.purged"

MAX_PARAM = 5_900  # MLflow cuts silently at 6,000
MAX_TAG = 4_900  # and refuses longer ones
_MAX_NAME = 120  # of a run, so that its page and tables stay readable
# The tags that MLflow's pages show as name, description and "created by".
NAME_TAG, NOTE_TAG, USER_TAG = "mlflow.runName", "mlflow.note.content", "mlflow.user"
# The tag with the id of the run below which MLflow's pages show a run.
PARENT_TAG = "mlflow.parentRunId"


# A line has experiments for its merged versions (None), its acts, its finetuned models, charts of
# its champions and of rejected versions, and its studies.
Part = Literal["audit", "models", "history", "studies"] | None


@dataclass(frozen=True)
class DataProjection:
    """A data set that a run was measured on.

    Attributes:
        name: the task.
        digest: cut to the length that MLflow accepts.
        source: an absolute path or a pinned hub id.
        context: the split.
    """

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class RunProjection:
    """The complete content of a run.

    Attributes:
        digest: of the object that it shows.
        time: in milliseconds since the epoch.
        tags: tags at creation; later changes by users stay.
        current: tags that each repair sets to these values.
        step: of all metrics.
        inputs: the data sets that it was measured on.
        artifacts: contents by path.
    """

    digest: str
    time: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    current: dict[str, str] = field(default_factory=dict)
    inputs: tuple[DataProjection, ...] = ()
    artifacts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPart:
    """One of the things that a study compares, which has a run of its own below the study's.

    Attributes:
        params: any JSON values.
    """

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class VersionProjection:
    """The content of a version of a registered model, without its source.

    Attributes:
        identity: the tags that identify it; at most one version has them.
        tags: further tags, which may change.
        opening: the beginning of every description that we write; any other one is a user's.
        existing: the version that a user registered in MLflow, which becomes this one.
    """

    name: str
    identity: dict[str, str]
    tags: dict[str, str]
    description: str
    opening: str = ""
    existing: MlflowVersion | None = None


def identity(digest: str, version: int) -> dict[str, str]:
    """The tags that identify the projection of a version."""
    return {DIGEST_TAG: digest, VERSION_TAG: str(version)}


def experiment_name(line: str, part: Part = None) -> str:
    """The experiment of a part of a line."""
    return line if part is None else f"{line}.{part}"


def model_name(line: str, task: str | None = None) -> str:
    """The registered model of a line's merged versions, or of a task's finetuned models."""
    return line if task is None else f"{line}.{task}"


def project_act(entry: Entry) -> RunProjection:
    """The run of an act."""
    params = {
        "kind": entry.kind,
        "actor": entry.actor,
        "reason": entry.reason,
        "sequence": str(entry.sequence),
        "time": entry.time,
        "entry": entry.digest,
        "previous": entry.previous or "none",
    }
    for role in ("champion", "candidate"):
        if f"/{role}" in entry.after and entry.previous is not None:
            params[f"{role}.before"] = as_text(entry.before.get(f"/{role}"))
            params[f"{role}.after"] = as_text(entry.after[f"/{role}"])
    params |= {f"digest.{name}": digest for name, digest in sorted(entry.digests.items())}
    tags = {NOTE_TAG: f"{entry.kind} by {entry.actor}: {entry.reason}"}
    current = {
        NAME_TAG: shortened(f"{entry.sequence:04d} {headline(entry)}", _MAX_NAME),
        USER_TAG: entry.actor,
        "restitch.kind": entry.kind,
        "restitch.sequence": str(entry.sequence),
        "restitch.actor": entry.actor,
    }
    if models := touched_models(entry):
        current["restitch.task"] = ",".join(sorted({task for task, _ in models}))
        params["models"] = ", ".join(f"{task} {version}" for task, version in models)
    if merged := touched_merges(entry):
        params["version"] = ", ".join(map(str, merged))
    if about := merges_about(entry):
        # Commas on both sides, so that LIKE '%,1,%' finds 1 and not 12.
        current["restitch.versions"] = f",{','.join(map(str, about))},"
    return RunProjection(
        digest=entry.digest,
        time=milliseconds(entry.time),
        tags=cut(tags),
        current=cut(current),
        params=cut(params, MAX_PARAM),
        artifacts={"audit.json": entry.to_bytes()},
    )


def project_model(
    line: str, task: str, version: int, model: ModelVersion, base: str
) -> tuple[RunProjection, VersionProjection]:
    """The run and the registered version of a finetuned model."""
    ref = model.model
    named = {
        NAME_TAG: f"{task} {version}",
        NOTE_TAG: f"Finetuned model {version} of task {task}, read from {ref.uri}.",
        "restitch.task": task,
    }
    params = {
        "task": task,
        "version": str(version),
        "uri": ref.uri,
        "weights": ref.weights,
        "config": ref.config,
        "base": base,
        "size": str(ref.size),
    }
    metrics = {
        name: float(value)
        for name, value in model.facts.to_json().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    if model.facts.gain is not None:
        metrics["gain"] = model.facts.gain.difference
    metrics |= {name: result.value for name, result in model.facts.results.items()}
    run = RunProjection(
        # The same weights may be registered for two tasks, or again after they were retired.
        digest=f"{ref.weights}.{task}.{version}",
        time=milliseconds(model.registered_at),
        tags=cut(named),
        params=cut(params, MAX_PARAM),
        metrics=metrics,
        step=version,
        artifacts={"restitch/object.json": placeholder(ref.uri, ref.weights, ref.size)},
    )
    tags = {STATE_TAG: model.state, REASON_TAG: model.reason or "", "restitch.base": base}
    if model.facts.measured_on is not None:
        gain = model.facts.gain
        tags[GAIN_TAG] = "not measured" if gain is None else gain.verdict
    if NO_GAIN in model.facts.accepted:
        tags[ACCEPT_TAG] = model.facts.accepted[NO_GAIN].reason
    if model.state == "forgotten":
        tags[ARCHIVED_TAG] = model.reason or "forgotten"
    if model.facts.purged is not None:
        tags[PURGED_TAG] = str(model.facts.purged)
    if model.mask is not None and model.delta is not None:
        tags |= {"restitch.mask": model.mask, "restitch.delta": model.delta}
    shown = VersionProjection(
        name=model_name(line, task),
        identity=identity(ref.weights, version),
        tags=cut(tags),
        description=shortened(_of_state(task, version, model), MAX_TAG),
        opening=_opening(task, version),
        existing=model.mlflow,
    )
    return run, shown


def project_study(
    part: StudyPart,
    digest: str,
    by: str,
    time: int,
    *,
    parent: str | None = None,
    artifacts: Mapping[str, bytes] | None = None,
) -> RunProjection:
    """The run of a study, or of a part of one below the run `parent`."""
    tags = {NAME_TAG: part.name, USER_TAG: by}
    return RunProjection(
        digest=digest,
        time=time,
        tags=tags if parent is None else {**tags, PARENT_TAG: parent},
        params=cut({key: as_text(value) for key, value in part.params.items()}, MAX_PARAM),
        metrics=dict(part.metrics),
        artifacts=dict(artifacts or {}),
    )


def _of_state(task: str, version: int, model: ModelVersion) -> str:
    meaning = {
        "registered": "It is registered and not yet validated.",
        "waiting": "It waits for something that is missing.",
        "quarantined": "It cannot join the merged model.",
        "ready": "It is localized and takes part in merges, unless a newer version does.",
        "held": "It is localized, but kept out of the merged model.",
        "replaced": "A newer model of the task has replaced it.",
        "retired": "It is retired and takes part in no merge.",
        "forgotten": "It was registered by mistake, and is archived.",
    }
    text = f"{_opening(task, version)} {meaning[model.state]}"
    if model.facts.purged is not None:
        text += f" Its weights were purged {model.facts.purged}."
    return f"{text} Reason: {model.reason}" if model.reason else text


def _opening(task: str, version: int) -> str:
    return f"Finetuned model {version} of task {task}."


def placeholder(uri: str, digest: str, size: int) -> bytes:
    """The small file in place of a model: MLflow servers accept no address of a store."""
    return canonical_json({"uri": uri, "digest": digest, "size": size})


def as_text(value: Any) -> str:
    """The text of a param for a JSON value."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value).decode()


def shortened(text: str, limit: int) -> str:
    """A text cut to a number of characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def cut(texts: dict[str, str], limit: int = MAX_TAG) -> dict[str, str]:
    """Tags, or other texts, cut to the length that MLflow accepts."""
    return {k: shortened(v, limit) for k, v in texts.items()}


def milliseconds(time: str) -> int:
    """An ISO time in milliseconds since the epoch; 0 if it is not a time."""
    try:
        return int(datetime.fromisoformat(time).timestamp() * 1000)
    except ValueError:
        return 0
