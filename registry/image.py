"""What MLflow shows of a line: pure functions from records to params, metrics and texts.

Names of metrics are those of the design and never change: charts over versions hang on
them. Everything here is derived from the store and can be made again.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from merging.digests import canonical_json
from registry.head import MlflowVersion, ModelVersion
from registry.history import Entry, MergedRecord

# The tag that says of which object a run or a model version is the image.
DIGEST_TAG = "restitch.digest"
VERSION_TAG = "restitch.version"
STATE_TAG = "restitch.state"
REASON_TAG = "restitch.reason"

_MAX_PARAM = 5_900  # MLflow cuts silently at 6,000
_MAX_TAG = 4_900  # and refuses longer ones
_NAME_TAG, _NOTE_TAG = "mlflow.runName", "mlflow.note.content"


@dataclass(frozen=True)
class RunImage:
    """One run, complete.

    Attributes:
        digest: of the object that it shows.
        time: when it happened, in milliseconds.
        step: of all metrics.
        artifacts: contents by path.
    """

    digest: str
    time: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    artifacts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionImage:
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


def model_name(line: str, task: str | None = None) -> str:
    """The registered model of a line's merged versions, or of a task's finetuned models."""
    return line if task is None else f"{line}.{task}"


def of_act(entry: Entry) -> RunImage:
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
            params[f"{role}.before"] = _text(entry.before.get(f"/{role}"))
            params[f"{role}.after"] = _text(entry.after[f"/{role}"])
    params |= {f"digest.{name}": digest for name, digest in sorted(entry.digests.items())}
    models = touched_models(entry)
    tags = {
        _NAME_TAG: f"{entry.sequence:04d} {entry.kind}",
        _NOTE_TAG: f"{entry.kind} by {entry.actor}: {entry.reason}",
        "restitch.kind": entry.kind,
        "restitch.sequence": str(entry.sequence),
        "restitch.actor": entry.actor,
    }
    if models:
        tags["restitch.task"] = ",".join(sorted({task for task, _ in models}))
        params["models"] = ", ".join(f"{task} {version}" for task, version in models)
    merged = touched_merges(entry)
    if merged:
        params["version"] = ", ".join(map(str, merged))
    return RunImage(
        digest=entry.digest,
        time=_milliseconds(entry.time),
        tags=_cut_tags(tags),
        params=_cut(params),
        artifacts={"audit.json": entry.to_bytes()},
    )


def of_model(
    line: str, task: str, version: int, model: ModelVersion, base: str
) -> tuple[RunImage, VersionImage]:
    """The run and the registered version of a finetuned model."""
    ref = model.model
    digest = ref.weights
    metrics = {
        name: float(value)
        for name, value in model.facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    run = RunImage(
        # The same weights may be registered for two tasks, or again after a retirement.
        digest=f"{digest}.{task}.{version}",
        time=_milliseconds(model.registered_at),
        tags=_cut_tags(
            {
                _NAME_TAG: f"{task} {version}",
                _NOTE_TAG: f"Finetuned model {version} of task {task}, read from {ref.uri}.",
                "restitch.task": task,
            }
        ),
        params=_cut(
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
        artifacts={"restitch/object.json": _object(ref.uri, ref.weights, ref.size)},
    )
    tags = {STATE_TAG: model.state, REASON_TAG: model.reason or "", "restitch.base": base}
    if model.mask is not None and model.delta is not None:
        tags |= {"restitch.mask": model.mask, "restitch.delta": model.delta}
    shown = VersionImage(
        name=model_name(line, task),
        identity={DIGEST_TAG: digest, VERSION_TAG: str(version)},
        tags=_cut_tags(tags),
        description=_of_state(task, version, model),
        opening=_opening(task, version),
        existing=model.mlflow,
    )
    return run, shown


def of_merged(record: MergedRecord, files: dict[str, bytes]) -> tuple[RunImage, VersionImage]:
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
        params |= {f"method.{k}": _text(v) for k, v in sorted(settings.items())}
    for name, version in sorted(record.software.items()):
        params[f"software.{name}"] = version
    description = describe(record)
    run = RunImage(
        digest=digest,
        time=_milliseconds(record.created_at),
        tags=_cut_tags(
            {
                _NAME_TAG: f"{record.line} {record.version}",
                _NOTE_TAG: description,
                VERSION_TAG: str(record.version),
                "restitch.recipe": record.recipe_digest,
                "restitch.gates": "passed" if record.passed else "failed",
            }
        ),
        params=_cut(params),
        metrics=metrics_of(record),
        step=record.version,
        artifacts={
            "restitch/object.json": _object(
                f"blobs/{record.patch}", record.patch, record.patch_bytes
            ),
            "record.json": canonical_json(record.to_json()),
            "recipe.json": canonical_json(record.recipe),
            **files,
        },
    )
    shown = VersionImage(
        name=model_name(record.line),
        identity={DIGEST_TAG: digest, VERSION_TAG: str(record.version)},
        tags=_cut_tags({"restitch.recipe": record.recipe_digest, "restitch.patch": record.patch}),
        description=description,
    )
    return run, shown


def metrics_of(record: MergedRecord) -> dict[str, float]:
    """The measurements of a merged version under the names of the design."""
    found: dict[str, float | None] = {
        "mean/accuracy": record.mean_accuracy,
        "mean/normalized": record.mean_normalized,
        "patch/bytes": float(record.patch_bytes),
        "patch/kept": float(record.kept),
        "members": float(len(record.members)),
    }
    if record.retention is not None:
        found |= {
            f"retention/{name}": getattr(record.retention, name)
            for name in ("top1", "top5", "base_top1", "base_top5", "ratio")
        }
    for task, result in record.results.items():
        found |= {
            f"task/{task}/{result.metric}": result.merged,
            f"task/{task}/normalized": result.normalized,
            f"task/{task}/base": result.base,
            f"task/{task}/finetuned": result.finetuned,
            f"task/{task}/grafted": result.grafted,
        }
    found |= {f"seconds/{step}": seconds for step, seconds in record.timings.items()}
    return {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}


def describe(record: MergedRecord) -> str:
    """Two sentences that say what a merged version is."""
    names = sorted(record.members)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    method = _method(record.recipe.get("method"))
    first = (
        f"Version {record.version} of line {record.line}: {len(names)} "
        f"task{'' if len(names) == 1 else 's'} ({shown}) stitched into one model with {method}."
    )
    facts = []
    if record.mean_accuracy is not None:
        facts.append(f"scores {record.mean_accuracy:.3f} on average over its tasks")
    if record.mean_normalized is not None:
        facts.append(f"reaches {record.mean_normalized:.1%} of the finetuned models")
    if record.retention is not None:
        facts.append(f"keeps {record.retention.ratio:.1%} of the base's accuracy")
    if not facts:
        return f"{first} It was not evaluated."
    *some, last = facts
    return f"{first} It {', '.join(some)}{' and ' if some else ''}{last}."


def touched_models(entry: Entry) -> tuple[tuple[str, int], ...]:
    """(task, version) of the finetuned models that an act was about."""
    found: set[tuple[str, int]] = set()
    for changes in (entry.before, entry.after):
        for pointer, value in changes.items():
            parts = pointer.split("/")[1:]
            if parts[0] != "tasks" or len(parts) < 2:
                continue
            if len(parts) > 3 and parts[2] == "versions":
                found.add((parts[1], int(parts[3])))
            elif len(parts) == 2 and isinstance(value, dict):
                versions = value.get("versions")
                if isinstance(versions, dict):
                    found |= {(parts[1], int(number)) for number in versions}
    return tuple(sorted(found))


def touched_merges(entry: Entry) -> tuple[int, ...]:
    """The merged versions that an act made."""
    pointers = (pointer.split("/")[1:] for pointer in entry.after)
    return tuple(
        sorted(int(parts[1]) for parts in pointers if parts[0] == "versions" and len(parts) == 2)
    )


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


def _object(uri: str, digest: str, size: int) -> bytes:
    return canonical_json({"uri": uri, "digest": digest, "size": size})


def _method(method: Any) -> str:
    if isinstance(method, dict):
        return f"{method.get('name', 'unknown')}/{method.get('version', '?')}"
    return _text(method)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value).decode()


def _cut(values: dict[str, str], limit: int = _MAX_PARAM) -> dict[str, str]:
    return {k: v if len(v) <= limit else f"{v[: limit - 3]}..." for k, v in values.items()}


def _cut_tags(tags: dict[str, str]) -> dict[str, str]:
    return _cut(tags, _MAX_TAG)


def _milliseconds(time: str) -> int:
    try:
        return int(datetime.fromisoformat(time).timestamp() * 1000)
    except ValueError:
        return 0
