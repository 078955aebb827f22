"""Repair a damaged store: restore each object whose original bytes can be made again.

Each damaged object has sources (`storage.repair_sources`). The bytes from a source replace the
object only if they have its digest, and atomically: an interrupted repair leaves each object
damaged or intact, and no intact object is overwritten. The store is checked again after each
round, because a restored act shows which objects it names, and a restored delta gives patches.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property

from restitch.flows.audit.report import Reports
from restitch.flows.research.experts import key_facts
from restitch.flows.storage.repair_sources import RecoverySources
from restitch.flows.storage.store_check import (
    MLFLOW,
    Checker,
    Damaged,
    Projection,
    StoreCheck,
    is_complete,
)
from restitch.merging.digests import digest_bytes, digest_file
from restitch.merging.errors import Damage, RestitchError, Unavailable
from restitch.registry.ledger.finetuned_models import ModelVersion
from restitch.registry.ledger.ledger import Ledger, state_after
from restitch.registry.ledger.records import Entry
from restitch.registry.ledger.references import MLFLOW_SCHEMES, SPECIALISTS
from restitch.registry.maintenance.inventory import Inventory, mentioned_digests
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.store.base import NotInStore
from restitch.tasks.inputs.heads import heads_again
from restitch.tasks.localize import RECORDED_FACTS, mask_keys
from restitch.tasks.publish import MergedModels
from restitch.tasks.research.experts import read_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace
from restitch.tasks.statistics import KINDS, statistic_keys

_ROUNDS = 8
_NAMING = ("audit/", "lines/")  # these objects name others
_MASK_FACTS = ("kept", "coordinates", "localizer", "seconds")
_REMOVE = "remove it: a command that needs it makes it again"

# Acts, line states and records name the rest; patches need deltas, evaluations need both.
_ORDER = ["audit", "lines", "record", "manifest", "file", "listing"]
_ORDER += ["delta", "statistic", "patch", "result"]


def check_store(space: Workspace, *, repair: bool) -> StoreCheck:
    """Check a whole store, and repair damaged objects on request."""
    checker = Checker(space)
    result, inventory = checker.check()
    if not repair:
        planned = _Round(space, inventory, checker.projection)
        for each in result.damaged:
            each.remedy = each.remedy or planned.remedy(each)
        return result
    repaired: dict[str, Damaged] = {}
    for _ in range(_ROUNDS):
        now = _Round(space, inventory, checker.projection).repair_all(result.damaged)
        repaired |= {each.object: each for each in now}
        if not now:
            break
        result, inventory = checker.check()
    left = {each.object: each for each in result.damaged}
    result.damaged = list({**repaired, **left}.values())
    return result


class _Round:
    """One round of repairs, after one check of the store."""

    def __init__(self, space: Workspace, inventory: Inventory, projection: Projection) -> None:
        self.space = space
        self.projection = projection
        self.inventory = inventory
        self.store = space.objects.store
        self.sources = RecoverySources(space, inventory, projection)
        self.removed_heads: set[str] = set()
        self.knows_all = False

    @cached_property
    def mentioned(self) -> set[str]:
        """Every digest and address in a line state, a record or an act."""
        return mentioned_digests(self.inventory)

    def repair_all(self, damaged: list[Damaged]) -> list[Damaged]:
        """Repair one group of objects, and return those that were repaired.

        Acts and line states come first, then blobs, then keys and MLflow. A group is tried only
        if nothing in the groups before it was repaired, because a repair changes what is known.
        """
        self.knows_all = not any(each.object.startswith(_NAMING) for each in damaged)
        ordered, repaired = sorted(damaged, key=self._order), list[Damaged]()
        for prefixes in (_NAMING, ("blobs/",), ("keys/", "attempts/", MLFLOW)):
            group = [each for each in ordered if each.object.startswith(prefixes)]
            repaired = repaired or [each for each in group if self._repair(each)]
        self._make_heads()
        return repaired

    def _order(self, each: Damaged) -> int:
        kind, _, digest = each.object.partition("/")
        references = self.inventory.references.get(digest, [])
        roles = {kind, *(reference.role for reference in references)}
        return min((_ORDER.index(role) for role in roles if role in _ORDER), default=len(_ORDER))

    def remedy(self, each: Damaged) -> str | None:
        """The repair of an object, in words; None if only a backup helps."""
        kind, _, rest = each.object.partition("/")
        if kind == "lines":
            return "restore it from the acts of its trail"
        if kind == "attempts":
            return "close the attempt"
        if kind == "keys" or (kind == "blobs" and self._is_free(rest)):
            return _REMOVE
        recovery = next(self.sources.of(each.object), None)
        return None if recovery is None else f"restore it from {recovery.source}"

    def _repair(self, each: Damaged) -> bool:
        """Repair an object if that is possible, and write the outcome into `each`."""
        kind, _, rest = each.object.partition("/")
        repairs: dict[str, Callable[[Damaged, str], str]] = {
            "audit": self._restore,
            "lines": self._line_state,
            "blobs": self._blob,
            "keys": self._key,
            "attempts": self._attempt,
        }
        each.remedy = each.remedy or self.remedy(each)
        try:
            if each.object.startswith(MLFLOW):
                each.outcome = self._complete_mlflow(each.object.removeprefix(MLFLOW))
            else:
                each.outcome = repairs[kind](each, rest)
        except RestitchError as error:
            each.outcome = f"not repaired: {error.message()}"
            return False
        each.mended = True
        say(f"{each.object}: {each.outcome}")
        return True

    def _make_heads(self) -> None:
        """Make removed heads of tasks again, because an export only copies existing ones."""
        for line_state in self.inventory.line_states.values():
            if self.removed_heads:
                try:
                    heads_again(line_state, self.removed_heads, self.space)
                except RestitchError as error:
                    say(f"heads of {line_state.line} will be made when needed: {error.summary}")

    def _restore(self, each: Damaged, digest: str) -> str:
        """Restore an object from the first source that gives its digest.

        Raises:
            Damage: no source gives it.
        """
        tried = []
        for recovery in self.sources.of(each.object):
            with self.space.scratch() as scratch:
                file = scratch / "restored"
                try:
                    recovery.write(file)
                except RestitchError as error:
                    tried.append(f"{recovery.source}: {error.summary}")
                    continue
                made = digest_file(file)
                if made != digest:
                    tried.append(f"{recovery.source}: gives other bytes, with the digest {made}")
                elif self._is_intact(each.object):
                    return "intact again"
                else:
                    self.store.mend(each.object, file)
                    return f"restored from {recovery.source}"
        raise Damage(
            "it is lost: no source gives its bytes" if tried else "it is lost: it has no source",
            hint=f"restore {each.object} from a backup",
            details=tried,
        )

    def _is_intact(self, name: str) -> bool:
        try:
            return self.store.digest(name) == name.rpartition("/")[2]
        except (NotInStore, Damage):
            return False

    def _blob(self, each: Damaged, digest: str) -> str:
        if not self._is_free(digest):
            return self._restore(each, digest)
        self._check_names()
        for name in self.inventory.keys_of(digest):
            self._remove_key(name)
        self.store.remove(each.object)
        return "removed: nothing refers to it, and a command that needs it makes it again"

    def _is_free(self, digest: str) -> bool:
        """True if only keys name a blob; they are made again together with it."""
        named = digest in self.inventory.references or digest in self.mentioned
        kinds = {name.split("/")[1] for name in self.inventory.keys_of(digest)}
        return not named and "source" not in kinds

    def _check_names(self) -> None:
        """Check that no damaged act or line state may name an object to remove.

        Raises:
            Damage: an act or a line state is damaged.
        """
        if not self.knows_all:
            raise Damage(
                "it is not removed: a damaged act or line state may refer to it",
                hint="restore those from a backup, then run `restitch verify --repair` again",
            )

    def _remove_key(self, name: str) -> None:
        _, kind, inputs = name.split("/")
        if kind == "head":
            self.removed_heads.add(inputs)
        self.store.remove(name)

    def _key(self, each: Damaged, rest: str) -> str:
        """Remove a key, and write it again if the line records its content."""
        kind, _, inputs = rest.partition("/")
        publish = self.space.objects.publish
        self._check_names()
        self._remove_key(each.object)
        if kind == "patch":
            for record in self.inventory.records.values():
                if record.recipe_digest == inputs and self.store.exists(f"blobs/{record.patch}"):
                    facts: dict[str, object] = {"kept": record.kept}
                    publish(kind, inputs, record.patch, record.made_by, facts=facts)
                    return f"written again from the record of version {record.version}"
        if kind == "mask":
            for line, task, number, model in self._masked(inputs):
                known = model.facts.to_json()
                names = [name for name in (*_MASK_FACTS, *RECORDED_FACTS) if name in known]
                facts = {**{name: known[name] for name in names}, "mask": model.mask}
                publish(kind, inputs, str(model.delta), model.facts.localized_by, facts=facts)
                return f"written again from the state of line {line} ({task} {number})"
        if kind in KINDS:
            for named in self.sources.statistics():
                with suppress(RestitchError):  # the base of another line may be away
                    if inputs in statistic_keys(named.line, named.statistic, self.space):
                        publish(kind, inputs, named.digest, named.made_by)
                        return f"written again from {named.source}"
        if kind == SPECIALISTS:
            return self._specialists_key(inputs)
        if kind == "source":
            for address in self.mentioned:
                if address.startswith(MLFLOW_SCHEMES) and digest_bytes(address.encode()) == inputs:
                    resolve_source(address, self.space.home)
                    return f"fetched again from {address}"
        return "removed: a command that needs it makes it again"

    def _specialists_key(self, recipe: str) -> str:
        """Name the specialists of a version again, if only one set fits it."""
        records = [r for r in self.inventory.records.values() if r.recipe_digest == recipe]
        if not records:
            return "removed: no version has this recipe"
        record = records[0]
        models = {task: member.weights for task, member in record.members.items()}
        blobs = {k.blob for n, k in self.inventory.keys.items() if n.startswith("keys/experts/")}
        sets = [read_experts(blob, self.space) for blob in sorted(blobs)]
        fitting = [one for one in sets if one.members == models]
        if len(fitting) != 1:
            command = f"restitch experts {record.line} {record.version}"
            return f"removed: run `{command}` to name them again, before `restitch gc` removes them"
        facts = key_facts(record, fitting[0], None)
        self.space.objects.publish(SPECIALISTS, recipe, fitting[0].manifest, facts=facts)
        return f"written again: those of {record.line} {record.version} by {facts['method']}"

    def _masked(self, inputs: str) -> Iterator[tuple[str, str, int, ModelVersion]]:
        """The models whose mask has this digest of inputs, as they were when it was made."""
        for line_state, task, number in self.sources.localized():
            line = LineRef(line_state.spec, line_state.base)
            spec, model = line_state.tasks[task].spec, line_state.tasks[task].versions[number]
            with suppress(RestitchError):  # the base of another line may be away
                if inputs in mask_keys(line, spec, model.model, self.space):
                    yield line_state.line, task, number, model

    def _attempt(self, each: Damaged, _: str) -> str:
        self.store.put(each.object.removesuffix("begun") + "ended", b"{}")
        return "closed"

    def _complete_mlflow(self, line: str) -> str:
        ledger = Ledger(self.space.objects, line)
        models = MergedModels(ledger, self.space)
        extras = Reports(ledger).artifacts
        self.space.mlflow.repair(ledger, full=True, extras=extras, models=models)
        left = self.space.mlflow.differences(ledger)
        if left:
            raise Unavailable(f"MLflow still differs from the line: {'; '.join(left)}")
        return "completed from the trail"

    def _line_state(self, each: Damaged, rest: str) -> str:
        line = rest.partition("/")[0]
        try:
            old, tag = self.store.read_tagged(each.object)
        except NotInStore:
            old, tag = b"", None
        line_state = self.inventory.line_states.get(line)
        trail = self.inventory.trails[line] if line_state is not None else self._last_acts(line)
        if not is_complete(trail):
            raise Damage(
                f"acts are missing in the trail of line {line}",
                hint="restore them from a backup, then run `restitch verify --repair` again",
            )
        made = state_after(trail[::-1])
        if line_state is not None:
            made = made.model_copy(update={"generation": line_state.generation + 1})
        if self.store.swap(each.object, tag, made.model_dump_json(indent=1).encode()) is None:
            raise Unavailable(f"line {line} has changed", hint="run the same command again")
        return f"restored from its {len(trail)} acts; it had {len(old)} bytes before"

    def _last_acts(self, line: str) -> list[Entry]:
        """The longest chain of acts of a line whose state is lost, newest first.

        Raises:
            Damage: several chains are equally long, and MLflow does not say which one counts.
        """
        entries = {d: e for d, e in self.inventory.entries.items() if e.line == line}
        followed = {entry.previous for entry in entries.values()}
        ends = [entry for digest, entry in entries.items() if digest not in followed]
        longest = max((entry.sequence for entry in ends), default=0)
        last = [entry for entry in ends if entry.sequence == longest]
        try:
            shown = self.projection.acts_shown(line)
        except Unavailable:
            shown = {}
        if len(last) > 1:
            last = [entry for entry in last if entry.digest in shown]
        if len(last) != 1 or set(shown) - entries.keys():
            raise Damage(
                f"the newest act of line {line} is unknown",
                expected="one chain of acts that holds every act in MLflow",
                found=f"{len(ends)} acts without a successor",
                hint=f"restore lines/{line}/head.json from a backup",
            )
        trail = last
        while trail[-1].previous in entries:
            trail.append(entries[str(trail[-1].previous)])
        return trail
