"""The subjects of acts, and the outcome of each merged version: pure functions of the trail.

An act moves a merged version when it makes the version, makes it champion or candidate, or ends
such a role. The outcome of a version depends only on the last act that moved it and on its
record, so the newest acts are enough to know it.
"""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Literal

from restitch.registry.ledger.finetuned_models import ModelKey, Removal
from restitch.registry.ledger.records import Entry, MergedRecord

# champion: in use. candidate: the newest version that passed its gates and waits. former champion:
# was in use. rejected: a gate blocked it, and it was never in use. superseded: passed, but was
# never in use.
Role = Literal["champion", "candidate", "former champion", "rejected", "superseded"]

_ROLES = ("/champion", "/candidate")
_SUBJECT = re.compile(r"version (\d+)\b:?\s*")
# In the note of a gate that judges the version as a whole.
_WHOLE = re.compile(r"\b(\w+) of the (?:general benchmark|patch): ")


@dataclass(frozen=True)
class Outcome:
    """The role of a merged version, and a sentence that says since when and why."""

    role: Role
    sentence: str


def touched_models(entry: Entry) -> tuple[ModelKey, ...]:
    """The finetuned models that an act was about."""
    found: set[ModelKey] = set()
    for pointer, value in chain(entry.before.items(), entry.after.items()):
        match pointer.split("/")[1:], value:
            case ["tasks", task, "versions", number, *_], _:
                found.add(ModelKey(task, int(number)))
            case ["tasks", task], {"versions": dict(versions)}:
                found |= {ModelKey(task, int(number)) for number in versions}
    return tuple(sorted(found))


def touched_merges(entry: Entry) -> tuple[int, ...]:
    """The merged versions that an act made."""
    pointers = (pointer.split("/")[1:] for pointer in entry.after)
    return tuple(
        sorted(int(parts[1]) for parts in pointers if parts[0] == "versions" and len(parts) == 2)
    )


def moved_merges(entry: Entry) -> tuple[int, ...]:
    """The merged versions that an act made, or that got or lost a role by it."""
    values = (changes.get(role) for changes in (entry.before, entry.after) for role in _ROLES)
    moved = {value for value in values if isinstance(value, int)}
    return tuple(sorted({*touched_merges(entry), *moved}))


def purged_merges(entry: Entry) -> tuple[int, ...]:
    """The merged versions whose weights an act removed."""
    parts = [(pointer.split("/")[1:], value) for pointer, value in entry.after.items()]
    numbers = {int(path[1]) for path, _ in parts if path[0] == "purged" and len(path) > 1}
    for path, value in parts:
        if path == ["purged"] and isinstance(value, dict):
            numbers |= {int(number) for number in value}
    return tuple(sorted(numbers))


def merges_about(entry: Entry) -> tuple[int, ...]:
    """All merged versions that an act made, moved, rejected or purged."""
    # A rejection does not change the line's state: only its reason names the version.
    subject = _SUBJECT.match(entry.reason) if entry.kind == "rejected" else None
    rejected = () if subject is None else (int(subject[1]),)
    purged = purged_merges(entry)
    return tuple(sorted({*moved_merges(entry), *rejected, *purged}))


def headline(entry: Entry) -> str:
    """Say on one line what happened: `rejected version 7: min_retention 0.8690 < 0.9`."""
    made = touched_merges(entry)
    subject = f"version {', '.join(map(str, made))}: " if made else ""
    return _WHOLE.sub(r"\1 ", " ".join(f"{entry.kind} {subject}{entry.reason}".split()))


def last_moves(newest_first: Iterable[Entry], versions: Set[int]) -> dict[int, Entry]:
    """The last act that moved each version; reads the trail no further than needed."""
    moves: dict[int, Entry] = {}
    if versions:
        for entry in newest_first:
            for version in moved_merges(entry):
                if version in versions:
                    moves.setdefault(version, entry)
            if len(moves) == len(versions):
                break
    return moves


def outcome_of(record: MergedRecord, move: Entry, purge: Removal | None = None) -> Outcome:
    """The outcome of a version after the last act that moved it, and after its purge."""
    outcome = _moved(record, move)
    if purge is None:
        return outcome
    return Outcome(outcome.role, f"{outcome.sentence} Its weights were purged {purge}.")


def _moved(record: MergedRecord, move: Entry) -> Outcome:
    version, champion = record.version, move.after.get("/champion")
    if champion == version:
        how = "rolled back to" if move.kind == "rolled-back" else move.kind
        return Outcome("champion", f"In use since {_when(move)}, {how} by {_who_and_why(move)}")
    if move.before.get("/champion") == version:
        if champion is None:
            why = f"when no member was left to merge: {move.kind} by {_who_and_why(move)}"
        elif move.kind == "rolled-back":
            why = f"rolled back to version {champion} by {_who_and_why(move)}"
        else:
            why = f"when version {champion} replaced it."
        return Outcome("former champion", f"In use until {_when(move)}, {why}")
    if move.after.get("/candidate") == version:
        return Outcome("candidate", "It has not been promoted.")
    if record.passed:
        return Outcome("superseded", "It was never promoted.")
    verdict = "It failed its gates" if record.verdict == "failed" else "Its gates block it"
    return Outcome("rejected", f"{verdict}: {_sentence('; '.join(record.misses))}")


def _who_and_why(move: Entry) -> str:
    # The sentence is about the version: its number need not stand in it again.
    why = _SUBJECT.sub("", move.reason, count=1) if _SUBJECT.match(move.reason) else move.reason
    return f"{move.actor}: {_sentence(why)}" if why else f"{move.actor}."


def _sentence(text: str) -> str:
    return f"{' '.join(text.split()).rstrip('.')}."


def _when(move: Entry) -> str:
    time = datetime.fromisoformat(move.time).astimezone(UTC)
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
