"""The values of `status`, from the store alone: no server, MLflow or torch is needed."""

from typing import Any

from restitch.flows.promotion.lost_skill import needed_tensors
from restitch.registry.ledger.finetuned_models import UNREAD, MemberFacts, ModelVersion
from restitch.registry.ledger.ledger import Ledger, lines_in_use
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import shortfall, unexpected
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.maintenance.specialists import stored_specialists
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.workspace import workspace


def status(line: str | None) -> dict[str, Any]:
    """The state of one line, or of all, as plain JSON values."""
    space = workspace(to_write=False)
    states = lines_in_use(space.objects) if line is None else [space.ledger(line).state()]
    return {
        "home": str(space.home.root),
        "lines": [_line_status(each, space.objects) for each in states],
    }


def _line_status(line_state: LineState, objects: ObjectStore) -> dict[str, Any]:
    spec, number = line_state.spec, line_state.champion
    champion = None if number is None else Ledger(objects, spec.line).merged(number)
    measured = None if champion is None else champion.retention
    retention = {} if measured is None else measured.to_json()
    recipe = "" if champion is None else champion.recipe_digest
    tasks = sorted(line_state.tasks.items(), key=lambda item: item[0].encode())
    return {
        "line": spec.line,
        "base": line_state.base.uri,
        "family": spec.family,
        "method": spec.method.to_json(),
        "localize": spec.localize.to_json(),
        "gates": spec.gates.to_json(),
        "champion": line_state.champion,
        "candidate": line_state.candidate,
        "pinned": line_state.pinned,
        "paused": None if line_state.paused is None else line_state.paused.to_json(),
        "schedule": None if spec.schedule is None else spec.schedule.to_json(),
        "mean_normalized": None if champion is None else champion.mean_normalized,
        "retention": retention.get("ratio"),
        "retention_interval": retention.get("ratio_interval"),
        "specialists": stored_specialists(objects, [recipe]).get(recipe),
        "without_models": [
            name for name, task in tasks if task.declared and (task.forgotten or not task.versions)
        ],
        "models": [
            _model_status(name, version, model, champion)
            for name, task in tasks
            for version, model in sorted(task.versions.items())
            if model.state != "forgotten"
        ],
    }


def _model_status(
    task: str, version: int, model: ModelVersion, champion: MergedRecord | None
) -> dict[str, Any]:
    member = None if champion is None else champion.members.get(task)
    inside = member is not None and member.version == version
    result = champion.results.get(task) if inside and champion is not None else None
    facts: MemberFacts = model.facts
    newer = None
    if member is not None and inside and member.mask != model.mask:
        # The accuracy of the version in use belongs to the mask in it.
        facts, newer = member.facts, model.facts
    return {
        "task": task,
        "version": version,
        "state": model.state,
        "in_champion": inside,
        "source": model.model.uri,
        "weights": None if model.model.weights == UNREAD else model.model.weights,
        "registered_at": model.registered_at,
        "reason": model.reason,
        "measured": model.facts.measured_on is not None,
        "gain": None if model.facts.gain is None else model.facts.gain.to_json(),
        "expected": model.facts.expected,
        "unexpected": unexpected(model.facts.expected, model.facts.results.get("finetuned")),
        "accepted": {check: one.to_json() for check, one in model.facts.accepted.items()},
        "shortfall": shortfall(facts.recovery),
        "needed_tensors": needed_tensors(model.facts),
        "localizer": facts.localizer,
        "density": facts.density,
        "delta_bytes": facts.delta_bytes,
        "newer_mask": newer
        and {
            "localizer": newer.localizer,
            "density": newer.density,
            "delta_bytes": newer.delta_bytes,
            "mask": model.mask,
        },
        "merged": None if result is None else result.merged,
        "normalized": None if result is None else result.normalized,
        "notes": [] if result is None else list(result.notes),
    }
