"""Verify lines together with the store that they lie in, and mend it where that is asked for.

What is mended is mended first, so that what is said of the lines is said of what is there
then.
"""

from dataclasses import asdict, dataclass
from typing import Any

from restitch.flows.storage.repair import check_store
from restitch.flows.storage.store_check import StoreCheck
from restitch.flows.storage.verify import Verification, verify
from restitch.merging.errors import BadInput, Damage
from restitch.registry.ledger.ledger import lines
from restitch.tasks.runtime.workspace import workspace


@dataclass(frozen=True)
class WholeVerification:
    """What was found of lines and of their store.

    Attributes:
        lines: each line that was looked at.
        store: every object; None where only the lines were asked for.
    """

    lines: tuple[Verification, ...]
    store: StoreCheck | None

    @property
    def intact(self) -> bool:
        """Whether nothing is left damaged."""
        whole = self.store is None or self.store.intact
        return whole and all(line.intact for line in self.lines)

    @property
    def exit_code(self) -> int:
        """0, or that of damage."""
        return 0 if self.intact else Damage.exit_code

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        store = None if self.store is None else {**asdict(self.store), "intact": self.store.intact}
        return {
            "lines": [line.as_dict() for line in self.lines],
            "store": store,
            "intact": self.intact,
        }


def verify_all(line: str | None, *, deep: bool, repair: bool) -> WholeVerification:
    """Verify one line or all of them, and every object of the store.

    Args:
        line: a line's name; all lines without.
        deep: look at every object of the store, whatever line it belongs to.
        repair: mend what can be made again; every object is looked at for that.

    Raises:
        BadInput: there is no such line, or none at all.
        Unavailable: the store is away.
    """
    space = workspace()
    store = check_store(space, repair=repair) if deep or repair else None
    names = list(lines(space.objects)) if line is None else [line]
    if not names and (store is None or not store.objects):
        raise BadInput(
            "there is no line to verify",
            found=f"an empty store in {space.home.root}",
            hint="make a line with `restitch init FILE`, or set RESTITCH_HOME",
        )
    return WholeVerification(tuple(_verified(name, store) for name in names), store)


def _verified(line: str, store: StoreCheck | None) -> Verification:
    found = Verification(line)
    for each in () if store is None else store.damaged:
        if each.object == f"lines/{line}/head.json" and not each.mended:
            found.damaged("the head", each.problem)
            return found
    try:
        return verify(line)
    except Damage as error:  # not even its head can be read
        found.damaged("the head", error)
        return found
