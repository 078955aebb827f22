"""The inventory of a store: every object, what refers to it, and what cannot be read.

Small objects (line states, audit entries, records, keys, manifests) are read and compared with
their digests; the bytes of other blobs are not read. Nothing is changed. `in_use` says which
objects something still refers to; in doubt it keeps them.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import Damage
from restitch.merging.progress import Progress, ignore
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.outcomes import touched_models
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.ledger.references import (
    COPY_SCHEME,
    MLFLOW_SCHEMES,
    PURGED,
    SPECIALISTS,
    Reference,
    digests_in,
    of_acts,
    of_experts,
    of_line_state,
    of_manifest,
    of_purged_models,
    of_record,
)
from restitch.registry.store.base import Listed, NotInStore, Store
from restitch.registry.store.format import MARKER
from restitch.registry.store.objects import KeyRecord, ObjectStore, parsed, verified

# What the names of objects begin with.
_KINDS = ("audit", "blobs", "keys", "lines", "attempts", "leases", "offers", "models", "gc", MARKER)
# Kinds of small results that are looked up by their inputs, so no reference shows their use.
_KEPT_KEYS = ("head", "rows", "analysis", SPECIALISTS)
# Kinds of pieces of work that a process offers to others, which it needs until all are there.
_PIECES = ("part", "shard")
# A living process renews its offer twice a minute.
_ENDED_AFTER = 3600.0
_AT_ONCE = 8

Read = TypeVar("Read")


@dataclass
class Inventory:
    """The contents of a store.

    Attributes:
        listed: every object by name.
        line_states: the states of the lines by name.
        trails: the acts of each line, newest first, up to the first damaged one.
        entries: all readable audit entries by digest, including those in no trail.
        records: of merged versions, by digest.
        manifests: lists of a model's files, by digest.
        keys: by name.
        references: the direct and indirect references of the lines' states, by digest.
        purged: the references that purged models and versions had, by digest.
        lists: the blobs that the acts of purges name, each with the digest of the weights from
            which it was derived if nothing but a key referred to it.
        damaged: missing or damaged objects by name, with the problem.
        unknown: names of objects of an unknown kind.
    """

    listed: dict[str, Listed] = field(default_factory=dict)
    line_states: dict[str, LineState] = field(default_factory=dict)
    trails: dict[str, list[Entry]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    records: dict[str, MergedRecord] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    references: dict[str, list[Reference]] = field(default_factory=lambda: defaultdict(list))
    purged: dict[str, list[Reference]] = field(default_factory=lambda: defaultdict(list))
    lists: dict[str, str | None] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def refer(self, references: Iterable[Reference], *, purged: bool = False) -> None:
        """Add references, or those of something purged."""
        for reference in references:
            (self.purged if purged else self.references)[reference.digest].append(reference)

    def keys_of(self, blob: str) -> list[str]:
        """The names of the keys of a blob."""
        return [name for name, key in self.keys.items() if key.blob == blob]


def take_inventory(
    objects: ObjectStore, progress: Progress = ignore, *, assumed: LineState | None = None
) -> Inventory:
    """Take the inventory of a store.

    Args:
        objects: the store.
        progress: called while small objects are read.
        assumed: a state of one line that is used in place of its present one.

    Raises:
        Unavailable: it cannot be used.
    """
    inventory, store = Inventory(), objects.store
    entries = _read_all(inventory, store, store.list("audit"), _entry, progress)
    inventory.entries = {name.rpartition("/")[2]: entry for name, entry in entries.items()}
    keys = store.list("keys")
    inventory.keys = _read_all(inventory, store, keys, lambda d, n: parsed(KeyRecord, d, n))
    # The lines' states are read last: what they refer to was stored before.
    paths = (name for name in store.list("lines") if name.endswith("/head.json"))
    states = _read_all(inventory, store, paths, lambda d, n: parsed(LineState, d, n))
    inventory.line_states = {name.split("/")[1]: state for name, state in states.items()}
    if assumed is not None:
        inventory.line_states[assumed.line] = assumed
    inventory.listed = {each.name: each for each in store.details()}
    inventory.unknown = [name for name in inventory.listed if name.split("/")[0] not in _KINDS]
    for line, line_state in inventory.line_states.items():
        inventory.trails[line] = _trail(inventory, objects, line_state)
        inventory.refer(of_line_state(line_state))
        inventory.refer(of_purged_models(line_state), purged=True)
        for entry in inventory.trails[line]:
            inventory.refer(of_acts([entry]), purged=_is_about_purged(entry, line_state))
    for line in {entry.line for entry in inventory.entries.values()} - inventory.line_states.keys():
        inventory.damaged.setdefault(f"lines/{line}/head.json", "it is missing")
    _read_records(inventory, objects)
    _read_manifests(inventory, objects)
    _read_experts(inventory, objects)
    _read_lists(inventory, objects)
    return inventory


def in_use(inventory: Inventory, objects: ObjectStore) -> set[str]:
    """The names of all objects that something refers to, and of those that are never removed.

    Anything that looks like a digest in a line's state, a record or an audit entry counts as a
    reference, even in acts that are in no trail. A key is in use if its blob is. The references
    of damaged objects are unknown. Pieces of work stay while any process offers work.
    """
    named = mentioned_digests(inventory)
    used = {
        name for name in inventory.listed if not name.startswith(("blobs/", "keys/", "offers/"))
    }
    since = time.time() - _ENDED_AFTER
    alive = {
        name
        for name, each in inventory.listed.items()
        if name.startswith("offers/") and each.modified >= since
    }
    used |= alive
    purged = purged_objects(inventory)
    addresses = {digest_bytes(each.encode()) for each in named if each.startswith(MLFLOW_SCHEMES)}
    # A model that is being onboarded may need a mask that no act refers to yet.
    waiting = any(s.in_state("registered", "waiting") for s in inventory.line_states.values())
    manifests = {each.removeprefix(COPY_SCHEME) for each in named if each.startswith(COPY_SCHEME)}
    # Keys that are never removed come first: another key may name the same blob.
    for name in sorted(inventory.keys, key=lambda name: _kind(name) not in _KEPT_KEYS):
        key = inventory.keys[name]
        kind, inputs = name.split("/")[1:3]
        if name in purged:
            continue
        if (
            kind in _KEPT_KEYS
            or key.blob in named
            or (kind == "source" and inputs in addresses)
            or (kind == "mask" and waiting)
            or (kind in _PIECES and alive)
        ):
            used.add(name)
            named.add(key.blob)
            if kind in ("source", SPECIALISTS):
                manifests.add(key.blob)
    for digest in manifests & {name.rpartition("/")[2] for name in inventory.listed}:
        with contextlib.suppress(Damage, ValueError):
            named.update(digests_in(json.loads(_manifest(inventory, objects, digest))))
    used |= {f"blobs/{each}" for each in named if f"blobs/{each}" in inventory.listed}
    return used - purged


def purged_objects(inventory: Inventory) -> set[str]:
    """The names of the objects that purges removed or should have removed.

    An object stays if anything else refers to it. One that was only derived from the weights of
    purged models stays as long as another model has these weights.
    """
    needed = {f"blobs/{digest}" for digest in inventory.references}
    alive = {
        model.model.weights
        for line_state in inventory.line_states.values()
        for _, model in line_state.models
        if model.facts.purged is None
    }
    gone = {f"blobs/{digest}" for digest in inventory.purged}
    gone |= {name for name, weights in inventory.lists.items() if weights not in alive}
    gone = (gone & inventory.listed.keys()) - needed
    return gone | {name for name, key in inventory.keys.items() if f"blobs/{key.blob}" in gone}


def _is_about_purged(entry: Entry, line_state: LineState) -> bool:
    """True if an act made the mask of a model that was purged later."""
    models = () if entry.kind == "purged" else touched_models(entry)
    return any(line_state.model(key).facts.purged is not None for key in models)


def _kind(key: str) -> str:
    return key.split("/")[1]


def mentioned_digests(inventory: Inventory) -> set[str]:
    """Every digest and address in a line's state, a record or an act."""
    named: set[str] = set()
    for values in (inventory.line_states, inventory.entries, inventory.records):
        for each in values.values():
            named.update(digests_in(each.to_json()))
    return named


def _read_all(
    inventory: Inventory,
    store: Store,
    listed: Iterable[str],
    parse: Callable[[bytes, str], Read],
    progress: Progress = ignore,
) -> dict[str, Read]:
    """The objects that can be read, by name; the inventory gets the problems of the others."""

    def read(name: str) -> Read | Damage | None:
        try:
            return parse(store.read(name), name)
        except NotInStore:  # removed since it was listed
            return None
        except Damage as error:
            return error

    names = list(listed)
    values: dict[str, Read] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, (name, result) in enumerate(zip(names, pool.map(read, names), strict=True), 1):
            progress(done, len(names))
            if isinstance(result, Damage):
                inventory.damaged[name] = _problem(result)
            elif result is not None:
                values[name] = result
    return values


def _entry(data: bytes, name: str) -> Entry:
    return parsed(Entry, verified(data, name.rpartition("/")[2], name), name)


def _trail(inventory: Inventory, objects: ObjectStore, line_state: LineState) -> list[Entry]:
    """The acts that led to a line's state, newest first, up to the first damaged one."""
    trail: list[Entry] = []
    digest = line_state.entry
    while digest is not None:
        name = f"audit/{digest}"
        if digest not in inventory.entries and name not in inventory.damaged:
            # It may have been written since the entries were listed.
            late = _read_all(inventory, objects.store, [name], _entry)
            if name in late:
                inventory.entries[digest] = late[name]
        if digest not in inventory.entries:
            inventory.damaged.setdefault(name, "it is missing")
            break
        trail.append(inventory.entries[digest])
        digest = trail[-1].previous
    return trail


def _read_records(inventory: Inventory, objects: ObjectStore) -> None:
    """Read the records of all merged versions that a line's state or an act names."""
    in_states = {d for state in inventory.line_states.values() for d in state.versions.values()}
    in_acts = {
        str(value)
        for entry in inventory.entries.values()
        for pointer, value in entry.after.items()
        if pointer.startswith("/versions/") and pointer.count("/") == 2
    }
    for digest in sorted(in_states | in_acts):
        try:
            record = parsed(MergedRecord, objects.read_blob(digest), f"blobs/{digest}")
        except Damage as error:
            # An act that lost its race may name a record that was never stored.
            if digest in in_states or f"blobs/{digest}" in inventory.listed:
                inventory.damaged[f"blobs/{digest}"] = _problem(error)
            continue
        inventory.records[digest] = record
        if digest in in_states:
            line_state = inventory.line_states.get(record.line)
            purged = line_state is not None and record.version in line_state.purged
            inventory.refer(of_record(record), purged=purged)


def _read_manifests(inventory: Inventory, objects: ObjectStore) -> None:
    """Read the manifests of models whose copies are in the store, or were until a purge."""
    manifests = [
        (reference, purged)
        for purged, by_digest in ((False, inventory.references), (True, inventory.purged))
        for some in by_digest.values()
        for reference in some
        if reference.role == "manifest"
    ]
    for line_state in inventory.line_states.values():
        for owner, model in line_state.models:
            if model.model.uri.startswith(MLFLOW_SCHEMES):
                key = inventory.keys.get(f"keys/source/{digest_bytes(model.model.uri.encode())}")
                if key is not None:
                    line, uri = line_state.line, model.model.uri
                    one = Reference(key.blob, "manifest", line, str(owner), uri)
                    purged = model.facts.purged is not None
                    inventory.refer([one], purged=purged)
                    manifests.append((one, purged))
    for manifest, purged in manifests:
        _refer_to_parts(inventory, objects, manifest, of_manifest, "files", purged=purged)


def _read_experts(inventory: Inventory, objects: ObjectStore) -> None:
    """Read the lists of the specialists that versions keep."""
    for name, key in inventory.keys.items():
        if _kind(name) != SPECIALISTS:
            continue
        line, version = str(key.facts.get("line")), key.facts.get("version")
        number = version if isinstance(version, int) else 0
        one = Reference(key.blob, "experts", line, f"version {number}", number=number)
        line_state = inventory.line_states.get(line)
        purged = line_state is not None and number in line_state.purged
        inventory.refer([one], purged=purged)
        _refer_to_parts(inventory, objects, one, of_experts, "specialists", purged=purged)


def _refer_to_parts(
    inventory: Inventory,
    objects: ObjectStore,
    manifest: Reference,
    parts: Callable[[bytes, Reference], Iterable[Reference]],
    of: str,
    *,
    purged: bool,
) -> None:
    if purged and f"blobs/{manifest.digest}" not in inventory.listed:
        return
    try:
        references = list(parts(_manifest(inventory, objects, manifest.digest), manifest))
        inventory.refer(references, purged=purged)
    except (Damage, ValueError) as error:
        text = _problem(error) if isinstance(error, Damage) else f"it is not a list of {of}"
        inventory.damaged[f"blobs/{manifest.digest}"] = text


def _read_lists(inventory: Inventory, objects: ObjectStore) -> None:
    """Read which objects the acts of purges name."""
    for trail in inventory.trails.values():
        for entry in trail:
            if entry.kind == "purged" and PURGED in entry.digests:
                digest = entry.digests[PURGED]
                try:
                    values = json.loads(_manifest(inventory, objects, digest))
                    # A key is known by its blob: the same key may have been published again.
                    blobs = [each for each in values if each["object"].startswith("blobs/")]
                    inventory.lists |= {each["object"]: each["weights"] for each in blobs}
                except Damage as error:
                    inventory.damaged[f"blobs/{digest}"] = _problem(error)


def _manifest(inventory: Inventory, objects: ObjectStore, digest: str) -> bytes:
    if digest not in inventory.manifests:
        inventory.manifests[digest] = objects.read_blob(digest)
    return inventory.manifests[digest]


def _problem(error: Damage) -> str:
    """The problem in a few words, without the name of the object."""
    if error.found is not None and error.expected is not None and len(error.expected) == 64:
        return f"its bytes have the digest {error.found}"
    if "missing" in error.summary:
        return "it is missing"
    return f"it cannot be read: {error.found or error.summary}"
