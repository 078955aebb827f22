"""Find the version that a user names, and its members; check task names."""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState, Member
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.runtime.workspace import workspace


def open_version(
    line: str, version: str, *, to_write: bool = True
) -> tuple[Ledger, LineState, MergedRecord]:
    """A line's ledger and state, and the record of a version that a user names.

    Raises:
        BadInput: there is no such line or version.
    """
    ledger = workspace(to_write=to_write).ledger(line)
    line_state = ledger.state()
    return ledger, line_state, ledger.merged(find_version(line_state, version))


def find_version(line_state: LineState, text: str) -> int:
    """The number of a merged version.

    Raises:
        BadInput: the line has no such version.
    """
    version: int | None
    if text == "champion":
        version = line_state.champion
    elif text == "candidate":
        version = line_state.candidate
    elif text.isascii() and text.isdigit():
        version = int(text) if int(text) in line_state.versions else None
    else:
        raise BadInput(f"{text!r} is not a version", expected="a number, `champion` or `candidate`")
    if version is None:
        known = ", ".join(map(str, sorted(line_state.versions))) or "none"
        roles = f"champion: {line_state.champion}; candidate: {line_state.candidate}"
        raise BadInput(
            f"line {line_state.line} has no version {text}",
            expected="an existing version",
            found=f"versions: {known}; {roles}",
            hint=f"see `restitch history {line_state.line}`",
        )
    return version


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


def members_of(line_state: LineState, record: MergedRecord) -> tuple[Member, ...]:
    """The members of a merged version, with their tasks and models on the line."""
    return tuple(
        member_of(line_state, task, member.version) for task, member in record.members.items()
    )


def member_of(line_state: LineState, task: str, version: int) -> Member:
    """A model of a line as a member."""
    known = line_state.tasks[task]
    return Member(task=task, version=version, spec=known.spec, model=known.versions[version])
