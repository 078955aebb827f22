"""What a user means: a version by a number, `champion` or `candidate`, and its members; a task."""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.line_state import LineState, Member
from restitch.registry.ledger.records import MergedRecord


def find_version(line_state: LineState, text: str) -> int:
    """The number of a merged version.

    Raises:
        BadInput: the line has no such version.
    """
    found: int | None
    if text == "champion":
        found = line_state.champion
    elif text == "candidate":
        found = line_state.candidate
    elif text.isascii() and text.isdigit():
        found = int(text) if int(text) in line_state.versions else None
    else:
        raise BadInput(f"{text!r} is not a version", expected="a number, `champion` or `candidate`")
    if found is None:
        known = ", ".join(map(str, sorted(line_state.versions))) or "none"
        raise BadInput(
            f"line {line_state.line} has no version {text}",
            found=f"versions: {known}; champion: {line_state.champion}; candidate: {line_state.candidate}",
            hint=f"see `restitch history {line_state.line}`",
        )
    return found


def check_task(line_state: LineState, task: str) -> None:
    """Refuse a name that is no task of a line.

    Raises:
        BadInput: the line has no such task.
    """
    if task not in line_state.tasks:
        raise BadInput(
            f"line {line_state.line} has no task {task}",
            found=f"tasks: {', '.join(sorted(line_state.tasks)) or 'none'}",
        )


def members_of(line_state: LineState, record: MergedRecord) -> tuple[Member, ...]:
    """The members of a merged version, as the line knows them."""
    return tuple(
        Member(
            task=task,
            version=kept.version,
            spec=line_state.tasks[task].spec,
            model=line_state.tasks[task].versions[kept.version],
        )
        for task, kept in record.members.items()
    )
