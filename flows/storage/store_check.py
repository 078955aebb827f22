"""Is a store what its names say? Every object against its digest, of whatever line or of none.

What is damaged is told with what it is, what depends on it, and from what it can be made
again; nothing is changed (`restitch.flows.storage.repair` mends). What nothing refers to is listed and is no
damage. Blobs that were found whole are not looked at again within one check.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from restitch.merging.digests import canonical_json
from restitch.merging.errors import Damage, RestitchError, Unavailable
from restitch.merging.files.sparse import SparseFile
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.records import Entry, replay, state_of
from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.maintenance.inventory import Inventory, in_use, take_inventory
from restitch.registry.mlflow.sync import MlflowProjection
from restitch.registry.store.attempts import Attempt
from restitch.registry.store.base import NotInStore
from restitch.registry.store.objects import KeyRecord, ObjectStore
from restitch.tasks.inputs.checkpoints import open_specialist
from restitch.tasks.research.experts import read_experts
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import Workspace

Answer = TypeVar("Answer")

_AT_ONCE = 4
MLFLOW = "MLflow"


@dataclass
class Damaged:
    """An object that is not what it should be.

    Attributes:
        object: its name in the store; for MLflow's image `MLflow: LINE`.
        problem: what is wrong with it.
        what: what it is, in each place that names it.
        depends: the lines, versions and models that need it.
        remedy: from what it can be made again; None: only from a backup.
        mended: whether it was.
        outcome: how it was, or why it could not be.
    """

    object: str
    problem: str
    what: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    remedy: str | None = None
    mended: bool = False
    outcome: str | None = None


@dataclass
class StoreCheck:
    """What was looked at, and what was found.

    Attributes:
        objects: how many there are.
        bytes: what they take.
        compared: blobs and acts whose bytes were compared with their digest.
        mlflow: the lines whose image in MLflow was compared.
        orphans: what nothing refers to; `restitch gc` removes it.
        notes: what is odd and no damage.
    """

    objects: int = 0
    bytes: int = 0
    compared: int = 0
    mlflow: tuple[str, ...] = ()
    damaged: list[Damaged] = field(default_factory=list)
    orphans: tuple[str, ...] = ()
    orphan_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing is left damaged."""
        return all(each.mended for each in self.damaged)


class Image:
    """MLflow's image of the lines, which is asked no more once it was away."""

    def __init__(self, mlflow: MlflowProjection) -> None:
        self.mlflow = mlflow
        self.away: Unavailable | None = None

    def acts_shown(self, line: str) -> dict[str, str]:
        """The acts that it shows; each of these raises Unavailable where MLflow is away."""
        return self._ask(lambda: self.mlflow.acts_shown(line))

    def copy_of(self, line: str, digest: str) -> bytes | None:
        """What it has kept of an act or a record."""
        return self._ask(lambda: self.mlflow.copy_of(line, digest))

    def differences(self, ledger: Ledger) -> tuple[str, ...]:
        """What it shows otherwise than the line is."""
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
    """Checks of one store, each of which knows what the ones before have found whole."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.objects: ObjectStore = space.objects
        self.whole: set[str] = set()
        self.image = Image(space.mlflow)

    def check(self) -> tuple[StoreCheck, Inventory]:
        """Look at everything once."""
        with working("reading what names what") as progress:
            found = take_inventory(self.objects, progress)
        problems = dict(found.damaged)
        problems |= self._missing(found)
        problems |= self._altered(found, problems)
        problems |= self._keys(found, problems)
        problems |= self._attempts(found)
        problems |= self._heads(found)
        problems |= self._acts_shown(found)
        used = in_use(found, self.objects)
        orphans = [name for name in found.listed if name not in used]
        result = StoreCheck(
            objects=len(found.listed),
            bytes=sum(each.size for each in found.listed.values()),
            compared=len(self.whole) + len(found.entries),
            orphans=tuple(sorted(orphans)),
            orphan_bytes=sum(found.listed[name].size for name in orphans),
            notes=[f"{name} is of no kind that this version knows" for name in found.unknown],
        )
        result.damaged = [_described(found, name, text) for name, text in sorted(problems.items())]
        self._images(found, result)
        return result, found

    def _missing(self, found: Inventory) -> dict[str, str]:
        names = [f"blobs/{digest}" for digest in found.references]
        return {
            name: "it is missing"
            for name in names
            if name not in found.listed and not self.objects.store.exists(name)
        }

    def _altered(self, found: Inventory, known: dict[str, str]) -> dict[str, str]:
        names = [
            name
            for name in found.listed
            if name.startswith("blobs/") and name not in self.whole and name not in known
        ]
        total = sum(found.listed[name].size for name in names)
        wrong, done = {}, 0
        with (
            working(f"comparing {len(names)} objects with their digests") as progress,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            for name, problem in zip(names, pool.map(self._compare, names), strict=True):
                if problem:
                    wrong[name] = problem
                elif problem is None:
                    self.whole.add(name)
                done += found.listed[name].size
                progress(done, total)
        return wrong

    def _compare(self, name: str) -> str | None:
        """What is wrong with a blob; nothing (an empty text) where it was removed meanwhile."""
        try:
            digest = self.objects.store.digest(name)
        except NotInStore:
            return ""
        except Damage as error:
            return f"the server says that it is not what was written: {error.found}"
        return None if f"blobs/{digest}" == name else f"its bytes have the digest {digest}"

    def _keys(self, found: Inventory, known: dict[str, str]) -> dict[str, str]:
        wrong = {}
        for name, key in found.keys.items():
            blob = f"blobs/{key.blob}"
            if blob in known:
                continue  # it is the blob that is damaged
            there = found.listed.get(blob)
            if there is None:
                wrong[name] = f"it names {blob}, which is not there"
            elif there.size != key.size:
                wrong[name] = f"it gives {blob} {key.size} bytes, which has {there.size}"
            elif problem := self._contradiction(name, key, known):
                wrong[name] = problem
        return wrong

    def _contradiction(self, name: str, key: KeyRecord, known: dict[str, str]) -> str | None:
        """What a key says of its blob that is not so, where the blob itself can tell."""
        _, kind, inputs = name.split("/")
        if kind == SPECIALISTS:
            return self._unfit_experts(key, known)
        if kind not in ("mask", "patch"):
            return None
        try:
            file = SparseFile.open(self.objects.blob_path(key.blob))
            kept = sum(file.info(each).kept for each in file.names)
            if kind == "patch" and file.metadata.get("recipe") != inputs:
                return f"it names {key.blob}, which is the patch of another recipe"
            if kind == "mask" and file.mask().digest() != key.facts.get("mask"):
                return f"it gives {key.blob} another mask than it has"
        except RestitchError as error:
            return f"it names {key.blob}, which cannot be read: {error.summary}"
        return None if kept == key.facts.get("kept") else f"it gives {key.blob} another size"

    def _unfit_experts(self, key: KeyRecord, known: dict[str, str]) -> str | None:
        """Whether specialists can be read, each with the patch that it selects from."""
        try:
            parts = read_experts(key.blob, self.space).parts
            if any(f"blobs/{part.blob}" in known for part in parts):
                return None  # it is the part that is damaged
            for part in parts:
                open_specialist(part.blob, self.space)
        except RestitchError as error:
            return f"it names {key.blob}, of which a part cannot be used: {error.summary}"
        return None

    def _attempts(self, found: Inventory) -> dict[str, str]:
        wrong = {}
        for name in found.listed:
            if name.startswith("attempts/") and name.endswith(".begun"):
                try:
                    facts = json.loads(self.objects.store.read(name))
                    str(Attempt(0, facts)), facts["process_began"], facts["time"]
                except (ValueError, KeyError, TypeError):
                    ended = name.removesuffix("begun") + "ended"
                    if ended not in found.listed:
                        wrong[name] = "it cannot be read"
                except NotInStore:
                    continue
        return wrong

    def _heads(self, found: Inventory) -> dict[str, str]:
        wrong = {}
        for line, line_state in found.line_states.items():
            trail = found.trails[line]
            whole = trail and trail[-1].previous is None and len(trail) == line_state.sequence
            if whole and canonical_json(replay(trail[::-1])) != canonical_json(
                state_of(line_state)
            ):
                wrong[f"lines/{line}/head.json"] = "it says something else than its acts"
        return wrong

    def _acts_shown(self, found: Inventory) -> dict[str, str]:
        """Acts that only MLflow has: a head that is gone cannot say that they were."""
        wrong = {}
        for line in {*found.line_states, *(entry.line for entry in found.entries.values())}:
            with suppress(Unavailable):
                for digest in self.image.acts_shown(line):
                    if digest not in found.entries:
                        wrong[f"audit/{digest}"] = "it is missing, and MLflow shows it"
        return {name: text for name, text in wrong.items() if name not in found.damaged}

    def _images(self, found: Inventory, result: StoreCheck) -> None:
        """Compare MLflow with the heads of lines that can be read."""
        compared = []
        for line in sorted(found.line_states):
            try:
                ledger = Ledger(self.objects, line)
                wrong = self.image.differences(ledger)
            except Unavailable as error:
                result.notes.append(f"MLflow is not compared with line {line}: {error.summary}")
                continue
            except Damage:
                continue  # which is told of the objects themselves
            compared.append(line)
            if wrong:
                text = "; ".join(wrong[:10]) + ("; ..." if len(wrong) > 10 else "")
                one = Damaged(f"{MLFLOW}: {line}", text, (f"the image of line {line}",))
                one.remedy = "from the trail"
                result.damaged.append(one)
        result.mlflow = tuple(compared)


def _described(found: Inventory, name: str, problem: str) -> Damaged:
    """What an object is, and who needs it."""
    kind, _, rest = name.partition("/")
    one = Damaged(name, problem)
    if kind == "lines":
        line = rest.partition("/")[0]
        one.what, one.depends = (f"the head of line {line}",), (f"line {line}",)
    elif kind == "audit":
        holders = [line for line, trail in found.trails.items() if trail and _ends(trail, rest)]
        one.what = ("an act",)
        one.depends = tuple(f"the trail of line {line}" for line in holders)
    elif kind == "keys":
        one.what = (f"where the {rest.partition('/')[0]} of some inputs is found again",)
    elif kind == "attempts":
        one.what = ("an attempt at onboarding a model",)
    else:
        references = found.references.get(rest, [])
        one.what = tuple(dict.fromkeys(map(str, references)))
        one.depends = tuple(dict.fromkeys(f"{r.owner} of {r.line}" for r in references))
        if not references:
            keys = tuple(f"what {key} names" for key in found.keys_of(rest))
            one.what = keys or ("something that nothing readable names",)
    return one


def _ends(trail: list[Entry], digest: str) -> bool:
    return trail[-1].previous == digest
