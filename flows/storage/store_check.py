"""Compare every object of a store with its name, whichever line it belongs to.

Each damaged object is listed with its meaning, the owners that depend on it, and what a repair
would do. The check changes nothing; `storage.repair` repairs. Objects that nothing refers to are
listed, but they are not damage. A second check by the same `Checker` skips blobs that were intact.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from restitch.flows.outcome import Outcome
from restitch.flows.storage.mlflow_weights import compare_weights
from restitch.merging.errors import Damage, RestitchError, Unavailable
from restitch.merging.files.delta import open_delta
from restitch.registry.ledger.ledger import Ledger, state_after
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry, differences, replay, state_of
from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.maintenance.inventory import Inventory, in_use, take_inventory
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.store.attempts import Attempt
from restitch.registry.store.base import NotInStore
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.inputs.checkpoints import open_specialist
from restitch.tasks.research.experts import read_experts
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import Workspace

Answer = TypeVar("Answer")
# Names of objects, each with its problem.
Problems = Iterator[tuple[str, str]]

MLFLOW = "MLflow: "  # before the name of a line: its projection

_THREADS = 4
_SHOWN = 10


@dataclass
class Damaged:
    """A damaged object.

    Attributes:
        object: its name in the store, or `MLflow: LINE` for the projection of a line.
        what: its meaning, in each place that names it.
        depends: the lines, versions and models that need it.
        remedy: what `--repair` would do; None if only a backup helps.
        outcome: how it was repaired, or why it was not.
    """

    object: str
    problem: str
    what: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    remedy: str | None = None
    mended: bool = False
    outcome: str | None = None


@dataclass
class StoreCheck(Outcome):
    """The result for a store.

    Attributes:
        compared: blobs and acts that were compared with their digests.
        mlflow: lines whose projection in MLflow was compared.
        mlflow_weights: versions whose weights in MLflow were compared, byte for byte.
        orphans: objects that nothing refers to; `restitch gc` removes them.
        notes: unusual findings that are not damage.
    """

    objects: int = 0
    bytes: int = 0
    compared: int = 0
    mlflow: tuple[str, ...] = ()
    mlflow_weights: int = 0
    damaged: list[Damaged] = field(default_factory=list)
    orphans: tuple[str, ...] = ()
    orphan_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """True if nothing is left damaged."""
        return all(each.mended for each in self.damaged)

    def as_dict(self) -> dict[str, Any]:
        """The fields and `intact` as plain JSON values."""
        return {**super().as_dict(), "intact": self.intact}


class Projection:
    """The lines in MLflow. After MLflow was unavailable once, each question raises Unavailable."""

    def __init__(self, mlflow: MlflowProjection) -> None:
        self.mlflow = mlflow
        self.away: Unavailable | None = None

    def acts_shown(self, line: str) -> dict[str, str]:
        """The acts that MLflow shows."""
        return self._ask(lambda: self.mlflow.acts_shown(line))

    def copy_of(self, line: str, digest: str) -> bytes | None:
        """The copy of an act or a record in MLflow."""
        return self._ask(lambda: self.mlflow.copy_of(line, digest))

    def differences(self, ledger: Ledger) -> tuple[str, ...]:
        """The differences between MLflow and a line."""
        return self._ask(lambda: self.mlflow.differences(ledger))

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        if self.away is not None:
            raise self.away
        try:
            return question()
        except Unavailable as error:
            self.away = error
            raise


class Checker:
    """Repeated checks of one store."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.store = space.objects.store
        self.intact: set[str] = set()
        self.projection = Projection(space.mlflow)

    def check(self) -> tuple[StoreCheck, Inventory]:
        """Check every object once."""
        with working("reading references") as progress:
            inventory = take_inventory(self.space.objects, progress)
        problems = dict(inventory.damaged)
        problems |= self._missing(inventory)
        problems |= self._altered(inventory, problems)
        problems |= self._keys(inventory, problems)
        problems |= self._attempts(inventory)
        problems |= self._line_states(inventory)
        problems |= self._acts_shown(inventory)
        used = in_use(inventory, self.space.objects)
        orphans = [name for name in inventory.listed if name not in used]
        result = StoreCheck(
            objects=len(inventory.listed),
            bytes=sum(each.size for each in inventory.listed.values()),
            compared=len(self.intact) + len(inventory.entries),
            orphans=tuple(sorted(orphans)),
            orphan_bytes=sum(inventory.listed[name].size for name in orphans),
            notes=[f"{name} is of an unknown kind" for name in inventory.unknown],
        )
        result.damaged = [_described(inventory, *each) for each in sorted(problems.items())]
        self._projections(inventory, result)
        return result, inventory

    def _missing(self, inventory: Inventory) -> Problems:
        for name in (f"blobs/{digest}" for digest in inventory.references):
            if name not in inventory.listed and not self.store.exists(name):
                yield name, "it is missing"

    def _altered(self, inventory: Inventory, known: dict[str, str]) -> Problems:
        names = [
            name
            for name in inventory.listed
            if name.startswith("blobs/") and name not in self.intact and name not in known
        ]
        total = sum(inventory.listed[name].size for name in names)
        done = 0
        with (
            working(f"comparing {len(names)} objects with their digests") as progress,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for name, problem in zip(names, pool.map(self._compare, names), strict=True):
                if problem:
                    yield name, problem
                elif problem is None:
                    self.intact.add(name)
                done += inventory.listed[name].size
                progress(done, total)

    def _compare(self, name: str) -> str | None:
        """The problem of a blob; None if it is intact, "" if it has just been removed."""
        try:
            digest = self.store.digest(name)
        except NotInStore:
            return ""
        except Damage as error:
            return f"the server reports other bytes than were written: {error.found}"
        return None if f"blobs/{digest}" == name else f"its bytes have the digest {digest}"

    def _keys(self, inventory: Inventory, known: dict[str, str]) -> Problems:
        for name, key in inventory.keys.items():
            blob = f"blobs/{key.blob}"
            if blob in known:
                continue  # the blob is damaged, not the key
            listed = inventory.listed.get(blob)
            if listed is None:
                yield name, f"it names {blob}, which is missing"
            elif listed.size != key.size:
                yield name, f"it says {key.size} bytes, but {blob} has {listed.size}"
            elif problem := self._contradiction(name, key, known):
                yield name, problem

    def _contradiction(self, name: str, key: KeyRecord, known: dict[str, str]) -> str | None:
        """The first statement of a key that its blob contradicts."""
        _, kind, inputs = name.split("/")
        if kind == SPECIALISTS:
            return self._unusable_specialists(key, known)
        if kind not in ("mask", "patch"):
            return None
        try:
            file = open_delta(self.space.objects.blob_path(key.blob))
            kept = file.total
            if kind == "patch" and file.metadata.get("recipe") != inputs:
                return f"it names {key.blob}, which is the patch of another recipe"
            if kind == "mask" and file.content_digest() != key.facts.get("mask"):
                return f"it names {key.blob}, which has another mask"
        except RestitchError as error:
            return f"it names {key.blob}, which cannot be read: {error.summary}"
        stated = key.facts.get("kept")
        return None if kept == stated else f"it says {stated} weights, but {key.blob} has {kept}"

    def _unusable_specialists(self, key: KeyRecord, known: dict[str, str]) -> str | None:
        """The problem of specialists that cannot be opened together with their shared patch."""
        try:
            parts = read_experts(key.blob, self.space).parts
            if any(f"blobs/{part.blob}" in known for part in parts):
                return None  # the part is damaged, not the key
            for part in parts:
                open_specialist(part.blob, self.space)
        except RestitchError as error:
            return f"it names {key.blob}, and a part of it cannot be used: {error.summary}"
        return None

    def _attempts(self, inventory: Inventory) -> Problems:
        for name in inventory.listed:
            if name.startswith("attempts/") and name.endswith(".begun"):
                try:
                    facts = json.loads(self.store.read(name))
                    str(Attempt(0, facts)), facts["process_began"], facts["time"]
                except (ValueError, KeyError, TypeError):
                    if f"{name.removesuffix('begun')}ended" not in inventory.listed:
                        yield name, "it cannot be read"
                except NotInStore:
                    continue

    def _line_states(self, inventory: Inventory) -> Problems:
        for line, line_state in inventory.line_states.items():
            trail = inventory.trails[line]
            if is_complete(trail) and len(trail) == line_state.sequence:
                problem = trail_contradiction(line_state, trail[::-1])
                if problem is not None:
                    yield f"lines/{line}/head.json", problem

    def _acts_shown(self, inventory: Inventory) -> Problems:
        """Acts that only MLflow has. If a line's state is lost, nothing else names them."""
        for line in known_lines(inventory):
            with suppress(Unavailable):
                for digest in self.projection.acts_shown(line):
                    name = f"audit/{digest}"
                    if digest not in inventory.entries and name not in inventory.damaged:
                        yield name, "it is missing, but MLflow shows it"

    def _projections(self, inventory: Inventory, result: StoreCheck) -> None:
        """Compare MLflow with the lines whose state can be read."""
        compared = []
        for line in sorted(inventory.line_states):
            try:
                ledger = Ledger(self.space.objects, line)
                differences = self.projection.differences(ledger)
            except Unavailable as error:
                result.notes.append(f"MLflow was not compared with line {line}: {error.summary}")
                continue
            except Damage:
                continue  # listed with the damaged objects themselves
            compared.append(line)
            differences += self._weights(ledger, result)
            if differences:
                text = "; ".join(differences[:_SHOWN])
                text += "; ..." if len(differences) > _SHOWN else ""
                meaning = (f"the projection of line {line}",)
                remedy = "complete it from the trail"
                result.damaged.append(Damaged(f"{MLFLOW}{line}", text, meaning, remedy=remedy))
        result.mlflow = tuple(compared)

    def _weights(self, ledger: Ledger, result: StoreCheck) -> tuple[str, ...]:
        """The differences of the weights that MLflow keeps of a line."""
        try:
            found = compare_weights(ledger, self.space)
        except Damage:
            return ()  # listed with the damaged objects themselves
        except RestitchError as error:  # MLflow's artifacts or the base may be away
            result.notes.append(
                f"the weights of line {ledger.line} in MLflow were not compared: {error.summary}"
            )
            return ()
        result.mlflow_weights += len(found)
        return tuple(
            f"the weights of version {version} {difference}"
            for version, difference in found.items()
            if difference is not None
        )


def known_lines(inventory: Inventory) -> list[str]:
    """All lines that have a state or an act."""
    return sorted({*inventory.line_states, *(entry.line for entry in inventory.entries.values())})


def is_complete(trail: Sequence[Entry]) -> bool:
    """True if a trail, newest first, goes back to the first act of its line."""
    return bool(trail) and trail[-1].previous is None


def trail_contradiction(line_state: LineState, trail: Sequence[Entry]) -> str | None:
    """The first value in a line's state that its acts, oldest first, do not give.

    Acts of a version before an optional key existed do not hold it: it has its default.
    """
    try:
        given = state_of(state_after(trail))
    except ValidationError:
        given = replay(trail)
    replayed, stored = differences(given, state_of(line_state))
    paths = sorted({*replayed, *stored})
    if not paths:
        return None
    has, gives = (str(values.get(paths[0]))[:80] for values in (stored, replayed))
    return f"{paths[0]} is {has}, but its acts give {gives}"


def _described(inventory: Inventory, name: str, problem: str) -> Damaged:
    """A damaged object with its meaning and its owners."""
    kind, _, rest = name.partition("/")
    if kind == "lines":
        line = rest.partition("/")[0]
        return Damaged(name, problem, (f"the state of line {line}",), (f"line {line}",))
    if kind == "audit":
        trails = inventory.trails.items()
        holders = [line for line, trail in trails if trail and trail[-1].previous == rest]
        return Damaged(name, problem, ("an act",), tuple(f"the trail of line {h}" for h in holders))
    if kind == "keys":
        return Damaged(name, problem, (f"the key of a result ({rest.partition('/')[0]})",))
    if kind == "attempts":
        return Damaged(name, problem, ("an attempt to onboard a model",))
    references = inventory.references.get(rest, [])
    if not references:
        keys = tuple(f"the blob of {key}" for key in inventory.keys_of(rest))
        return Damaged(name, problem, keys or ("an object that nothing readable refers to",))
    meaning = tuple(dict.fromkeys(map(str, references)))
    owners = tuple(dict.fromkeys(f"{each.owner} of {each.line}" for each in references))
    return Damaged(name, problem, meaning, owners)
