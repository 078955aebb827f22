"""The callback through which long work reports its progress.

A `Progress` is called with the amount done and the total, in the same unit. It must
return at once and must not raise.
"""

from collections.abc import Callable

Progress = Callable[[int, int], None]


def ignore(_done: int, _total: int) -> None:
    """Report progress to nobody."""
