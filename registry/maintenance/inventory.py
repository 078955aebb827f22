"""All that a store holds, read once: what is there, what names it, and what cannot be read.

Small objects (heads, audit entries, records, keys, lists of files) are read and compared with
their digests; the bytes of other blobs are not looked at. Nothing is changed. `in_use` says
which objects something still refers to; it errs on the side of keeping.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import Damage
from restitch.merging.progress import Progress, ignore
from restitch.registry.ledger.line_state import LineState, ModelVersion
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.ledger.references import (
    COPY_SCHEME,
    MLFLOW_SCHEMES,
    SPECIALISTS,
    Reference,
    digests_in,
    of_acts,
    of_experts,
    of_line_state,
    of_manifest,
    of_record,
)
from restitch.registry.store.base import Listed, NotInStore
from restitch.registry.store.format import MARKER
from restitch.registry.store.objects import KeyRecord, ObjectStore, parsed, verified

# Small, and asked for by what they were made from, not by what names them: never removed.
_KEPT_KEYS = ("head", "rows", "analysis", SPECIALISTS)
_AT_ONCE = 8

Read = TypeVar("Read")


@dataclass
class Inventory:
    """What a store holds.

    Attributes:
        listed: every object by its name.
        trails: the acts of each line, newest first, as far as their chain holds.
        entries: all audit entries that can be read, by digest; also those in no trail.
        records: of merged versions, by digest.
        manifests: lists of a model's files, by digest.
        keys: by name.
        references: what heads and what they name refer to, by digest.
        damaged: what is missing or not what its name says, with what is wrong.
        unknown: names of no kind that this version knows.
    """

    listed: dict[str, Listed]
    line_states: dict[str, LineState] = field(default_factory=dict)
    trails: dict[str, list[Entry]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    records: dict[str, MergedRecord] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    references: dict[str, list[Reference]] = field(default_factory=lambda: defaultdict(list))
    damaged: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def refer(self, found: Iterable[Reference]) -> None:
        """Note references."""
        for reference in found:
            self.references[reference.digest].append(reference)

    def keys_of(self, blob: str) -> list[str]:
        """The names of the keys that name a blob."""
        return [name for name, key in self.keys.items() if key.blob == blob]


def take_inventory(objects: ObjectStore, progress: Progress = ignore) -> Inventory:
    """Read a store.

    Raises:
        Unavailable: it cannot be used.
    """
    # The heads last: what they name was there before them, and is listed or read by name.
    entries = _read_all(objects, _below(objects, "audit"), _entry, progress)
    keys = _read_all(objects, _below(objects, "keys"), lambda d, n: parsed(KeyRecord, d, n))
    heads = _read_all(objects, _heads(objects), lambda d, n: parsed(LineState, d, n))
    found = Inventory({each.name: each for each in objects.store.details()})
    found.damaged = {**entries.wrong, **keys.wrong, **heads.wrong}
    found.entries = {name.rpartition("/")[2]: entry for name, entry in entries.good.items()}
    found.keys = keys.good
    found.line_states = {name.split("/")[1]: line_state for name, line_state in heads.good.items()}
    kinds = ("audit", "blobs", "keys", "lines", "attempts", "turns", "gc", MARKER)
    found.unknown = [name for name in found.listed if name.split("/")[0] not in kinds]
    for line, line_state in found.line_states.items():
        found.trails[line] = _trail(found, objects, line_state)
        found.refer(of_line_state(line_state))
        found.refer(of_acts(found.trails[line]))
    for line in {entry.line for entry in found.entries.values()} - found.line_states.keys():
        found.damaged.setdefault(f"lines/{line}/head.json", "it is missing")
    _read_records(found, objects)
    _read_manifests(found, objects)
    _read_experts(found, objects)
    return found


def in_use(found: Inventory, objects: ObjectStore) -> set[str]:
    """The names of all objects that something refers to, or that are kept whatever does.

    Whatever a head, a record or any audit entry holds that looks like a digest counts as a
    reference, also in acts that are in no trail. A key is in use when its blob is. Where
    something is damaged, what it would have named is not known.
    """
    named = mentioned_digests(found)
    used = {name for name in found.listed if not name.startswith(("blobs/", "keys/"))}
    addresses = {digest_bytes(each.encode()) for each in named if each.startswith(MLFLOW_SCHEMES)}
    # What is being onboarded, or will be tried again, may ask for a mask that no act names yet.
    waiting = any(
        line_state.in_state("registered", "waiting") for line_state in found.line_states.values()
    )
    manifests = {each.removeprefix(COPY_SCHEME) for each in named if each.startswith(COPY_SCHEME)}
    # Those that are kept first: another key may name the same blob.
    for name, key in sorted(found.keys.items(), key=lambda item: _kind(item[0]) not in _KEPT_KEYS):
        kind, inputs = name.split("/")[1:3]
        if (
            kind in _KEPT_KEYS
            or key.blob in named
            or (kind == "source" and inputs in addresses)
            or (kind == "mask" and waiting)
        ):
            used.add(name)
            named.add(key.blob)
            if kind in ("source", SPECIALISTS):
                manifests.add(key.blob)
    for digest in manifests & {name.rpartition("/")[2] for name in found.listed}:
        with contextlib.suppress(Damage, ValueError):
            named.update(digests_in(json.loads(_manifest(found, objects, digest))))
    return used | {f"blobs/{each}" for each in named if f"blobs/{each}" in found.listed}


def _kind(key: str) -> str:
    return key.split("/")[1]


def mentioned_digests(found: Inventory) -> set[str]:
    """Every digest and address that stands in a head, a record or an act."""
    named: set[str] = set()
    for values in (found.line_states, found.entries, found.records):
        for each in values.values():
            named.update(digests_in(each.to_json()))
    return named


class _Outcome(NamedTuple, Generic[Read]):
    """What could be read, by name, and what is wrong with the rest."""

    good: dict[str, Read]
    wrong: dict[str, str]


def _read_all(
    objects: ObjectStore,
    names: list[str],
    parse: Callable[[bytes, str], Read],
    progress: Progress = ignore,
) -> _Outcome[Read]:
    def read(name: str) -> Read | Damage | None:
        try:
            return parse(objects.store.read(name), name)
        except NotInStore:  # removed since it was listed
            return None
        except Damage as error:
            return error

    outcome: _Outcome[Read] = _Outcome({}, {})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, (name, found) in enumerate(zip(names, pool.map(read, names), strict=True), 1):
            progress(done, len(names))
            if isinstance(found, Damage):
                outcome.wrong[name] = _said(found)
            elif found is not None:
                outcome.good[name] = found
    return outcome


def _below(objects: ObjectStore, prefix: str) -> list[str]:
    return list(objects.store.list(prefix))


def _heads(objects: ObjectStore) -> list[str]:
    return [name for name in objects.store.list("lines") if name.endswith("/head.json")]


def _entry(data: bytes, name: str) -> Entry:
    return parsed(Entry, verified(data, name.rpartition("/")[2], name), name)


def _trail(found: Inventory, objects: ObjectStore, line_state: LineState) -> list[Entry]:
    """The acts that led to a head, newest first, up to the first that is damaged."""
    trail: list[Entry] = []
    digest = line_state.entry
    while digest is not None:
        name = f"audit/{digest}"
        if digest not in found.entries and name not in found.damaged:
            # One that was written since the entries were listed, or none.
            late = _read_all(objects, [name], _entry)
            found.damaged |= late.wrong or ({} if late.good else {name: "it is missing"})
            for entry in late.good.values():
                found.entries[digest] = entry
        if digest not in found.entries:
            break
        trail.append(found.entries[digest])
        digest = trail[-1].previous
    return trail


def _read_records(found: Inventory, objects: ObjectStore) -> None:
    """The records of all merged versions that a head has or an act has made."""
    of_heads = {
        digest
        for line_state in found.line_states.values()
        for digest in line_state.versions.values()
    }
    of_acts = {
        str(value)
        for entry in found.entries.values()
        for pointer, value in entry.after.items()
        if pointer.startswith("/versions/") and pointer.count("/") == 2
    }
    for digest in sorted(of_heads | of_acts):
        try:
            record = parsed(MergedRecord, objects.read_blob(digest), f"blobs/{digest}")
        except Damage as error:
            # An act that lost its race may name what was never there.
            if digest in of_heads or f"blobs/{digest}" in found.listed:
                found.damaged[f"blobs/{digest}"] = _said(error)
            continue
        found.records[digest] = record
        if digest in of_heads:
            found.refer(of_record(record))


def _read_manifests(found: Inventory, objects: ObjectStore) -> None:
    """The files of the models that heads name, whose copies are in the store."""
    manifests = [r for some in found.references.values() for r in some if r.role == "manifest"]
    for line_state in found.line_states.values():
        for task, number, model in _models(line_state):
            if model.model.uri.startswith(MLFLOW_SCHEMES):
                key = found.keys.get(f"keys/source/{digest_bytes(model.model.uri.encode())}")
                if key is not None:
                    owner = f"{task} {number}"
                    one = Reference(key.blob, "manifest", line_state.line, owner, model.model.uri)
                    found.refer([one])
                    manifests.append(one)
    for manifest in manifests:
        try:
            data = _manifest(found, objects, manifest.digest)
            found.refer(list(of_manifest(data, manifest)))
        except (Damage, ValueError) as error:
            text = _said(error) if isinstance(error, Damage) else "it is no list of files"
            found.damaged[f"blobs/{manifest.digest}"] = text


def _read_experts(found: Inventory, objects: ObjectStore) -> None:
    """The parts of the specialists that versions keep."""
    for name, key in found.keys.items():
        if _kind(name) != SPECIALISTS:
            continue
        line, version = str(key.facts.get("line")), key.facts.get("version")
        number = version if isinstance(version, int) else 0
        one = Reference(key.blob, "experts", line, f"version {number}", number=number)
        found.refer([one])
        try:
            found.refer(list(of_experts(_manifest(found, objects, key.blob), one)))
        except (Damage, ValueError) as error:
            text = _said(error) if isinstance(error, Damage) else "it is no list of specialists"
            found.damaged[f"blobs/{key.blob}"] = text


def _models(line_state: LineState) -> list[tuple[str, int, ModelVersion]]:
    return [(n, v, m) for n, task in line_state.tasks.items() for v, m in task.versions.items()]


def _manifest(found: Inventory, objects: ObjectStore, digest: str) -> bytes:
    if digest not in found.manifests:
        found.manifests[digest] = objects.read_blob(digest)
    return found.manifests[digest]


def _said(error: Damage) -> str:
    """What is wrong, in a few words: the object is named beside it."""
    if error.found is not None and error.expected is not None and len(error.expected) == 64:
        return f"its bytes have the digest {error.found}"
    if "missing" in error.summary:
        return "it is missing"
    return f"it cannot be read: {error.found or error.summary}"
