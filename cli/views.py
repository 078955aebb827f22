"""The values of `status`, from the store alone: no server, MLflow or torch is needed."""

from typing import Any

from restitch.registry.ledger.ledger import Ledger, lines
from restitch.registry.ledger.line_state import UNREAD, LineState, ModelVersion
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.maintenance.specialists import kept_specialists
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.workspace import workspace


def status(line: str | None) -> dict[str, Any]:
    """The state of one line, or of all, as plain JSON values."""
    space = workspace(to_write=False)
    names = list(lines(space.objects)) if line is None else [line]
    return {
        "home": str(space.home.root),
        "lines": [_line_status(space.ledger(name).state(), space.objects) for name in names],
    }


def _line_status(line_state: LineState, objects: ObjectStore) -> dict[str, Any]:
    champion = (
        None
        if line_state.champion is None
        else Ledger(objects, line_state.line).merged(line_state.champion)
    )
    kept = None if champion is None else champion.retention
    recipe = "" if champion is None else champion.recipe_digest
    return {
        "line": line_state.line,
        "base": line_state.base.uri,
        "family": line_state.spec.family,
        "method": line_state.spec.method.to_json(),
        "localize": line_state.spec.localize.to_json(),
        "gates": line_state.spec.gates.to_json(),
        "champion": line_state.champion,
        "candidate": line_state.candidate,
        "pinned": line_state.pinned,
        "mean_normalized": None if champion is None else champion.mean_normalized,
        "retention": None if kept is None else kept.ratio,
        "retention_interval": None
        if kept is None or kept.ratio_interval is None
        else kept.ratio_interval.to_json(),
        "specialists": kept_specialists(objects, [recipe]).get(recipe),
        "without_models": [
            name
            for name in sorted(line_state.tasks, key=str.encode)
            if not line_state.tasks[name].versions
        ],
        "models": [
            _model_status(task, number, model, champion)
            for task in sorted(line_state.tasks, key=str.encode)
            for number, model in sorted(line_state.tasks[task].versions.items())
        ],
    }


def _model_status(
    task: str, number: int, model: ModelVersion, champion: MergedRecord | None
) -> dict[str, Any]:
    member = None if champion is None else champion.members.get(task)
    inside = member is not None and member.version == number
    result = champion.results.get(task) if inside and champion is not None else None
    return {
        "task": task,
        "version": number,
        "state": model.state,
        "in_champion": inside,
        "source": model.model.uri,
        "weights": None if model.model.weights == UNREAD else model.model.weights,
        "registered_at": model.registered_at,
        "reason": model.reason,
        "density": model.facts.density,
        "delta_bytes": model.facts.delta_bytes,
        "merged": None if result is None else result.merged,
        "normalized": None if result is None else result.normalized,
    }
