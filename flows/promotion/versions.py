"""What a user means: a version by a number, `champion` or `candidate`, and its members; a task."""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.line_state import Head, Member
from restitch.registry.ledger.records import MergedRecord


def find_version(head: Head, text: str) -> int:
    """The number of a merged version.

    Raises:
        BadInput: the line has no such version.
    """
    found: int | None
    if text == "champion":
        found = head.champion
    elif text == "candidate":
        found = head.candidate
    elif text.isascii() and text.isdigit():
        found = int(text) if int(text) in head.versions else None
    else:
        raise BadInput(f"{text!r} is not a version", expected="a number, `champion` or `candidate`")
    if found is None:
        known = ", ".join(map(str, sorted(head.versions))) or "none"
        raise BadInput(
            f"line {head.line} has no version {text}",
            found=f"versions: {known}; champion: {head.champion}; candidate: {head.candidate}",
            hint=f"see `restitch history {head.line}`",
        )
    return found


def check_task(head: Head, task: str) -> None:
    """Refuse a name that is no task of a line.

    Raises:
        BadInput: the line has no such task.
    """
    if task not in head.tasks:
        raise BadInput(
            f"line {head.line} has no task {task}",
            found=f"tasks: {', '.join(sorted(head.tasks)) or 'none'}",
        )


def members_of(head: Head, record: MergedRecord) -> tuple[Member, ...]:
    """The members of a merged version, as the line knows them."""
    return tuple(
        Member(
            task=task,
            version=kept.version,
            spec=head.tasks[task].spec,
            model=head.tasks[task].versions[kept.version],
        )
        for task, kept in record.members.items()
    )
