"""Make a compressed set of specialists: one shared patch, and a bit mask per task.

    a version's members --> whole task vectors --> thresholds (tuned on request)
        --> shared patch and masks --> evaluate each specialist on its task --> table in MLflow

A specialist is a model for one task; `restitch experts` makes one for each member of a merged
version. The key `keys/specialists/<recipe of the version>` names the list of the set's parts.
`restitch gc` removes none of them, because an export may need them after the finetuned models are
gone. A version has one set; `replace` puts another in its place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from restitch.flows.promotion.candidates import measure_member
from restitch.flows.promotion.snapshot import line_with_one_method
from restitch.flows.promotion.versions import members_of, open_version
from restitch.flows.promotion.what_if import prepare
from restitch.flows.research.study_output import StudyOutcome, as_csv, publish_study
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.methods.registry import Method, get_method, method_names
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import MergedRecord, TaskResult, mean_of
from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.specs.metric import mean_share
from restitch.registry.store.deletion_notice import check_not_deleted
from restitch.tasks.merge import make_recipe
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.plots import experts_plot
from restitch.tasks.research.experts import ExpertsRef, make_experts, read_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace


@dataclass(frozen=True)
class SpecialistBytes:
    """The sizes of the shared part, each task's part, the whole set, the base and the models."""

    shared: int
    tasks: dict[str, int]
    all: int
    base: int
    models: int


@dataclass(frozen=True, kw_only=True)
class SpecialistMeasurements:
    """The accuracy and the size of a set of specialists.

    Attributes:
        results: by task; the value of the specialist is called `expert`.
        recipe: the digest of the set's inputs.
    """

    results: dict[str, dict[str, Any]]
    mean_accuracy: float | None
    mean_normalized: float | None
    recipe: str
    bytes: SpecialistBytes


@dataclass(frozen=True, kw_only=True)
class SpecialistSet(SpecialistMeasurements, StudyOutcome):
    """The specialists of a merged version.

    Attributes:
        tuned: the outcome of tuning; None without tuning.
        manifest: the digest of the list of the parts.
        seconds: the time to make them; None if they were in the store.
    """

    version: int
    method: str
    settings: dict[str, Any]
    tuned: dict[str, Any] | None
    manifest: str
    seconds: float | None


@flow("experts", "{line} {version}")
def experts(
    line: str,
    version: str = "champion",
    method: str = "tall",
    tuned: bool = False,
    replace: bool = False,
    out: str | None = None,
) -> SpecialistSet:
    """Make, store and measure a specialist for each member of a merged version.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        method: a method of kind `experts`.
        tuned: choose each task's threshold on its validation rows.
        replace: replace another set that the version has.
        out: a folder for the table as JSON and CSV, and the plot.

    Raises:
        BadInput: there is no such version or method, the version has another set, or a finetuned
            model is gone.
    """
    _, line_state, record = open_version(line, version)
    chosen = _specialist_method(method)
    if not record.members:
        raise BadInput(
            f"version {record.version} of line {line} has no members",
            expected="a version that holds finetuned models",
            hint=f"see `restitch history {line} --versions`",
        )
    old_line = line_with_one_method(line_state, record)
    ready = prepare(old_line, members_of(line_state, record), chosen, tuned=tuned)
    say(f"{line} {record.version}: {method}")
    made = make_experts(ready.line, make_recipe(ready.line, ready.members))
    _store_with(record, made, replace, workspace())
    outcome = SpecialistSet(
        line=line,
        version=record.version,
        method=method,
        settings=made.settings,
        tuned=None if ready.choice is None else asdict(ready.choice),
        members={task: member.version for task, member in record.members.items()},
        manifest=made.manifest,
        seconds=made.seconds,
        **vars(measure_specialists(ready.line, ready.members, made)),
    )
    _publish(outcome, record.results, out)
    return outcome


def _publish(outcome: SpecialistSet, merged: Mapping[str, TaskResult], out: str | None) -> None:
    rows = list(_rows(outcome, merged))
    artifacts = {"experts.csv": as_csv(rows).encode()}
    with drawing("experts"):
        plot = experts_plot(outcome.results, {t: r.to_json() for t, r in merged.items()})
        if plot is not None:
            artifacts["experts.png"] = to_png(plot)
    size = outcome.bytes
    metrics: dict[str, str | float | None] = {
        "mean/accuracy": outcome.mean_accuracy,
        "mean/normalized": outcome.mean_normalized,
        "bytes/all": size.all,
        "bytes/shared": size.shared,
        "bytes/models": size.models,
        "bytes/share_of_models": size.all / size.models if size.models else None,
        "seconds": outcome.seconds,
    }
    for row in rows:
        metrics |= {f"task/{row['task']}/{key}": row[key] for key in row if key != "task"}
    params = ("version", "method", "settings", "tuned", "members", "recipe", "manifest")
    publish_study(
        outcome,
        f"specialists of {outcome.line} {outcome.version} by {outcome.method}",
        out,
        name="experts",
        params={name: getattr(outcome, name) for name in params},
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        artifacts=artifacts,
    )


def _rows(
    outcome: SpecialistSet, merged: Mapping[str, TaskResult]
) -> Iterator[dict[str, str | float | None]]:
    """The table: each specialist's accuracy next to the merged version's, and its bytes."""
    for task, result in outcome.results.items():
        interval = result["interval"] or {}
        yield {
            "task": task,
            "accuracy": result["expert"],
            "low": interval.get("low"),
            "high": interval.get("high"),
            "normalized": result["normalized"],
            "base": result["base"],
            "merged": merged[task].merged if task in merged else None,
            "finetuned": result["finetuned"],
            "bytes": outcome.bytes.tasks[task],
        }


def measure_specialists(
    line: LineRef, members: tuple[Member, ...], made: ExpertsRef
) -> SpecialistMeasurements:
    """Measure the accuracy of each member's specialist, and the sizes of the set."""
    results = {
        m.task: measure_member(line, m, WeightsRef("expert", made.tasks[m.task].blob))
        for m in members
    }
    models = sum(member.model.model.size for member in members)
    return SpecialistMeasurements(
        results={task: _specialist_result(result) for task, result in results.items()},
        mean_accuracy=mean_share((result.metric, result.merged) for result in results.values()),
        mean_normalized=mean_of(result.normalized for result in results.values()),
        recipe=made.recipe,
        bytes=SpecialistBytes(**_part_bytes(made), base=line.base.size, models=models),
    )


def _part_bytes(made: ExpertsRef) -> dict[str, Any]:
    return {
        "shared": 0 if made.shared is None else made.shared.bytes,
        "tasks": {task: part.bytes for task, part in made.tasks.items()},
        "all": made.bytes,
    }


def specialists_of(record: MergedRecord, space: Workspace) -> ExpertsRef | None:
    """The specialists that are stored with a version, if there are any."""
    key = space.objects.lookup(SPECIALISTS, record.recipe_digest)
    return None if key is None else read_experts(key.blob, space)


def _specialist_method(name: str) -> Method:
    method = get_method(name)
    if method.kind != "experts":
        known = [each for each in method_names() if get_method(each).kind == "experts"]
        raise BadInput(
            f"the method {name} gives one model for all tasks, and no specialists",
            expected=" or ".join(known),
            found=name,
            hint="leave --method out, or make it the line's method",
        )
    return method


def _store_with(record: MergedRecord, made: ExpertsRef, replace: bool, space: Workspace) -> None:
    """Name a set of specialists as that of a version.

    Raises:
        BadInput: the version has another set.
    """
    existing = space.objects.lookup(SPECIALISTS, record.recipe_digest)
    if existing is not None and existing.blob != made.manifest:
        if not replace:
            other = read_experts(existing.blob, space)
            raise BadInput(
                f"version {record.version} of line {record.line} has other specialists",
                expected=f"{made.method[0]} with {made.settings}",
                found=f"{other.method[0]} with {other.settings}",
                hint="add --replace to use the new ones instead",
            )
        space.objects.store.remove(f"keys/{SPECIALISTS}/{record.recipe_digest}")
    facts = key_facts(record, made, datetime.now(UTC).isoformat(timespec="microseconds"))
    space.objects.publish(SPECIALISTS, record.recipe_digest, made.manifest, made_by(), facts=facts)
    names = {f"blobs/{blob}" for blob in (made.manifest, *(part.blob for part in made.parts))}
    try:
        # `restitch gc` may have removed parts that nothing named before.
        check_not_deleted(space.objects.store, names)
    except Unavailable:
        space.objects.store.remove(f"keys/{SPECIALISTS}/{record.recipe_digest}")
        raise


def key_facts(record: MergedRecord, made: ExpertsRef, at: str | None) -> dict[str, Any]:
    """The facts in the key of a version's specialists (read by `maintenance.specialists`)."""
    return {
        "line": record.line,
        "version": record.version,
        "method": made.method[0],
        "method_version": made.method[1],
        "settings": made.settings,
        "bytes": _part_bytes(made),
        "made_at": at,
    }


def _specialist_result(result: TaskResult) -> dict[str, Any]:
    """A task's result, with the specialist's value under `expert` and not under `merged`."""
    values = result.to_json()
    values["expert"] = values.pop("merged")
    values["evaluations"] = {
        "expert" if name == "merged" else name: blob for name, blob in values["evaluations"].items()
    }
    return values
