"""The compressed store of specialists: one multi-task vector and a bit mask per task.

    a version's members --> whole task vectors --> thresholds, tuned where that is asked for
        --> shared patch and masks --> evaluate each on its own task

What `restitch experts` makes is kept with the version: `keys/specialists/<recipe of the version>`
names the list of the parts, and `restitch gc` leaves all of them alone, for the finetuned models
may be gone by the time somebody exports one. A version has one set; another one takes its place
only where that is asked for.
"""

from typing import Any

from flows.candidates import measure_member
from flows.snapshot import line_with_one_method
from flows.trials import prepare
from flows.versions import find_version, members_of
from merging.errors import BadInput, Unavailable
from merging.methods import Method, get_method, method_names
from registry.announcement import check_there
from registry.head import Member
from registry.history import MergedRecord, TaskResult
from registry.references import SPECIALISTS
from tasks.engine import flow
from tasks.experts import ExpertsRef, make_experts, read_experts
from tasks.merge import make_recipe
from tasks.refs import LineRef, WeightsRef
from tasks.reporting import say
from tasks.workspace import Workspace, made_by, workspace


@flow("experts", "{line} {version}")
def experts(
    line: str,
    version: str = "champion",
    method: str = "tall",
    tuned: bool = False,
    replace: bool = False,
) -> dict[str, Any]:
    """Make, keep and measure a specialist for each member of a merged version.

    Args:
        line: its name.
        version: a number, `champion` or `candidate`.
        method: one of kind `experts`.
        tuned: choose each task's threshold on its validation rows.
        replace: let them take the place of others that the version has.

    Raises:
        BadInput: there is no such version or method, it has other specialists, or a finetuned
            model is gone.
    """
    space = workspace()
    ledger = space.ledger(line)
    head = ledger.head()
    record = ledger.merged(find_version(head, version))
    chosen = _experts_method(method)
    if not record.members:
        raise BadInput(
            f"version {record.version} of line {line} has no members",
            expected="a version that holds finetuned models",
            hint=f"see `restitch history {line} --versions`",
        )
    line_then = line_with_one_method(head, record)
    ready = prepare(line_then, members_of(head, record), chosen, tuned=tuned)
    say(f"{line} {record.version}: {method}")
    made = make_experts(ready.line, make_recipe(ready.line, ready.members))
    _keep(record, made, replace, space)
    return {
        "line": line,
        "version": record.version,
        "method": method,
        "settings": made.settings,
        "tuned": None if ready.choice is None else ready.choice.as_dict(),
        "members": {task: member.version for task, member in record.members.items()},
        "manifest": made.manifest,
        "seconds": made.seconds,
        **measure_experts(ready.line, ready.members, made),
    }


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
    reached = [r.merged for r in results.values() if r.merged is not None]
    normalized = [r.normalized for r in results.values() if r.normalized is not None]
    models = sum(member.model.model.size for member in members)
    return {
        "results": {task: _of_expert(result) for task, result in results.items()},
        "mean_accuracy": sum(reached) / len(reached) if reached else None,
        "mean_normalized": sum(normalized) / len(normalized) if normalized else None,
        "recipe": made.recipe,
        "bytes": {
            "shared": 0 if made.shared is None else made.shared.bytes,
            "tasks": {task: part.bytes for task, part in made.tasks.items()},
            "all": made.bytes,
            "base": line.base.size,
            "models": models,
        },
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
    facts = {
        "line": record.line,
        "version": record.version,
        "method": made.method[0],
        "settings": made.settings,
    }
    space.objects.publish(SPECIALISTS, record.recipe_digest, made.manifest, made_by(), facts=facts)
    names = {f"blobs/{blob}" for blob in (made.manifest, *(part.blob for part in made.parts))}
    try:
        check_there(space.objects.store, names)  # that nothing named before
    except Unavailable:
        space.objects.store.remove(f"keys/{SPECIALISTS}/{record.recipe_digest}")
        raise


def _of_expert(result: TaskResult) -> dict[str, Any]:
    """A result in which what was measured of the specialist is called by its name."""
    values = result.to_json()
    values["expert"] = values.pop("merged")
    values["evaluations"] = {
        "expert" if name == "merged" else name: blob for name, blob in values["evaluations"].items()
    }
    return values
