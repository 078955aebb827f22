"""What people decide about a line: roll back, promote, retire, restore, pin, unpin.

Each is one act: it counts by the swap of the head, stands in the trail with its reason, and
moves MLflow's aliases afterwards; who is killed between the two leaves that to the next
remerge. What has been decided already is said and not done again.

A line's file can leave each of them to some actors. What a remerge promotes by itself is not a
decision in this sense.

A choice made by hand is not undone by a schedule: a rollback pins the line, and so does the
promotion of a version that the next remerge would replace at once.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.promotion.versions import check_task, find_version
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.merging.errors import BadInput, GateFailed
from restitch.registry.ledger.ledger import Act, Ledger
from restitch.registry.ledger.line_state import LineState, RetiredFrom
from restitch.registry.ledger.records import Kind, MergedRecord
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.events import has_workers, start_run
from restitch.tasks.runtime.workspace import actor, workspace

# What a retirement takes a model out of; what was quarantined or replaced is out already.
_TAKES_PART = ("registered", "waiting", "ready", "held")

# The acts by the words that the command and `actors` in the line's file have for them.
_DECISIONS: dict[Kind, str] = {
    "promoted": "promote",
    "rolled-back": "rollback",
    "retired": "retire",
    "restored": "restore",
    "pinned": "pin",
    "unpinned": "unpin",
}


@dataclass(frozen=True)
class Decision:
    """What a decision did.

    Attributes:
        act: its kind.
        done: False where it was decided before.
        reason: as it stands in the trail.
        entry: the digest of the act's audit entry.
        before: the champion before.
        champion: the champion now.
        notes: what the person should know.
        merged: the remerge that followed in this process.
        handed_over: whether workers do that remerge.
    """

    line: str
    act: Kind
    done: bool
    reason: str
    entry: str | None
    before: int | None
    champion: int | None
    pinned: bool
    notes: tuple[str, ...] = ()
    merged: RemergeOutcome | None = None
    handed_over: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(replace(self, merged=None))
        return values | {"merged": None if self.merged is None else self.merged.as_dict()}

    @property
    def exit_code(self) -> int:
        """0, or that of failed gates where they kept the merge that it asked for out of use.

        Held members that were tried again and failed again are no failure of the decision.
        """
        rejected = self.merged is not None and self.merged.action == "rejected"
        return GateFailed.exit_code if rejected else 0


def rollback(line: str, version: str, reason: str) -> Decision:
    """Put a version back in use that was in use before, and pin the line to it.

    Raises:
        BadInput: there is no such version, or it was never in use.
    """
    ledger, number = _ledger_and_version(line, version)
    line_state = ledger.state()
    if line_state.champion != number and number not in former_champions(ledger):
        raise BadInput(
            f"version {number} of line {line} was never in use",
            expected="a version that was champion once",
            hint=f"put it in use for the first time with: restitch promote {line} {number}",
        )

    def change(line_state: LineState) -> LineState | None:
        return None if line_state.champion == number else line_state.promoted(number).with_pin(True)

    said = f"version {number} in place of {_name(line_state.champion)}, pinned: {_given(reason)}"
    record = ledger.merged(number)
    return _decided(
        ledger, "rolled-back", said, change, _digests(record), _outdated(line_state, record)
    )


def promote(line: str, version: str, reason: str) -> Decision:
    """Put a version in use by hand, also past a gate that it failed.

    Raises:
        BadInput: there is no such version.
    """
    ledger, number = _ledger_and_version(line, version)
    record = ledger.merged(number)

    def change(line_state: LineState) -> LineState | None:
        if line_state.champion == number:
            return None
        line_state = _with_members(line_state.promoted(number), record)
        return line_state if _holds_all(line_state, record) else line_state.with_pin(True)

    failed = [gate.note or gate.gate for gate in record.gates if not gate.passed]
    past = f", past {'; '.join(failed)}" if failed else ""
    before = ledger.state()
    said = f"version {number} by hand{past}: {_given(reason)}"
    found = _decided(ledger, "promoted", said, change, _digests(record), _outdated(before, record))
    if found.done and found.pinned and not before.pinned:
        note = "the line is pinned: other members are ready and would have replaced this version"
        found = replace(found, notes=(*found.notes, note))
    return found


def retire(line: str, task: str, reason: str, *, merge: bool = True) -> Decision:
    """Take a task out of all merges to come, and merge without it.

    The merged model that follows is, byte for byte, the one that would be there had the
    task's models never been registered. Where nothing is left to merge, no version is in use.

    Raises:
        BadInput: the line has no such task.
    """
    ledger = workspace().ledger(line)
    check_task(ledger.state(), task)

    def change(line_state: LineState) -> LineState | None:
        models = line_state.tasks[task].versions.items()
        leaving = [(n, m) for n, m in models if m.state in _TAKES_PART]
        if not leaving:
            return None
        for number, model in leaving:
            before = RetiredFrom(state=model.state, reason=model.reason)
            facts = model.facts.model_copy(update={"retired_from": before})
            line_state = line_state.with_state(task, number, "retired", reason.strip(), facts=facts)
        nothing_left = not line_state.members and not line_state.pinned
        return line_state.without_champion() if nothing_left else line_state

    found = _decided(ledger, "retired", f"{task}: {_given(reason)}", change, {}, ())
    return _merged_after(found, merge)


def restore(line: str, task: str, reason: str = "", *, merge: bool = True) -> Decision:
    """Take a retired task back in, as it was, and merge with it.

    Raises:
        BadInput: the line has no such task.
    """
    ledger = workspace().ledger(line)
    check_task(ledger.state(), task)

    def change(line_state: LineState) -> LineState | None:
        # One that was left out as a double of another was never retired by anybody.
        after = line_state
        for number, model in line_state.tasks[task].versions.items():
            before = model.facts.retired_from
            if model.state == "retired" and before is not None:
                facts = model.facts.model_copy(update={"retired_from": None})
                after = after.with_state(task, number, before.state, before.reason, facts=facts)
        return None if after is line_state else after

    found = _decided(ledger, "restored", _with_reason(task, reason), change, {}, ())
    return _merged_after(found, merge)


def pin(line: str, reason: str = "") -> Decision:
    """Promote nothing automatically from now on."""
    ledger = workspace().ledger(line)

    def change(line_state: LineState) -> LineState | None:
        return None if line_state.pinned else line_state.with_pin(True)

    said = _with_reason(f"version {_name(ledger.state().champion)} stays in use", reason)
    return _decided(ledger, "pinned", said, change, {}, ())


def unpin(line: str, reason: str = "", *, merge: bool = True) -> Decision:
    """Promote automatically again, and bring the merged model up to date."""
    ledger = workspace().ledger(line)

    def change(line_state: LineState) -> LineState | None:
        return line_state.with_pin(False) if line_state.pinned else None

    said = _with_reason("versions are promoted automatically again", reason)
    return _merged_after(_decided(ledger, "unpinned", said, change, {}, ()), merge)


def former_champions(ledger: Ledger) -> set[int]:
    """The versions that were in use at any time, from the trail."""
    champions = (entry.after.get("/champion") for entry in ledger.entries())
    return {number for number in champions if isinstance(number, int)}


def _decided(
    ledger: Ledger,
    kind: Kind,
    reason: str,
    change: Callable[[LineState], LineState | None],
    digests: dict[str, str],
    notes: tuple[str, ...],
) -> Decision:
    before, who = ledger.state(), actor()

    def if_allowed(line_state: LineState) -> LineState | None:
        _check_actor(line_state, _DECISIONS[kind], who)
        return change(line_state)

    act: Act | None = ledger.act(kind, who, reason, if_allowed, digests)
    say(f"{ledger.line}: {reason}" if act is not None else f"{ledger.line}: decided before")
    for note in notes:
        warn(note)
    mirror(ledger.line)
    line_state = ledger.state() if act is None else act.line_state
    return Decision(
        ledger.line,
        kind,
        act is not None,
        reason,
        None if act is None else act.digest,
        before.champion,
        line_state.champion,
        line_state.pinned,
        notes,
    )


def _check_actor(line_state: LineState, decision: str, who: str) -> None:
    """Refuse a decision that the line leaves to others.

    Raises:
        BadInput: it does.
    """
    allowed = None if line_state.spec.actors is None else line_state.spec.actors.of(decision)
    if allowed is not None and who not in allowed:
        raise BadInput(
            f"{who} may not {decision} on line {line_state.line}",
            expected=f"one of {', '.join(allowed)}",
            found=who,
            hint="ask one of them, or change `actors` in the line's file with `restitch init`; "
            "who acts is RESTITCH_ACTOR, or else the user of the system",
        )


def _merged_after(found: Decision, merge: bool) -> Decision:
    """The remerge that a decision asks for, here or by the workers."""
    if not merge or not found.done:
        return found
    if has_workers():
        start_run("remerge", {"line": found.line, "force": False}, f"{found.entry}-remerge")
        return replace(found, handed_over=True)
    merged = remerge(found.line)
    return replace(found, merged=merged, champion=merged.champion)


def _ledger_and_version(line: str, version: str) -> tuple[Ledger, int]:
    ledger = workspace().ledger(line)
    return ledger, find_version(ledger.state(), version)


def _given(reason: str) -> str:
    """A reason that says something.

    Raises:
        BadInput: it is empty.
    """
    text = reason.strip()
    if not text:
        raise BadInput("a decision needs its reason", hint="say why with --reason")
    return text


def _with_reason(said: str, reason: str) -> str:
    """What is said, with a reason where one was given: it takes nothing out of use."""
    return f"{said}: {reason.strip()}" if reason.strip() else said


def _name(version: int | None) -> str:
    return "none" if version is None else str(version)


def _digests(record: MergedRecord) -> dict[str, str]:
    return {"recipe": record.recipe_digest, "patch": record.patch}


def _outdated(line_state: LineState, record: MergedRecord) -> tuple[str, ...]:
    """What a version holds that has been retired since."""
    gone = [
        f"{task} {member.version}"
        for task, member in record.members.items()
        if line_state.tasks[task].versions[member.version].state == "retired"
    ]
    if not gone:
        return ()
    return (f"version {record.version} holds {', '.join(gone)}, retired since",)


def _with_members(line_state: LineState, record: MergedRecord) -> LineState:
    """The head with the held members of a version taking part."""
    for task, member in record.members.items():
        if line_state.tasks[task].versions[member.version].state == "held":
            line_state = line_state.with_state(task, member.version, "ready")
    return line_state


def _holds_all(line_state: LineState, record: MergedRecord) -> bool:
    """Whether the members that are ready are those of a version."""
    ready = {member.task: member.version for member in line_state.members}
    return ready == {task: member.version for task, member in record.members.items()}
