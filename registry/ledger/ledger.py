"""The only way to change a line: write an audit entry, then swap the line's state.

Order of writes: the objects that an act names, its entry at `audit/<digest>`, the state at
`lines/<line>/head.json`. The act counts when the swap succeeds. An entry that no state reaches
was left by a process that died or lost a race, and is ignored. A process that loses a race
starts again from the new state, so nothing is lost and nothing happens twice.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage, Unavailable
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import (
    Entry,
    Kind,
    MergedRecord,
    differences,
    replay,
    state_of,
)
from restitch.registry.ledger.safe_deletion import check_references
from restitch.registry.specs.line import LineSpec
from restitch.registry.store.base import NotInStore
from restitch.registry.store.format import mark_format
from restitch.registry.store.objects import ObjectStore, parsed

_ATTEMPTS = 200
_LONGEST_PAUSE = 0.25


class Act(NamedTuple):
    """The result of `Ledger.act`."""

    entry: Entry
    digest: str
    line_state: LineState


class Ledger:
    """The state and the audit trail of one line; `now` is the clock, in UTC."""

    def __init__(
        self,
        objects: ObjectStore,
        line: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.objects = objects
        self.line = line
        self._now = now

    def exists(self) -> bool:
        """True if the line was created."""
        return self.find() is not None

    def find(self) -> LineState | None:
        """The line's state, or None if the line does not exist."""
        return self._tagged()[0]

    def state(self) -> LineState:
        """The line's state.

        Raises:
            BadInput: the line does not exist.
        """
        line_state = self.find()
        if line_state is None:
            known = list(lines(self.objects))
            raise BadInput(
                f"there is no line {self.line}",
                found=f"lines {', '.join(known)}" if known else "no lines",
                hint="create it with `restitch init FILE`",
            )
        return line_state

    def create(self, spec: LineSpec, base: ModelRef, actor: str, reason: str) -> Act | None:
        """Create the line; returns None if it already exists."""

        def change(line_state: LineState | None) -> LineState | None:
            return LineState(line=self.line, spec=spec, base=base) if line_state is None else None

        mark_format(self.objects.store)
        return self._act("configured", actor, reason, change, {"base": base.weights})

    def act(
        self,
        kind: Kind,
        actor: str,
        reason: str,
        change: Callable[[LineState], LineState | None],
        digests: Mapping[str, str] | Callable[[LineState], Mapping[str, str]] | None = None,
    ) -> Act | None:
        """Do one act.

        `change` makes the new state from the present one. It is called again with a newer state
        after a lost race, and returns None if nothing is left to do. It may put objects, which
        must be in the store before the act. `digests` are the objects that the act is about, or
        a function of the new state.

        Returns:
            The act; None if `change` returned None.

        Raises:
            BadInput: the line does not exist, or was dropped.
            Unavailable: other processes changed the line at each attempt.
        """
        self.state()  # raises if the line does not exist

        def changed(line_state: LineState | None) -> LineState | None:
            assert line_state is not None, "a line is never removed"
            return change(line_state)

        return self._act(kind, actor, reason, changed, digests)

    def touch(self) -> None:
        """Swap in the same state again, so that a change which has read it must start again."""
        while True:
            line_state, tag = self._tagged()
            if line_state is None:
                return
            generation = line_state.generation + 1
            if self._swap(tag, line_state.model_copy(update={"generation": generation})):
                return

    def entries(self, *, newest_first: bool = True) -> Iterator[Entry]:
        """The acts that count, each verified against the digest that leads to it.

        Raises:
            Damage: an entry is missing, altered or out of order.
        """
        entries = self._walk()
        return entries if newest_first else reversed(list(entries))

    def merged(self, version: int) -> MergedRecord:
        """The record of a merged version.

        Raises:
            BadInput: the version does not exist.
            Damage: its record is missing or altered.
        """
        line_state = self.state()
        if version not in line_state.versions:
            raise BadInput(
                f"line {self.line} has no version {version}",
                found=f"versions 1 to {line_state.newest}"
                if line_state.newest
                else "no versions yet",
            )
        return self.record(line_state.versions[version])

    def history(self) -> Iterator[MergedRecord]:
        """The records of all merged versions, newest first."""
        line_state = self.state()
        return (
            self.record(line_state.versions[n]) for n in sorted(line_state.versions, reverse=True)
        )

    def state_at(self, when: datetime) -> LineState | None:
        """The line's state at a time, from the trail; None before the line was created."""
        oldest_first = self.entries(newest_first=False)
        entries = [e for e in oldest_first if datetime.fromisoformat(e.time) <= when]
        return state_after(entries) if entries else None

    def _act(
        self,
        kind: Kind,
        actor: str,
        reason: str,
        change: Callable[[LineState | None], LineState | None],
        digests: Mapping[str, str] | Callable[[LineState], Mapping[str, str]] | None,
    ) -> Act | None:
        for attempt in range(_ATTEMPTS):
            old, tag = self._tagged()
            changed = change(old)
            if changed is None:
                return None
            if old is not None and changed.dropped is not None and kind != "purged":
                check_not_dropped(old)
            check_references(self.objects, old, changed)
            before, after = differences(state_of(old), state_of(changed))
            entry = Entry(
                line=self.line,
                sequence=1 if old is None else old.sequence + 1,
                previous=None if old is None else old.entry,
                kind=kind,
                actor=actor,
                time=self._time_after(old),
                before=before,
                after=after,
                reason=reason,
                digests=dict(digests(changed) if callable(digests) else digests or {}),
            )
            data = entry.to_bytes()
            digest = entry.digest
            self.objects.store.put(_entry(digest), data)
            line_state = changed.model_copy(
                update={
                    "generation": 1 if old is None else old.generation + 1,
                    "sequence": entry.sequence,
                    "entry": digest,
                    "time": entry.time,
                }
            )
            if self._swap(tag, line_state):
                return Act(entry, digest, line_state)
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.002 * 2 ** min(attempt, 8))))
        raise Unavailable(
            f"gave up after {_ATTEMPTS} attempts: line {self.line} kept changing",
            hint="run the same command again",
        )

    def _swap(self, tag: str | None, line_state: LineState) -> bool:
        data = line_state.model_dump_json(indent=1).encode()
        return self.objects.store.swap(_head(self.line), tag, data) is not None

    def _tagged(self) -> tuple[LineState | None, str | None]:
        try:
            data, tag = self.objects.store.read_tagged(_head(self.line))
        except NotInStore:
            return None, None
        return parsed(LineState, data, _head(self.line)), tag

    def _walk(self) -> Iterator[Entry]:
        line_state = self.state()
        digest, sequence = line_state.entry, line_state.sequence
        while digest is not None:
            name = _entry(digest)
            try:
                data = self.objects.store.read(name)
            except NotInStore:
                raise Damage(
                    f"line {self.line}: audit entry {sequence} is missing",
                    expected=name,
                    hint="restore it from a backup of the store",
                ) from None
            actual = digest_bytes(data)
            if actual != digest:
                raise Damage(
                    f"line {self.line}: audit entry {sequence} was altered",
                    expected=f"the digest {digest}",
                    found=actual,
                    hint=f"restore {name} from a backup of the store",
                )
            entry = parsed(Entry, data, name)
            if entry.line != self.line or entry.sequence != sequence:
                raise Damage(
                    f"line {self.line}: the audit trail is broken at {name}",
                    expected=f"entry {sequence} of {self.line}",
                    found=f"entry {entry.sequence} of {entry.line}",
                    hint="restore the store from a backup",
                )
            yield entry
            digest, sequence = entry.previous, sequence - 1
        if sequence != 0:
            raise Damage(
                f"line {self.line}: the audit trail does not reach its first entry",
                found=f"no entry before {sequence + 1}",
                hint="restore the store from a backup",
            )

    def record(self, digest: str) -> MergedRecord:
        """The record of a merged version, by its digest.

        Raises:
            Damage: it is missing or altered.
        """
        return parsed(MergedRecord, self.objects.read_blob(digest), f"blobs/{digest}")

    def _time_after(self, old: LineState | None) -> str:
        now = self._now().astimezone(UTC)
        if old is not None and old.time:
            # The clock of another host may be ahead; times in the trail never go back.
            now = max(now, datetime.fromisoformat(old.time) + timedelta(microseconds=1))
        return now.isoformat(timespec="microseconds")


def state_after(entries: Sequence[Entry]) -> LineState:
    """The line's state after these acts, which begin with its first one."""
    last = entries[-1]
    return LineState.model_validate(
        {
            **replay(entries),
            "generation": last.sequence,
            "sequence": last.sequence,
            "entry": last.digest,
            "time": last.time,
        }
    )


def check_not_dropped(line_state: LineState) -> None:
    """Refuse a line that was dropped.

    Raises:
        BadInput: it was dropped.
    """
    if line_state.dropped is not None:
        line = line_state.line
        raise BadInput(
            f"line {line} was dropped {line_state.dropped}",
            hint=f"`restitch history {line}` shows its trail; `restitch init FILE` with a file of "
            "this name and base starts it again",
        )


def lines_in_use(objects: ObjectStore) -> Iterator[LineState]:
    """The states of the lines that were not dropped, by name.

    Raises:
        Damage: a state cannot be read.
    """
    for line in lines(objects):
        line_state = Ledger(objects, line).state()
        if line_state.dropped is None:
            yield line_state


def lines(objects: ObjectStore) -> Iterator[str]:
    """The names of all lines, sorted, and those of dropped ones."""
    for name in objects.store.list("lines"):
        parts = name.split("/")
        if len(parts) == 3 and parts[2] == "head.json":
            yield parts[1]


def _head(line: str) -> str:
    return f"lines/{line}/head.json"


def _entry(digest: str) -> str:
    return f"audit/{digest}"
