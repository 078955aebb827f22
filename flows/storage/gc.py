"""Remove from a store what nothing refers to.

What counts as a reference is in `restitch.registry.maintenance.inventory`: whatever a head, a record or any audit
entry names stays for ever, and so does what was written less than an age ago, which work
under way may be about to name. Keys go before the blobs that they name, and whoever publishes
a key that came while its blob was being removed takes it back, so that nothing that is killed
leaves a key that leads nowhere. `restitch.registry.ledger.safe_deletion` keeps acts apart from it. In a damaged store
nothing is removed: what is damaged may have named anything.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from restitch.merging.errors import Damage
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.maintenance.inventory import Inventory, in_use, take_inventory
from restitch.registry.store.deletion_notice import deletion_notice
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import workspace

# As long as work may take from its first object to the act that names it.
DEFAULT_AGE = 24 * 3600.0

_AT_ONCE = 8
_UNNAMED = "blobs that no key names"


@dataclass(frozen=True)
class GcOutcome:
    """What nothing refers to, and what became of it.

    Attributes:
        removed: whether it was removed; otherwise this is what would be.
        kinds: objects and bytes by kind.
        names: the objects.
        young: how many more there are that nothing refers to and that are younger than the age.
        in_use: how many objects stay because something refers to them.
    """

    removed: bool
    objects: int
    bytes: int
    kinds: dict[str, dict[str, int]]
    names: tuple[str, ...]
    young: int
    in_use: int
    older_than: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Garbage:
    found: Inventory
    names: frozenset[str]
    young: int
    in_use: int


def collect(older_than: float = DEFAULT_AGE, *, remove: bool = False) -> GcOutcome:
    """Find what nothing refers to, and remove it where that is asked for.

    Args:
        older_than: what was written less than so many seconds ago stays.
        remove: remove it; otherwise nothing is changed.

    Raises:
        Damage: something is damaged; nothing is removed.
        Unavailable: the store is away, or somebody else is removing.
    """
    objects = workspace().objects
    garbage = _look(objects, older_than)
    if not remove or not garbage.names:
        return _outcome(garbage, older_than, removed=remove)
    with deletion_notice(objects.store, sorted(garbage.names)):
        for line in garbage.found.line_states:
            Ledger(objects, line).touch()
        again = _look(objects, older_than)
        names = again.names & garbage.names
        # Who published these keys looked before the announcement: their blobs stay.
        new = {f"blobs/{key.blob}" for name, key in again.found.keys.items() if name not in names}
        garbage = _Garbage(again.found, names - new, again.young, again.in_use)
        _remove(objects, garbage)
    return _outcome(garbage, older_than, removed=True)


def _look(objects: ObjectStore, older_than: float) -> _Garbage:
    limit = time.time() - older_than
    with working("looking at what refers to what") as progress:
        found = take_inventory(objects, progress)
    if found.damaged:
        raise Damage(
            "the store is damaged, and what the damaged objects name is not known",
            found=f"{len(found.damaged)} damaged objects; nothing was removed",
            hint="restitch verify --repair, then again",
            details=[f"{name}: {text}" for name, text in sorted(found.damaged.items())[:10]],
        )
    used = in_use(found, objects)
    young = {name for name, each in found.listed.items() if each.modified >= limit}
    # A young key may be about to be named, and so may its blob; and the other way round.
    for name, key in found.keys.items():
        blob = f"blobs/{key.blob}"
        if name in young or blob in young:
            young |= {name, blob} & found.listed.keys()
    free = found.listed.keys() - used
    return _Garbage(found, frozenset(free - young), len(free & young), len(used))


def _remove(objects: ObjectStore, garbage: _Garbage) -> None:
    keys = sorted(name for name in garbage.names if name.startswith("keys/"))
    blobs = sorted(garbage.names - set(keys))
    with working(f"removing {len(garbage.names)} objects") as progress:

        def done(number: int) -> None:
            progress(number, len(garbage.names))

        _each(objects.store.remove, keys, done)
        _each(objects.store.remove, blobs, lambda number: done(len(keys) + number))
    # A key that was published while its blob was being removed leads nowhere.
    gone = {name.rpartition("/")[2] for name in blobs}
    new = [name for name in objects.store.list("keys") if name not in garbage.found.keys]
    for name in new:
        key = objects.lookup(*name.split("/")[1:3])
        if key is not None and key.blob in gone and not objects.store.exists(f"blobs/{key.blob}"):
            objects.store.remove(name)


def _each(do: Callable[[str], object], names: Iterable[str], done: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(do, names), 1):
            done(number)


def _outcome(garbage: _Garbage, older_than: float, *, removed: bool) -> GcOutcome:
    kind_of = {key.blob: name.split("/")[1] for name, key in garbage.found.keys.items()}
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"objects": 0, "bytes": 0})
    for name in garbage.names:
        first, _, digest = name.partition("/")
        kind = "keys" if first == "keys" else kind_of.get(digest, _UNNAMED)
        kinds[kind]["objects"] += 1
        kinds[kind]["bytes"] += garbage.found.listed[name].size
    return GcOutcome(
        removed=removed,
        objects=len(garbage.names),
        bytes=sum(each["bytes"] for each in kinds.values()),
        kinds=dict(sorted(kinds.items())),
        names=tuple(sorted(garbage.names)),
        young=garbage.young,
        in_use=garbage.in_use,
        older_than=older_than,
    )
