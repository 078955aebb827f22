"""Find the merged version that a user names."""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.line_state import LineState


def find_version(line_state: LineState, text: str, *, purged: bool = False) -> int:
    """The number of a merged version.

    Args:
        line_state: the line's state.
        text: a number, `champion` or `candidate`.
        purged: also take a version whose weights were purged.

    Raises:
        BadInput: the line has no such version, or it was purged.
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
        raise _no_version(line_state, text)
    if version in line_state.purged and not purged:
        raise BadInput(
            f"version {version} of line {line_state.line} was purged {line_state.purged[version]}",
            expected="a version whose weights are still in the store",
            found="its record and its acts, which `restitch show` and `restitch history` print",
            hint=f"see `restitch history {line_state.line} --versions` for the other versions",
        )
    return version


def _no_version(line_state: LineState, text: str) -> BadInput:
    line, newest = line_state.line, line_state.newest
    wanted = f"version {text}" if text.isdigit() else text
    roles = "; ".join(
        f"the {role} is version {number}" if number else f"no {role}"
        for role, number in (
            ("champion", line_state.champion),
            ("candidate", line_state.candidate),
        )
    )
    return BadInput(
        f"line {line} has no {wanted}",
        found=f"versions 1 to {newest}; {roles}" if newest else "no merged version yet",
        hint=f"see `restitch history {line} --versions`"
        if newest
        else f"register a model; `restitch status {line}` shows each model with its state",
    )
