"""Verify lines together with their store, and repair the store on request.

Repairs come first, so that the lines are verified as they are afterwards.
"""

from dataclasses import dataclass
from typing import Any

from restitch.flows.outcome import Outcome
from restitch.flows.storage.repair import check_store
from restitch.flows.storage.store_check import StoreCheck
from restitch.flows.storage.verify import LINE_STATE, Verification, verify
from restitch.merging.errors import BadInput, Damage
from restitch.registry.ledger.ledger import lines
from restitch.tasks.runtime.workspace import workspace


@dataclass(frozen=True)
class WholeVerification(Outcome):
    """The results for lines and for their store.

    Attributes:
        lines: the result for each line.
        store: the result for the store; None if only lines were verified.
    """

    lines: tuple[Verification, ...]
    store: StoreCheck | None

    @property
    def intact(self) -> bool:
        """True if nothing is left damaged."""
        store_intact = self.store is None or self.store.intact
        return store_intact and all(line.intact for line in self.lines)

    @property
    def exit_code(self) -> int:
        """0, or the code of damage."""
        return 0 if self.intact else Damage.exit_code

    def as_dict(self) -> dict[str, Any]:
        """The fields and `intact` as plain JSON values."""
        return {**super().as_dict(), "intact": self.intact}


def verify_all(line: str | None, *, deep: bool, repair: bool) -> WholeVerification:
    """Verify one line or all of them, and every object of the store.

    Args:
        line: a line's name; None for all lines.
        deep: check every object of the store, whichever line it belongs to.
        repair: check every object, and repair damaged ones.

    Raises:
        BadInput: there is no such line, or no line at all.
        Unavailable: the store cannot be reached.
    """
    space = workspace()
    store = check_store(space, repair=repair) if deep or repair else None
    names = list(lines(space.objects)) if line is None else [line]
    if not names and (store is None or not store.objects):
        raise BadInput(
            "there is no line to verify",
            found=f"an empty store in {space.home.root}",
            hint="create a line with `restitch init FILE`, or set RESTITCH_HOME",
        )
    return WholeVerification(tuple(_verified(name, store) for name in names), store)


def _verified(line: str, store: StoreCheck | None) -> Verification:
    result = Verification(line)
    for each in () if store is None else store.damaged:
        if each.object == f"lines/{line}/head.json" and not each.mended:
            result.damaged(LINE_STATE, each.problem)
            return result
    try:
        return verify(line)
    except Damage as error:  # not even its state can be read
        result.damaged(LINE_STATE, error)
        return result
