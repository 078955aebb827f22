"""Remove objects that nothing in a store refers to.

`registry.maintenance.inventory` defines references: every object that a line's state, a record or
an audit entry names stays. Young objects stay as well, because work in progress may be about to
name them. Keys are removed before their blobs, and a process that publishes a key while its blob
is being removed takes the key back, so that no key is left without a blob, even after a kill.
`registry.ledger.safe_deletion` separates acts from removals. Nothing is removed from a damaged
store, because the damaged objects may refer to any other.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from restitch.flows.outcome import Outcome
from restitch.merging.errors import Damage
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.maintenance.inventory import Inventory, in_use, take_inventory
from restitch.registry.store.deletion_notice import deletion_notice
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import workspace

# The longest time that work may take from its first object to the act that names it.
DEFAULT_AGE = 24 * 3600.0

_THREADS = 8
_UNNAMED = "blobs that no key names"


@dataclass(frozen=True)
class GcOutcome(Outcome):
    """The objects that nothing refers to.

    Attributes:
        removed: whether they were removed, or only listed.
        kinds: the number and bytes of the objects, by kind.
        young: the number of other unreferenced objects, which are too young to remove.
        in_use: the number of objects that something refers to.
    """

    removed: bool
    objects: int
    bytes: int
    kinds: dict[str, dict[str, int]]
    names: tuple[str, ...]
    young: int
    in_use: int
    older_than: float


@dataclass(frozen=True)
class _Garbage:
    inventory: Inventory
    names: frozenset[str]
    young: int
    in_use: int


def collect(older_than: float = DEFAULT_AGE, *, remove: bool = False) -> GcOutcome:
    """Find objects that nothing refers to, and remove them on request.

    Args:
        older_than: objects younger than this number of seconds stay.
        remove: remove the objects; otherwise nothing changes.

    Raises:
        Damage: the store is damaged; nothing was removed.
        Unavailable: the store cannot be reached, or another process is removing objects.
    """
    objects = workspace().objects
    garbage = _find(objects, older_than)
    if not remove or not garbage.names:
        return _outcome(garbage, older_than, removed=remove)
    with deletion_notice(objects.store, sorted(garbage.names)):
        for line in garbage.inventory.line_states:
            Ledger(objects, line).touch()
        now = _find(objects, older_than)
        names = now.names & garbage.names
        # Blobs of other keys stay: a key may have been published before the deletion notice.
        keys = now.inventory.keys.items()
        named = {f"blobs/{key.blob}" for name, key in keys if name not in names}
        garbage = _Garbage(now.inventory, names - named, now.young, now.in_use)
        remove_objects(objects, now.inventory, garbage.names)
    return _outcome(garbage, older_than, removed=True)


def intact_inventory(objects: ObjectStore, assumed: LineState | None = None) -> Inventory:
    """Take the inventory of a store from which objects are about to be removed.

    Args:
        objects: the store.
        assumed: a state of a line that stands for the stored one.

    Raises:
        Damage: the store is damaged.
    """
    with working("reading references") as progress:
        inventory = take_inventory(objects, progress, assumed=assumed)
    if inventory.damaged:
        raise Damage(
            "nothing was removed: the store is damaged, and damaged objects may name others",
            found=f"{len(inventory.damaged)} damaged objects",
            hint="run `restitch verify --repair`, then run this command again",
            details=[f"{name}: {text}" for name, text in sorted(inventory.damaged.items())[:10]],
        )
    return inventory


def _find(objects: ObjectStore, older_than: float) -> _Garbage:
    limit = time.time() - older_than
    inventory = intact_inventory(objects)
    used = in_use(inventory, objects)
    young = {name for name, each in inventory.listed.items() if each.modified >= limit}
    # If a key or its blob is young, work in progress may be about to name either.
    for name, key in inventory.keys.items():
        blob = f"blobs/{key.blob}"
        if name in young or blob in young:
            young |= {name, blob} & inventory.listed.keys()
    free = inventory.listed.keys() - used
    return _Garbage(inventory, frozenset(free - young), len(free & young), len(used))


def remove_objects(
    objects: ObjectStore,
    inventory: Inventory,
    names: Iterable[str],
    *,
    last: Set[str] = frozenset(),
) -> None:
    """Remove objects, keys before blobs; the caller has posted a notice that lists them.

    Args:
        objects: the store.
        inventory: of the store, taken after the notice.
        names: of the objects.
        last: those of the names that are removed after all others, because they name others.
    """
    groups: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for name in sorted(names):
        groups[0 if name.startswith("keys/") else 2 if name in last else 1].append(name)
    total, done = sum(map(len, groups.values())), 0
    title = f"removing {total} objects"
    with working(title) as progress, ThreadPoolExecutor(_THREADS) as pool:
        for group in groups.values():
            for _ in pool.map(objects.store.remove, group):
                done += 1
                progress(done, total)
    # Remove keys that were published while their blob was being removed.
    gone = {name.rpartition("/")[2] for name in (*groups[1], *groups[2])}
    new = [name for name in objects.store.list("keys") if name not in inventory.keys]
    for name in new:
        key = objects.lookup(*name.split("/")[1:3])
        if key is not None and key.blob in gone and not objects.store.exists(f"blobs/{key.blob}"):
            objects.store.remove(name)


def _outcome(garbage: _Garbage, older_than: float, *, removed: bool) -> GcOutcome:
    kind_of = {key.blob: name.split("/")[1] for name, key in garbage.inventory.keys.items()}
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"objects": 0, "bytes": 0})
    for name in garbage.names:
        first, _, digest = name.partition("/")
        kind = first if first in ("keys", "offers") else kind_of.get(digest, _UNNAMED)
        kinds[kind]["objects"] += 1
        kinds[kind]["bytes"] += garbage.inventory.listed[name].size
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
