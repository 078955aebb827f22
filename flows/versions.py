"""Which merged version a user means by a number, `champion` or `candidate`."""

from merging.errors import BadInput
from registry.head import Head


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
