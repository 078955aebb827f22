"""What acts were about, and what became of each merged version: pure functions over the trail.

A merged version is moved by the acts that change which one is the champion or the candidate.
Its role and the sentence about it hang on the last of them and on its own record alone, so that
a look at the newest acts says the same as a look at all of them.
"""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from restitch.registry.ledger.records import Entry, MergedRecord

# champion: in use. candidate: the newest that was never in use. former champion: was in use.
# rejected and superseded: never in use, with and without a failed gate, and a newer one came.
Role = Literal["champion", "candidate", "former champion", "rejected", "superseded"]

_ROLES = ("/champion", "/candidate")
_SUBJECT = re.compile(r"version (\d+)\b:?\s*")


@dataclass(frozen=True)
class Outcome:
    """What a merged version is now, and the sentence that says since when and why."""

    role: Role
    sentence: str


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


def moved_merges(entry: Entry) -> tuple[int, ...]:
    """The merged versions that an act made champion or candidate, or that it relieved of that."""
    values = (changes.get(role) for changes in (entry.before, entry.after) for role in _ROLES)
    return tuple(sorted({value for value in values if isinstance(value, int)}))


def merges_about(entry: Entry) -> tuple[int, ...]:
    """All merged versions that an act is about: made, moved, or judged by it."""
    # A rejection changes nothing of the head: only its reason names the version.
    judged = _SUBJECT.match(entry.reason) if entry.kind == "rejected" else None
    named = () if judged is None else (int(judged[1]),)
    return tuple(sorted({*touched_merges(entry), *moved_merges(entry), *named}))


def last_moves(newest_first: Iterable[Entry], versions: Set[int]) -> dict[int, Entry]:
    """The last act that moved each of some versions; the trail is read no further than needed."""
    found: dict[int, Entry] = {}
    if versions:
        for entry in newest_first:
            for version in moved_merges(entry):
                if version in versions:
                    found.setdefault(version, entry)
            if len(found) == len(versions):
                break
    return found


def outcome_of(record: MergedRecord, move: Entry) -> Outcome:
    """What became of a version by the last act that moved it."""
    version, champion = record.version, move.after.get("/champion")
    if champion == version:
        how = "rolled back to" if move.kind == "rolled-back" else move.kind
        return Outcome("champion", f"In use since {_when(move)}, {how} by {_who_and_why(move)}")
    if move.before.get("/champion") == version:
        if champion is None:
            by = f"when nothing was left to merge: {move.kind} by {_who_and_why(move)}"
        elif move.kind == "rolled-back":
            by = f"rolled back to version {champion} by {_who_and_why(move)}"
        else:
            by = f"when version {champion} took its place."
        return Outcome("former champion", f"In use until {_when(move)}, {by}")
    failed = "; ".join(g.note or g.gate for g in record.gates if not g.passed)
    judged = f"It failed its gates: {_sentence(failed)}"
    if move.after.get("/candidate") == version:
        waiting = "It has not been promoted."
        return Outcome("candidate", waiting if record.passed else f"{judged} {waiting}")
    if record.passed:
        return Outcome("superseded", "It was never promoted.")
    return Outcome("rejected", judged)


def _who_and_why(move: Entry) -> str:
    # What the act says of its own version would be said twice.
    why = _SUBJECT.sub("", move.reason, count=1) if _SUBJECT.match(move.reason) else move.reason
    return f"{move.actor}: {_sentence(why)}" if why else f"{move.actor}."


def _sentence(text: str) -> str:
    return f"{' '.join(text.split()).rstrip('.')}."


def _when(move: Entry) -> str:
    time = datetime.fromisoformat(move.time).astimezone(UTC)
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
