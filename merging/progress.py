"""How long work reports that it goes on.

A `Progress` is called with what is done and what there is to do, in the same unit; it
must return at once and must not raise. The pure code never draws anything itself.
"""

from collections.abc import Callable

Progress = Callable[[int, int], None]


def ignore(_done: int, _total: int) -> None:
    """The progress that nobody watches."""
