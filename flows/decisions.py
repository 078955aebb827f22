"""Decisions that people make about a line: roll back, promote, retire, forget, pause, and the like.

Each is one act. It counts by the swap of the line's state, stands in the trail with its reason,
and moves MLflow's aliases afterwards; the next remerge does that if the process is killed. A
decision that was made before is not made again.

A line file can allow each decision to some actors only. Promotion by a remerge is no decision.

A schedule does not undo a decision: a rollback pins the line, and so does the promotion of a
version that the next remerge would replace. On a paused line decisions are still made, but no
remerge follows them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.versions import check_task, named_models, open_version
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.merging.errors import BadInput, GateFailed
from restitch.registry.ledger.finetuned_models import Removal, RetiredFrom, State
from restitch.registry.ledger.ledger import Act, Ledger
from restitch.registry.ledger.line_state import LineState, Pause
from restitch.registry.ledger.records import Kind, MergedRecord
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.events import has_workers, start_run
from restitch.tasks.runtime.notify import notify
from restitch.tasks.runtime.workspace import actor, workspace

# A retirement ends these states; quarantined and replaced models take no part in merges.
_TAKES_PART = ("registered", "waiting", "ready", "held")

# The reason of a replaced model.
_REPLACED_BY = re.compile(r"version (\d+) replaced it")

# Each act, with its name as a command and under `actors` in a line file.
_DECISIONS: dict[Kind, str] = {
    "promoted": "promote",
    "rolled-back": "rollback",
    "retired": "retire",
    "restored": "restore",
    "pinned": "pin",
    "unpinned": "unpin",
    "paused": "pause",
    "resumed": "resume",
    "forgotten": "forget",
    "dropped": "drop",
}


@dataclass(frozen=True)
class Decision(Outcome):
    """The result of a decision.

    Attributes:
        done: whether it was made by this call, and not before.
        entry: the digest of the act's audit entry.
        before: the champion before, as `champion` is the one now.
        paused: the pause of the line now.
        notes: warnings for the person.
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
    paused: Pause | None = None
    notes: tuple[str, ...] = ()
    merged: RemergeOutcome | None = None
    handed_over: bool = False

    @property
    def exit_code(self) -> int:
        """0, or the code for failed gates if they rejected the merge that the decision asked for.

        Members that were held before and failed again do not make the decision fail.
        """
        rejected = self.merged is not None and self.merged.action == "rejected"
        return GateFailed.exit_code if rejected else 0


def rollback(line: str, version: str, reason: str) -> Decision:
    """Make the champion or a former one the champion, and pin the line to it.

    Raises:
        BadInput: there is no such version, or it was never the champion.
    """
    ledger, line_state, record = open_version(line, version)
    number = record.version
    champions = {line_state.champion, *(entry.after.get("/champion") for entry in ledger.entries())}
    if number not in champions:
        raise BadInput(
            f"version {number} of line {line} was never the champion",
            expected="the number of a former champion; see `restitch history`",
            hint=f"to use it for the first time: restitch promote {line} {number} --reason WHY",
        )

    def change(line_state: LineState) -> LineState | None:
        after = line_state.promoted(number).with_pin(True)
        return None if after == line_state else after

    before = line_state.champion
    how = "stays in use" if before == number else f"in place of {before or 'none'}"
    why = f"version {number} {how}, pinned: {_checked(reason)}"
    return _decided(
        ledger, "rolled-back", why, change, _digests(record), _retired_members(line_state, record)
    )


def promote(line: str, version: str, reason: str) -> Decision:
    """Make a version the champion by hand, even if it failed a gate.

    Raises:
        BadInput: there is no such version.
    """
    ledger, before, record = open_version(line, version)
    number = record.version

    def change(line_state: LineState) -> LineState | None:
        after = _with_members(line_state.promoted(number), record)
        after = after if _holds_all(after, record) else after.with_pin(True)
        return None if after == line_state else after

    past = f", past {'; '.join(record.misses)}" if record.misses else ""
    why = f"version {number} by hand{past}: {_checked(reason)}"
    notes = (*_retired_members(before, record), *record.losses)
    decision = _decided(ledger, "promoted", why, change, _digests(record), notes)
    if decision.done and decision.pinned and not before.pinned:
        note = "the line is pinned: other members are ready and would have replaced this version"
        decision = replace(decision, notes=(*decision.notes, note))
    return decision


def retire(line: str, task: str, reason: str, *, merge: bool = True) -> Decision:
    """Leave a task out of all later merges, and merge without it.

    The next merged model has the same bytes as if the task's models had never been registered.
    If no member is left, the line has no champion.

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
        waiting = line_state.candidate
        if waiting is not None and task in ledger.merged(waiting).members:
            line_state = line_state.without_candidate()
        nothing_left = not line_state.members and not line_state.pinned
        return line_state.without_champion() if nothing_left else line_state

    decision = _decided(ledger, "retired", f"{task}: {_checked(reason)}", change)
    return _merged_after(decision, merge)


def restore(line: str, task: str, reason: str = "", *, merge: bool = True) -> Decision:
    """Give the models of a retired task their former state, and merge with it.

    Raises:
        BadInput: the line has no such task.
    """
    ledger = workspace().ledger(line)
    check_task(ledger.state(), task)

    known = ledger.state().tasks[task]
    if known.forgotten:
        newest = known.versions[max(known.versions)]
        raise BadInput(
            f"the models of task {task} are forgotten, which is final",
            expected="a task that was retired",
            found=f"forgotten: {newest.reason}",
            hint="register the model again with `restitch register`; it becomes the next version",
        )

    def change(line_state: LineState) -> LineState | None:
        # A model that `adopt` retired as a duplicate has no former state.
        after = line_state
        for number, model in line_state.tasks[task].versions.items():
            before = model.facts.retired_from
            if model.state == "retired" and before is not None:
                facts = model.facts.model_copy(update={"retired_from": None})
                after = after.with_state(task, number, before.state, before.reason, facts=facts)
        return None if after is line_state else after

    decision = _decided(ledger, "restored", _with_reason(task, reason), change)
    return _merged_after(decision, merge)


def forget(line: str, model: str, reason: str, *, merge: bool = True) -> Decision:
    """Undo the registration of a task's models, or of one of them, and merge without them.

    The next merged model has the same bytes as if they had never been registered: models that
    they had replaced are back. A forgotten model does not return; its weights may be registered
    again, as the next version.

    Args:
        line: the line's name.
        model: a task, or `task/version`. The description of a whole task is forgotten too, unless
            it is the line's general benchmark.
        reason: why.
        merge: remerge afterwards.

    Raises:
        BadInput: the line has no such model.
    """
    ledger = workspace().ledger(line)
    task, version = named_models(ledger.state(), model)
    why = _checked(reason)

    def change(line_state: LineState) -> LineState | None:
        after = line_state
        for key, known in line_state.models:
            chosen = key.task == task and version in (None, key.version)
            if chosen and known.state != "forgotten":
                after = after.with_forgotten(*key, why)
        described = after.tasks[task].declared and line_state.spec.retention != task
        if version is None and described:
            after = after.without_description(task)
        if after is line_state:
            return None
        retired = any(m.state == "retired" for m in line_state.tasks[task].versions.values())
        after = after if retired else _with_replaced(after, task, ledger)
        nothing_left = not after.members and not after.pinned
        return after.without_champion() if nothing_left else after

    name = task if version is None else f"{task} {version}"
    decision = _decided(ledger, "forgotten", f"{name}: {why}", change)
    return _merged_after(decision, merge)


def drop(line: str, reason: str) -> Decision:
    """Remove a line with all its models from use; its trail and its records stay."""
    ledger, why, who = workspace().ledger(line, dropped=True), _checked(reason), actor()

    def change(line_state: LineState) -> LineState | None:
        if line_state.dropped is not None:
            return None
        for key, model in line_state.models:
            if model.state != "forgotten":
                text = f"the line was dropped: {why}"
                line_state = line_state.with_forgotten(*key, text)
        for task in line_state.tasks:
            line_state = line_state.without_description(task)
        line_state = (
            line_state.without_champion().without_candidate().with_pin(False).with_pause(None)
        )
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return line_state.with_drop(Removal(actor=who, time=time, reason=why))

    return _decided(ledger, "dropped", f"line {line}: {why}", change)


def _with_replaced(line_state: LineState, task: str, ledger: Ledger) -> LineState:
    """Give the models that forgotten ones had replaced their former states."""
    versions = line_state.tasks[task].versions
    for number in sorted(versions, reverse=True):
        model, ready = versions[number], line_state.tasks[task].ready
        replacer = _REPLACED_BY.match(model.reason or "")
        if model.state != "replaced" or replacer is None or number < (ready or 0):
            continue
        if versions[int(replacer[1])].state == "forgotten":
            state, reason = _state_before(ledger, f"/tasks/{task}/versions/{number}")
            line_state = line_state.with_state(task, number, state, reason)
    return line_state


def _state_before(ledger: Ledger, pointer: str) -> tuple[State, str | None]:
    """The state and reason of a model before it was replaced, from the trail."""
    for entry in ledger.entries():
        if entry.after.get(f"{pointer}/state") == "replaced":
            before: Any = entry.before
            return before[f"{pointer}/state"], before.get(f"{pointer}/reason")
    raise AssertionError(f"{pointer} was never replaced")


def pin(line: str, reason: str = "") -> Decision:
    """Stop automatic promotion."""
    ledger = workspace().ledger(line)
    why = _with_reason(f"version {ledger.state().champion or 'none'} stays the champion", reason)
    return _decided(ledger, "pinned", why, lambda now: None if now.pinned else now.with_pin(True))


def unpin(line: str, reason: str = "", *, merge: bool = True) -> Decision:
    """Promote automatically again, and remerge."""
    why = _with_reason("versions are promoted automatically again", reason)
    decision = _decided(
        workspace().ledger(line),
        "unpinned",
        why,
        lambda now: now.with_pin(False) if now.pinned else None,
    )
    return _merged_after(decision, merge)


def pause(line: str, reason: str, *, schedule_only: bool = False) -> Decision:
    """Stop all automatic work on a line, or only its schedule, until it is resumed.

    Raises:
        BadInput: the reason is empty, or the actor may not pause the line.
    """
    ledger, checked = workspace().ledger(line), _checked(reason)
    what = "the schedule" if schedule_only else "all automatic work"

    def change(line_state: LineState) -> LineState | None:
        now = line_state.paused
        if now is not None and now.schedule_only <= schedule_only:
            return None  # as much is paused already, or more
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return line_state.with_pause(
            Pause(schedule_only=schedule_only, actor=actor(), since=since, reason=checked)
        )

    return _decided(ledger, "paused", f"{what}: {checked}", change)


def resume(line: str, reason: str = "", *, merge: bool = True) -> Decision:
    """Let automatic work and the schedule of a line go on, and remerge."""
    ledger = workspace().ledger(line)
    paused = ledger.state().paused
    what = "the schedule" if paused is not None and paused.schedule_only else "all automatic work"
    decision = _decided(
        ledger,
        "resumed",
        _with_reason(what, reason),
        lambda now: None if now.paused is None else now.with_pause(None),
    )
    return _merged_after(decision, merge)


def _decided(
    ledger: Ledger,
    kind: Kind,
    reason: str,
    change: Callable[[LineState], LineState | None],
    digests: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Decision:
    before, who = ledger.state(), actor()

    def if_allowed(line_state: LineState) -> LineState | None:
        _check_actor(line_state, _DECISIONS[kind], who)
        return change(line_state)

    act: Act | None = ledger.act(kind, who, reason, if_allowed, digests)
    done = "nothing to change" if act is None else f"{kind}: {reason}"
    say(f"{ledger.line}: {done}")
    for note in notes:
        warn(note)
    notify(act)
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
        line_state.paused,
        notes,
    )


def _check_actor(line_state: LineState, decision: str, who: str) -> None:
    """Check that the line allows a decision to an actor.

    Raises:
        BadInput: the actor may not make it.
    """
    allowed = None if line_state.spec.actors is None else line_state.spec.actors.of(decision)
    if allowed is not None and who not in allowed:
        raise BadInput(
            f"{who} may not {decision} on line {line_state.line}",
            expected=f"one of {', '.join(allowed)}",
            found=who,
            hint="ask one of them, or change `actors` in the line file and run `restitch init`; "
            "the actor is RESTITCH_ACTOR or, if that is not set, the system user",
        )


def _merged_after(decision: Decision, merge: bool) -> Decision:
    """Remerge after a decision, in this process or by the workers, unless the line is paused."""
    if not merge or not decision.done:
        return decision
    if decision.paused is not None and not decision.paused.schedule_only:
        note = f"nothing is merged until `restitch resume {decision.line}`"
        return replace(decision, notes=(*decision.notes, note))
    if has_workers():
        key = f"{decision.entry}-remerge"
        start_run("remerge", {"line": decision.line, "force": False}, key)
        return replace(decision, handed_over=True)
    merged = remerge(decision.line)
    return replace(decision, merged=merged, champion=merged.champion)


def _checked(reason: str) -> str:
    """The reason without spaces around it.

    Raises:
        BadInput: the reason is empty.
    """
    text = reason.strip()
    if not text:
        raise BadInput("the decision has no reason", hint="give one with --reason; it is recorded")
    return text


def _with_reason(text: str, reason: str) -> str:
    return f"{text}: {reason.strip()}" if reason.strip() else text


def _digests(record: MergedRecord) -> dict[str, str]:
    return {"recipe": record.recipe_digest, "patch": record.patch}


def _retired_members(line_state: LineState, record: MergedRecord) -> tuple[str, ...]:
    """A note on the members of a version that were retired or forgotten later."""
    states = {
        f"{task} {member.version}": line_state.tasks[task].versions[member.version].state
        for task, member in record.members.items()
    }
    left = {
        state: ", ".join(name for name, each in states.items() if each == state)
        for state in ("retired", "forgotten")
    }
    return tuple(
        f"version {record.version} holds {names}, {state} since"
        for state, names in left.items()
        if names
    )


def _with_members(line_state: LineState, record: MergedRecord) -> LineState:
    """Make the held members of a version ready."""
    for task, member in record.members.items():
        if line_state.tasks[task].versions[member.version].state == "held":
            line_state = line_state.with_state(task, member.version, "ready")
    return line_state


def _holds_all(line_state: LineState, record: MergedRecord) -> bool:
    """True if a version holds all ready members and no others."""
    ready = {member.task: member.version for member in line_state.members}
    return ready == {task: member.version for task, member in record.members.items()}
