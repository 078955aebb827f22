"""Find the version that a user names, and its members; check task names."""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.ledger.versions import find_version
from restitch.tasks.runtime.workspace import workspace


def open_version(
    line: str, version: str, *, to_write: bool = True, purged: bool = False
) -> tuple[Ledger, LineState, MergedRecord]:
    """The ledger and state of a line, also of a dropped one, and the record of a version.

    Args:
        line: the line's name.
        version: as a user names it.
        to_write: create the folders of the home.
        purged: also take a version whose weights were purged, to read its record.

    Raises:
        BadInput: there is no such line or version, or the version was purged.
    """
    ledger = workspace(to_write=to_write).ledger(line, dropped=True)
    line_state = ledger.state()
    number = find_version(line_state, version, purged=purged)
    return ledger, line_state, ledger.merged(number)


def check_task(line_state: LineState, task: str) -> None:
    """Refuse an unknown task.

    Raises:
        BadInput: the line has no such task.
    """
    if task not in line_state.tasks:
        raise BadInput(
            f"line {line_state.line} has no task {task}",
            expected=", ".join(sorted(line_state.tasks)) or "a line with tasks",
            found=task,
            hint=f"see `restitch status {line_state.line}`",
        )


def named_models(line_state: LineState, model: str) -> tuple[str, int | None]:
    """The task and the version that a user names as `task` or `task/version`.

    Raises:
        BadInput: the line has no such model.
    """
    task, slash, number = model.partition("/")
    check_task(line_state, task)
    versions = line_state.tasks[task].versions
    if not slash:
        return task, None
    if not (number.isascii() and number.isdigit() and int(number) in versions):
        raise BadInput(
            f"task {task} of line {line_state.line} has no model {number or '(no number)'}",
            expected=f"one of {', '.join(map(str, sorted(versions))) or 'no models'}",
            hint=f"see `restitch status {line_state.line}`",
        )
    return task, int(number)


def members_of(line_state: LineState, record: MergedRecord) -> tuple[Member, ...]:
    """The members of a merged version, with their tasks and models on the line."""
    return tuple(
        member_of(line_state, task, member.version) for task, member in record.members.items()
    )


def member_of(line_state: LineState, task: str, version: int) -> Member:
    """A model of a line as a member."""
    known = line_state.tasks[task]
    return Member(task=task, version=version, spec=known.spec, model=known.versions[version])
