"""The compressed store of specialists: one multi-task vector and a bit mask per task.

    a version's members --> whole task vectors --> thresholds, tuned where that is asked for
        --> shared patch and masks --> evaluate each on its own task --> a table, kept in MLflow

What `restitch experts` makes is kept with the version: `keys/specialists/<recipe of the version>`
names the list of the parts, and `restitch gc` leaves all of them alone, for the finetuned models
may be gone by the time somebody exports one. A version has one set; another one takes its place
only where that is asked for.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from restitch.flows.promotion.candidates import measure_member
from restitch.flows.promotion.snapshot import line_with_one_method
from restitch.flows.promotion.versions import find_version, members_of
from restitch.flows.promotion.what_if import prepare
from restitch.flows.research.studies import as_csv, log_study, write_study
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.methods.registry import Method, get_method, method_names
from restitch.registry.ledger.line_state import Member
from restitch.registry.ledger.records import MergedRecord, TaskResult, mean_of
from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.store.deletion_notice import check_there
from restitch.tasks.merge import make_recipe
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.plots import experts_plot
from restitch.tasks.research.experts import ExpertsRef, make_experts, read_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, actor, made_by, workspace


@flow("experts", "{line} {version}")
def experts(
    line: str,
    version: str = "champion",
    method: str = "tall",
    tuned: bool = False,
    replace: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Make, keep and measure a specialist for each member of a merged version.

    Args:
        line: its name.
        version: a number, `champion` or `candidate`.
        method: one of kind `experts`.
        tuned: choose each task's threshold on its validation rows.
        replace: let them take the place of others that the version has.
        out: a folder for the table as JSON and CSV, and the plot.

    Raises:
        BadInput: there is no such version or method, it has other specialists, or a finetuned
            model is gone.
    """
    space = workspace()
    ledger = space.ledger(line)
    line_state = ledger.state()
    record = ledger.merged(find_version(line_state, version))
    chosen = _experts_method(method)
    if not record.members:
        raise BadInput(
            f"version {record.version} of line {line} has no members",
            expected="a version that holds finetuned models",
            hint=f"see `restitch history {line} --versions`",
        )
    line_then = line_with_one_method(line_state, record)
    ready = prepare(line_then, members_of(line_state, record), chosen, tuned=tuned)
    say(f"{line} {record.version}: {method}")
    made = make_experts(ready.line, make_recipe(ready.line, ready.members))
    _keep(record, made, replace, space)
    found = {
        "line": line,
        "version": record.version,
        "method": method,
        "settings": made.settings,
        "tuned": None if ready.choice is None else ready.choice.as_dict(),
        "members": {task: member.version for task, member in record.members.items()},
        "manifest": made.manifest,
        "seconds": made.seconds,
        **measure_experts(ready.line, ready.members, made),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": actor(),
    }
    _show(found, record.results, out)
    return found


def _rows(
    found: Mapping[str, Any], merged: Mapping[str, TaskResult]
) -> Iterator[dict[str, str | float | None]]:
    """The table of specialists: what each reaches, beside the merged version, and its bytes."""
    for task, one in found["results"].items():
        span = one["interval"] or {}
        yield {
            "task": task,
            "accuracy": one["expert"],
            "low": span.get("low"),
            "high": span.get("high"),
            "normalized": one["normalized"],
            "base": one["base"],
            "merged": merged[task].merged if task in merged else None,
            "finetuned": one["finetuned"],
            "bytes": found["bytes"]["tasks"][task],
        }


def _show(found: Mapping[str, Any], merged: Mapping[str, TaskResult], out: str | None) -> None:
    """Put the table where studies are put: a folder, and a run in MLflow."""
    rows = list(_rows(found, merged))
    artifacts = {"experts.json": canonical_json(found), "experts.csv": as_csv(rows).encode()}
    with drawing("experts"):
        plot = experts_plot(found["results"], {t: r.to_json() for t, r in merged.items()})
        if plot is not None:
            artifacts["experts.png"] = to_png(plot)
    write_study(out, artifacts)
    room = found["bytes"]
    params = {
        name: found[name]
        for name in ("version", "method", "settings", "tuned", "members", "recipe", "manifest")
    }
    metrics = {
        "mean/accuracy": found["mean_accuracy"],
        "mean/normalized": found["mean_normalized"],
        "bytes/all": room["all"],
        "bytes/shared": room["shared"],
        "bytes/models": room["models"],
        "bytes/share_of_models": room["all"] / room["models"] if room["models"] else None,
        "seconds": found["seconds"],
    }
    for row in rows:
        metrics |= {f"task/{row['task']}/{key}": row[key] for key in row if key != "task"}
    known = {name: float(value) for name, value in metrics.items() if value is not None}
    name = f"specialists of {found['line']} {found['version']} by {found['method']}"
    log_study(found, name, params, known, artifacts)


def measure_experts(line: LineRef, members: tuple[Member, ...], made: ExpertsRef) -> dict[str, Any]:
    """What each specialist reaches on its task, and what all of them take in the store.

    Args:
        line: with the base.
        members: with their whole task vectors.
        made: their specialists.
    """
    results: dict[str, TaskResult] = {}
    for member in members:
        weights = WeightsRef("expert", made.tasks[member.task].blob)
        results[member.task] = measure_member(line, member, weights)
    models = sum(member.model.model.size for member in members)
    return {
        "results": {task: _of_expert(result) for task, result in results.items()},
        "mean_accuracy": mean_of(result.merged for result in results.values()),
        "mean_normalized": mean_of(result.normalized for result in results.values()),
        "recipe": made.recipe,
        "bytes": {**_room(made), "base": line.base.size, "models": models},
    }


def _room(made: ExpertsRef) -> dict[str, Any]:
    """Bytes of specialists, by part."""
    return {
        "shared": 0 if made.shared is None else made.shared.bytes,
        "tasks": {task: part.bytes for task, part in made.tasks.items()},
        "all": made.bytes,
    }


def kept_experts(record: MergedRecord, space: Workspace) -> ExpertsRef | None:
    """The specialists that a version has, if any were made."""
    key = space.objects.lookup(SPECIALISTS, record.recipe_digest)
    return None if key is None else read_experts(key.blob, space)


def _experts_method(name: str) -> Method:
    method = get_method(name)
    if method.kind != "experts":
        known = [each for each in method_names() if get_method(each).kind == "experts"]
        raise BadInput(
            f"the method {name} gives one model for all tasks",
            expected=" or ".join(known),
            found=name,
            hint="leave --method out, or make it the line's method",
        )
    return method


def _keep(record: MergedRecord, made: ExpertsRef, replace: bool, space: Workspace) -> None:
    """Name the specialists as those of the version.

    Raises:
        BadInput: it has others.
    """
    there = space.objects.lookup(SPECIALISTS, record.recipe_digest)
    if there is not None and there.blob != made.manifest:
        if not replace:
            other = read_experts(there.blob, space)
            raise BadInput(
                f"version {record.version} of line {record.line} has other specialists",
                expected=f"{made.method[0]} with {made.settings}",
                found=f"{other.method[0]} with {other.settings}",
                hint="add --replace to keep these instead",
            )
        space.objects.store.remove(f"keys/{SPECIALISTS}/{record.recipe_digest}")
    facts = facts_of(record, made, datetime.now(UTC).isoformat(timespec="microseconds"))
    space.objects.publish(SPECIALISTS, record.recipe_digest, made.manifest, made_by(), facts=facts)
    names = {f"blobs/{blob}" for blob in (made.manifest, *(part.blob for part in made.parts))}
    try:
        check_there(space.objects.store, names)  # that nothing named before
    except Unavailable:
        space.objects.store.remove(f"keys/{SPECIALISTS}/{record.recipe_digest}")
        raise


def facts_of(record: MergedRecord, made: ExpertsRef, at: str | None) -> dict[str, Any]:
    """What the key of a version's specialists says of them; see `restitch.registry.maintenance.specialists`."""
    return {
        "line": record.line,
        "version": record.version,
        "method": made.method[0],
        "method_version": made.method[1],
        "settings": made.settings,
        "bytes": _room(made),
        "made_at": at,
    }


def _of_expert(result: TaskResult) -> dict[str, Any]:
    """A result in which what was measured of the specialist is called by its name."""
    values = result.to_json()
    values["expert"] = values.pop("merged")
    values["evaluations"] = {
        "expert" if name == "merged" else name: blob for name, blob in values["evaluations"].items()
    }
    return values
