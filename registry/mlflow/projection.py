"""What MLflow shows of a line's acts and finetuned models: pure functions from records.

Everything here is derived from the store and can be made again. `RunProjection` and `VersionProjection`
say what is to be there, `restitch.registry.mlflow.writer` sees to it.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from restitch.merging.digests import canonical_json
from restitch.registry.ledger.line_state import MlflowVersion, ModelVersion
from restitch.registry.ledger.outcomes import merges_about, touched_merges, touched_models
from restitch.registry.ledger.records import Entry

# The tag that says of which object a run or a model version is the image.
DIGEST_TAG = "restitch.digest"
VERSION_TAG = "restitch.version"
STATE_TAG = "restitch.state"
REASON_TAG = "restitch.reason"
ROLE_TAG = "restitch.role"

_MAX_PARAM = 5_900  # MLflow cuts silently at 6,000
MAX_TAG = 4_900  # and refuses longer ones
# What MLflow's own pages show as name, description and "created by".
NAME_TAG, NOTE_TAG, USER_TAG = "mlflow.runName", "mlflow.note.content", "mlflow.user"


@dataclass(frozen=True)
class DataProjection:
    """A data set that a run was measured on.

    Attributes:
        name: of its task.
        digest: as much of it as MLflow takes.
        source: an absolute path or a pinned hub id.
        context: the split.
    """

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class RunProjection:
    """One run, complete.

    Attributes:
        digest: of the object that it shows.
        time: when it happened, in milliseconds.
        tags: as it is made; what somebody changes later stays.
        current: tags that are kept as they are here.
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
class VersionProjection:
    """One version of a registered model, beside its source.

    Attributes:
        identity: the tags that make it this version; there is one with them or none.
        tags: further tags, which may change.
        opening: how the description begins whatever else it says; another one is somebody's own.
        existing: the version that somebody made in MLflow and that becomes this one.
    """

    name: str
    identity: dict[str, str]
    tags: dict[str, str]
    description: str
    opening: str = ""
    existing: MlflowVersion | None = None


def experiment_name(line: str) -> str:
    """Where the merged versions of a line are shown."""
    return line


def audit_experiment_name(line: str) -> str:
    """Where its acts are shown."""
    return f"{line}.audit"


def models_experiment_name(line: str) -> str:
    """Where the finetuned models that were registered are shown."""
    return f"{line}.models"


def history_experiment_name(line: str) -> str:
    """Where one run has the metrics of all merged versions, so that charts show the line."""
    return f"{line}.history"


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
    models = touched_models(entry)
    tags = {
        NAME_TAG: f"{entry.sequence:04d} {entry.kind}",
        NOTE_TAG: f"{entry.kind} by {entry.actor}: {entry.reason}",
    }
    searched = {
        USER_TAG: entry.actor,
        "restitch.kind": entry.kind,
        "restitch.sequence": str(entry.sequence),
        "restitch.actor": entry.actor,
    }
    if models:
        searched["restitch.task"] = ",".join(sorted({task for task, _ in models}))
        params["models"] = ", ".join(f"{task} {version}" for task, version in models)
    merged = touched_merges(entry)
    if merged:
        params["version"] = ", ".join(map(str, merged))
    about = merges_about(entry)
    if about:  # with commas around, so that LIKE '%,1,%' finds 1 and not 12
        searched["restitch.versions"] = f",{','.join(map(str, about))},"
    return RunProjection(
        digest=entry.digest,
        time=milliseconds(entry.time),
        tags=cut_tags(tags),
        current=cut_tags(searched),
        params=cut_params(params),
        artifacts={"audit.json": entry.to_bytes()},
    )


def project_model(
    line: str, task: str, version: int, model: ModelVersion, base: str
) -> tuple[RunProjection, VersionProjection]:
    """The run and the registered version of a finetuned model."""
    ref = model.model
    digest = ref.weights
    metrics = {
        name: float(value)
        for name, value in model.facts.to_json().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    run = RunProjection(
        # The same weights may be registered for two tasks, or again after a retirement.
        digest=f"{digest}.{task}.{version}",
        time=milliseconds(model.registered_at),
        tags=cut_tags(
            {
                NAME_TAG: f"{task} {version}",
                NOTE_TAG: f"Finetuned model {version} of task {task}, read from {ref.uri}.",
                "restitch.task": task,
            }
        ),
        params=cut_params(
            {
                "task": task,
                "version": str(version),
                "uri": ref.uri,
                "weights": ref.weights,
                "config": ref.config,
                "base": base,
                "size": str(ref.size),
            }
        ),
        metrics=metrics,
        step=version,
        artifacts={"restitch/object.json": placeholder(ref.uri, ref.weights, ref.size)},
    )
    tags = {STATE_TAG: model.state, REASON_TAG: model.reason or "", "restitch.base": base}
    if model.mask is not None and model.delta is not None:
        tags |= {"restitch.mask": model.mask, "restitch.delta": model.delta}
    shown = VersionProjection(
        name=model_name(line, task),
        identity={DIGEST_TAG: digest, VERSION_TAG: str(version)},
        tags=cut_tags(tags),
        description=shortened(_of_state(task, version, model), MAX_TAG),
        opening=_opening(task, version),
        existing=model.mlflow,
    )
    return run, shown


def _of_state(task: str, version: int, model: ModelVersion) -> str:
    meaning = {
        "registered": "It was registered and not yet looked at.",
        "waiting": "It waits for what it lacks.",
        "quarantined": "It cannot join the merged model.",
        "ready": "It is localized and takes part in merges unless a newer one does.",
        "held": "It is localized and kept out of the merged model by a gate.",
        "replaced": "A newer model of the task took its place.",
        "retired": "It was retired and takes part in no merge.",
    }
    text = f"{_opening(task, version)} {meaning[model.state]}"
    return f"{text} Reason: {model.reason}" if model.reason else text


def _opening(task: str, version: int) -> str:
    return f"Finetuned model {version} of task {task}."


def placeholder(uri: str, digest: str, size: int) -> bytes:
    """What lies in place of a model: MLflow's servers take no address of a store."""
    return canonical_json({"uri": uri, "digest": digest, "size": size})


def as_text(value: Any) -> str:
    """A param's text for a JSON value."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value).decode()


def cut_params(params: dict[str, str]) -> dict[str, str]:
    """Params that MLflow takes whole."""
    return {k: shortened(v, _MAX_PARAM) for k, v in params.items()}


def shortened(text: str, limit: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def cut_tags(tags: dict[str, str]) -> dict[str, str]:
    """Tags that MLflow takes."""
    return {k: shortened(v, MAX_TAG) for k, v in tags.items()}


def milliseconds(time: str) -> int:
    """MLflow's time for ours; 0 where there is none."""
    try:
        return int(datetime.fromisoformat(time).timestamp() * 1000)
    except ValueError:
        return 0
