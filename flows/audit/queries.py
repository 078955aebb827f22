"""Questions of an auditor about a line, answered as plain JSON values from the store alone.

They need neither MLflow nor Prefect, so an auditor gets answers while every server is down.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from restitch.flows.audit.urls import links
from restitch.flows.promotion.versions import check_task, open_version
from restitch.merging.errors import BadInput
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.outcomes import merges_about, touched_models
from restitch.registry.ledger.records import Entry, Kind, MergedRecord
from restitch.registry.maintenance.specialists import stored_specialists
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.workspace import workspace

_MEASURED = ("merged", "interval", "finetuned", "grafted", "base")


@dataclass(frozen=True)
class HistoryFilter:
    """The acts to list: about a task, of a kind, in a time; a field of None excludes nothing."""

    task: str | None = None
    event: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        if self.event is not None and self.event not in get_args(Kind):
            raise BadInput(f"unknown event: {self.event!r}", expected=", ".join(get_args(Kind)))

    def matches(self, entry: Entry) -> bool:
        """True if the filter selects an act."""
        at = datetime.fromisoformat(entry.time)
        return (
            (self.event is None or entry.kind == self.event)
            and (self.task is None or any(task == self.task for task, _ in touched_models(entry)))
            and (self.since is None or at >= self.since)
            and (self.until is None or at <= self.until)
        )


def history(line: str, selection: HistoryFilter) -> dict[str, Any]:
    """The audit trail, newest first."""
    ledger = workspace(to_write=False).ledger(line, dropped=True)
    if selection.task is not None:
        check_task(ledger.state(), selection.task)
    acts = [_act(entry, champion) for entry, champion in _acts(ledger) if selection.matches(entry)]
    return {"line": line, "acts": acts}


def versions(line: str) -> dict[str, Any]:
    """All merged versions, newest first, with the acts that moved the champion to them."""
    ledger = workspace(to_write=False).ledger(line, dropped=True)
    line_state = ledger.state()
    acts: dict[int, list[dict[str, str]]] = {}
    for entry in ledger.entries():
        version = entry.after.get("/champion")
        if isinstance(version, int):
            act = {"act": entry.kind, "by": entry.actor, "at": entry.time, "why": entry.reason}
            acts.setdefault(version, []).append(act)
    records = list(ledger.history())
    specialists = stored_specialists(ledger.objects, [record.recipe_digest for record in records])
    return {
        "line": line,
        "champion": line_state.champion,
        "candidate": line_state.candidate,
        "versions": [_summary(record, line_state, acts, specialists) for record in records],
    }


def as_of(line: str, when: datetime) -> dict[str, Any]:
    """The version in use at a time, with its members and the act that put it in use."""
    ledger = workspace(to_write=False).ledger(line, dropped=True)
    line_state = ledger.state_at(when)
    if line_state is None:
        first = next(ledger.entries(newest_first=False))
        raise BadInput(
            f"line {line} did not exist at {when.isoformat()}",
            expected=f"a time not before {first.time}",
        )
    return {
        "line": line,
        "as_of": when.isoformat(),
        "sequence": line_state.sequence,
        "champion": None if line_state.champion is None else _in_use(ledger, line_state),
        "candidate": line_state.candidate,
        "pinned": line_state.pinned,
        "paused": None if line_state.paused is None else line_state.paused.to_json(),
        "models": [
            {"task": task, "version": number, "state": model.state, "reason": model.reason}
            for task in sorted(line_state.tasks, key=str.encode)
            for number, model in sorted(line_state.tasks[task].versions.items())
        ],
    }


def show(line: str, version: str) -> dict[str, Any]:
    """One merged version with all details, also one whose weights were purged."""
    ledger, line_state, record = open_version(line, version, to_write=False, purged=True)
    details = version_details(line_state, record, ledger.objects)
    return {**details, "links": links(line, details["digest"], record.made_by)}


def version_details(
    line_state: LineState, record: MergedRecord, objects: ObjectStore
) -> dict[str, Any]:
    """The whole record of a merged version, with its role and its specialists."""
    recipe = record.recipe_digest
    return {
        **record.to_json(),
        "role": _role(line_state, record.version),
        "mean_accuracy": record.mean_accuracy,
        "mean_normalized": record.mean_normalized,
        "verdict": record.verdict,
        "losses": list(record.losses),
        "digest": line_state.versions[record.version],
        "purged": _purged(line_state, record.version),
        "forgotten": _forgotten(line_state, record),
        "specialists": stored_specialists(objects, [recipe]).get(recipe),
    }


def why(line: str, task: str) -> dict[str, Any]:
    """A task's accuracy in every version, and the changes between them."""
    space = workspace(to_write=False)
    ledger = space.ledger(line, dropped=True)
    line_state = ledger.state()
    check_task(line_state, task)
    from restitch.tasks.compare_results import compare_results  # only this query needs numpy

    steps: list[dict[str, Any]] = []
    before: MergedRecord | None = None
    for record in reversed(list(ledger.history())):
        new = record.results.get(task)
        old = None if before is None else before.results.get(task)
        numbers = {record.version, record.version if before is None else before.version}
        purged = not line_state.purged.keys().isdisjoint(numbers)
        pairs = None if purged else compare_results(space.objects, old, new)
        member = record.members.get(task)
        values = {} if new is None else new.to_json()
        steps.append(
            {
                "version": record.version,
                "role": _role(line_state, record.version),
                "at": record.created_at,
                "model": None if member is None else member.version,
                **{name: values.get(name) for name in _MEASURED},
                "change": None if pairs is None else pairs.difference,
                "p_value": None if pairs is None else pairs.p_value,
                "significant": pairs is not None and pairs.is_significant,
                "members": member_changes(before, record),
                "settings": before is not None
                and before.recipe["method"] != record.recipe["method"],
                "passed": record.passed,
                "verdict": record.verdict,
            }
        )
        before = record
    return {"line": line, "task": task, "champion": line_state.champion, "versions": steps}


def member_changes(first: MergedRecord | None, second: MergedRecord) -> dict[str, Any]:
    """The tasks that joined or left, or have another model, or another mask of the same model."""
    old = {} if first is None else first.members
    new = second.members
    both = [(task, old[task], new[task]) for task in new if task in old]
    same = [(task, a, b) for task, a, b in both if a.version == b.version]
    return {
        "joined": {task: new[task].version for task in new if task not in old},
        "left": {task: old[task].version for task in old if task not in new},
        "replaced": {t: [a.version, b.version] for t, a, b in both if a.version != b.version},
        "relocalized": {task: b.version for task, a, b in same if a.mask != b.mask},
    }


def _acts(ledger: Ledger) -> Iterator[tuple[Entry, int | None]]:
    """Every act, newest first, with the champion after it."""
    champion = ledger.state().champion
    for entry in ledger.entries():
        yield entry, champion
        if "/champion" in entry.before or "/champion" in entry.after:
            replaced = entry.before.get("/champion")
            champion = replaced if isinstance(replaced, int) else None


def _act(entry: Entry, champion: int | None) -> dict[str, Any]:
    return {
        "sequence": entry.sequence,
        "time": entry.time,
        "kind": entry.kind,
        "actor": entry.actor,
        "reason": entry.reason,
        "models": [{"task": task, "version": n} for task, n in touched_models(entry)],
        "versions": list(merges_about(entry)),
        "champion": champion,
        "digests": entry.digests,
        "entry": entry.digest,
        "previous": entry.previous,
    }


def _in_use(ledger: Ledger, line_state: LineState) -> dict[str, Any]:
    """The champion of a line with its members, and the act that put it in use."""
    assert line_state.champion is not None
    record = ledger.record(line_state.versions[line_state.champion])
    promotion = next(
        entry
        for entry in ledger.entries()
        if entry.sequence <= line_state.sequence
        and entry.after.get("/champion") == line_state.champion
    )
    return {
        "version": record.version,
        "since": promotion.time,
        "act": promotion.kind,
        "by": promotion.actor,
        "why": promotion.reason,
        "entry": promotion.digest,
        "members": {task: member.to_json() for task, member in record.members.items()},
        "mean_accuracy": record.mean_accuracy,
        "mean_normalized": record.mean_normalized,
        "retention": None if record.retention is None else record.retention.to_json(),
        "recipe": record.recipe_digest,
        "patch": record.patch,
    }


def _summary(
    record: MergedRecord,
    line_state: LineState,
    acts: dict[int, list[dict[str, str]]],
    specialists: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    retention = {} if record.retention is None else record.retention.to_json()
    return {
        "version": record.version,
        "role": _role(line_state, record.version),
        "members": {task: member.version for task, member in record.members.items()},
        "mean_accuracy": record.mean_accuracy,
        "mean_normalized": record.mean_normalized,
        "retention": retention.get("ratio"),
        "retention_interval": retention.get("ratio_interval"),
        "general": retention.get("value"),
        "passed": record.passed,
        "verdict": record.verdict,
        "failed": list(record.misses),
        "created_at": record.created_at,
        "made_by": record.made_by,
        "acts": acts.get(record.version, []),
        "purged": _purged(line_state, record.version),
        "forgotten": _forgotten(line_state, record),
        "specialists": specialists.get(record.recipe_digest),
    }


def _purged(line_state: LineState, version: int) -> dict[str, str] | None:
    """Who removed the weights of a version, when and why; None if they are in the store."""
    removal = line_state.purged.get(version)
    return None if removal is None else removal.to_json()


def _forgotten(line_state: LineState, record: MergedRecord) -> list[str]:
    """The members of a version that were forgotten later."""
    return [
        f"{task} {member.version}"
        for task, member in record.members.items()
        if line_state.tasks[task].versions[member.version].state == "forgotten"
    ]


def _role(line_state: LineState, version: int) -> str | None:
    if version == line_state.champion:
        return "champion"
    return "candidate" if version == line_state.candidate else None
