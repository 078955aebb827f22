"""A paused line: nothing is localized, merged or promoted on it until a person resumes it.

Registrations and people's decisions are still recorded. A run that is under way when a line is
paused ends at its next act.
"""

from restitch.merging.errors import BadInput
from restitch.registry.ledger.line_state import LineState


class PausedError(BadInput):
    """The line is paused, so its merged model is not brought up to date."""


def check_not_paused(line_state: LineState, *, by_schedule: bool = False) -> None:
    """Refuse to merge a paused line.

    Args:
        line_state: of the line.
        by_schedule: whether the schedule asks, which may be paused alone.

    Raises:
        PausedError: the line is paused, or its schedule is and asks.
    """
    pause = line_state.paused
    if pause is None or (pause.schedule_only and not by_schedule):
        return
    line = line_state.line
    what = f"the schedule of line {line}" if pause.schedule_only else f"line {line}"
    raise PausedError(
        f"{what} is paused, nothing is merged",
        found=f"paused {pause}",
        hint=f"restitch resume {line}",
    )
