"""What `status`, `history` and `show` answer, as plain JSON values, from the store alone.

MLflow, torch and the engine are never imported here: the answers come at once, also when
every server is away.
"""

from typing import Any

from flows.versions import find_version
from registry.head import UNREAD, Head, ModelVersion
from registry.history import MergedRecord
from registry.ledger import Ledger, lines
from registry.objects import ObjectStore
from tasks.workspace import workspace


def status(line: str | None) -> dict[str, Any]:
    """The present of one line, or of all."""
    space = workspace(to_write=False)
    names = list(lines(space.objects)) if line is None else [line]
    return {
        "home": str(space.home.root),
        "lines": [_line_status(space.ledger(name).head(), space.objects) for name in names],
    }


def history(line: str) -> dict[str, Any]:
    """All merged versions, newest first, with who promoted them and why."""
    ledger = workspace(to_write=False).ledger(line)
    head = ledger.head()
    acts: dict[int, list[dict[str, str]]] = {}
    for entry in ledger.entries():
        version = entry.after.get("/champion") if entry.kind != "merged" else None
        if isinstance(version, int):
            act = {"act": entry.kind, "by": entry.actor, "at": entry.time, "why": entry.reason}
            acts.setdefault(version, []).append(act)
    return {
        "line": line,
        "champion": head.champion,
        "candidate": head.candidate,
        "versions": [_brief(record, head, acts) for record in ledger.history()],
    }


def show(line: str, version: str) -> dict[str, Any]:
    """One merged version whole."""
    ledger = workspace(to_write=False).ledger(line)
    head = ledger.head()
    record = ledger.merged(find_version(head, version))
    return {
        **record.to_json(),
        "role": _role(head, record.version),
        "mean_accuracy": record.mean_accuracy,
        "mean_normalized": record.mean_normalized,
        "deltas": {task: _delta_facts(ledger, task, record) for task in record.members},
    }


def _line_status(head: Head, objects: ObjectStore) -> dict[str, Any]:
    champion = None if head.champion is None else Ledger(objects, head.line).merged(head.champion)
    return {
        "line": head.line,
        "base": head.base.uri,
        "family": head.spec.family,
        "method": head.spec.method.to_json(),
        "localize": head.spec.localize.to_json(),
        "gates": head.spec.gates.to_json(),
        "champion": head.champion,
        "candidate": head.candidate,
        "pinned": head.pinned,
        "mean_normalized": None if champion is None else champion.mean_normalized,
        "retention": None
        if champion is None or champion.retention is None
        else champion.retention.ratio,
        "models": [
            _model_status(task, number, model, champion)
            for task in sorted(head.tasks, key=str.encode)
            for number, model in sorted(head.tasks[task].versions.items())
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
        "density": model.facts.get("density"),
        "delta_bytes": model.facts.get("delta_bytes"),
        "merged": None if result is None else result.merged,
        "normalized": None if result is None else result.normalized,
    }


def _brief(
    record: MergedRecord, head: Head, acts: dict[int, list[dict[str, str]]]
) -> dict[str, Any]:
    return {
        "version": record.version,
        "role": _role(head, record.version),
        "members": {task: member.version for task, member in record.members.items()},
        "mean_accuracy": record.mean_accuracy,
        "mean_normalized": record.mean_normalized,
        "retention": None if record.retention is None else record.retention.ratio,
        "passed": record.passed,
        "failed": [gate.note or gate.gate for gate in record.gates if not gate.passed],
        "created_at": record.created_at,
        "made_by": record.made_by,
        "acts": acts.get(record.version, []),
    }


def _delta_facts(ledger: Ledger, task: str, record: MergedRecord) -> dict[str, Any]:
    versions = ledger.head().tasks[task].versions
    facts = versions[record.members[task].version].facts
    return {key: facts.get(key) for key in ("localizer", "density", "kept", "delta_bytes")}


def _role(head: Head, version: int) -> str | None:
    if version == head.champion:
        return "champion"
    return "candidate" if version == head.candidate else None
