"""Mend a damaged store: put back what can be made again with the very digest that is named.

Each damaged object has ways in which it can be made again (`restitch.flows.storage.repair_sources`); what a way
gives is compared with the digest before it takes the damaged one's place, at once, so that
whoever is killed leaves it damaged or whole, and what is whole is never written over. What
comes out otherwise is lost, which is said. The store is looked at again after each round, for
a mended act shows what it names, and a mended delta gives patches.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pydantic import JsonValue

from restitch.flows.audit.report import Reports
from restitch.flows.research.experts import key_facts
from restitch.flows.storage.repair_sources import Remedies
from restitch.flows.storage.store_check import MLFLOW, Checker, Damaged, Image, StoreCheck
from restitch.merging.digests import digest_bytes, digest_file
from restitch.merging.errors import Damage, RestitchError, Unavailable
from restitch.registry.ledger.ledger import Ledger, state_after
from restitch.registry.ledger.line_state import ModelVersion
from restitch.registry.ledger.outcomes import touched_models
from restitch.registry.ledger.records import Entry
from restitch.registry.ledger.references import MLFLOW_SCHEMES, SPECIALISTS
from restitch.registry.maintenance.inventory import Inventory, mentioned_digests
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.store.base import NotInStore
from restitch.tasks.inputs.heads import heads_again
from restitch.tasks.localize import RECORDED_FACTS, mask_key
from restitch.tasks.research.experts import read_experts
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace
from restitch.tasks.statistics import KINDS, statistic_key

_ROUNDS = 8
_NAMING = ("audit/", "lines/")
_MASK_FACTS = ("kept", "coordinates", "localizer", "seconds")

# Heads and records say what all others are; patches come from deltas, evaluations from both.
_ORDER = (
    "audit",
    "lines",
    "record",
    "manifest",
    "file",
    "listing",
    "delta",
    "statistic",
    "patch",
    "result",
)


def check_store(space: Workspace, *, repair: bool) -> StoreCheck:
    """Look at a whole store, and mend what is damaged where that is asked for."""
    checker = Checker(space)
    result, found = checker.check()
    if not repair:
        for each in result.damaged:
            each.remedy = each.remedy or _Repairer(space, found, checker.image).remedy(each)
        return result
    mended: dict[str, Damaged] = {}
    for _ in range(_ROUNDS):
        mender = _Repairer(space, found, checker.image)
        waiting = sorted(result.damaged, key=mender.order)
        now: list[Damaged] = []
        mender.knows_all = not any(each.object.startswith(_NAMING) for each in waiting)
        # Each kind is made from those before it, as it is when these are whole.
        for kinds in (_NAMING, ("blobs/",), ("keys/", "attempts/", f"{MLFLOW}: ")):
            now = now or [e for e in waiting if e.object.startswith(kinds) and mender.mend(e)]
        mended |= {each.object: each for each in now}
        mender.finish()
        if not now:
            break
        result, found = checker.check()
    left = {each.object: each for each in result.damaged}
    result.damaged = list({**mended, **left}.values())
    return result


class _Repairer:
    """One round: what is damaged in a store that was just looked at."""

    def __init__(self, space: Workspace, found: Inventory, image: Image) -> None:
        self.space = space
        self.image = image
        self.found = found
        self.store = space.objects.store
        self.remedies = Remedies(space, found, image)
        self.mentioned = mentioned_digests(found)
        self.heads: set[str] = set()
        self.knows_all = False

    def order(self, each: Damaged) -> int:
        """Where an object stands in the order of mending."""
        kind, _, digest = each.object.partition("/")
        roles = {kind, *(reference.role for reference in self.found.references.get(digest, []))}
        return min((_ORDER.index(role) for role in roles if role in _ORDER), default=len(_ORDER))

    def remedy(self, each: Damaged) -> str | None:
        """From what an object can be made again, in words."""
        kind, _, rest = each.object.partition("/")
        if kind == "lines":
            return "the acts of its trail"
        if kind == "keys":
            return "whoever asks for it next, when it is removed"
        if kind == "attempts":
            return "nothing: it is closed, and counts no more"
        if kind == "blobs" and self._is_free(rest):
            return "whoever asks for it next, when it is removed"
        ways = self.remedies.of_entry(rest) if kind == "audit" else self.remedies.of_blob(rest)
        return next((way.source for way in ways), None)

    def mend(self, each: Damaged) -> bool:
        """Mend an object if it can be; what became of it stands in it then."""
        kind, _, rest = each.object.partition("/")
        do: dict[str, Callable[[Damaged, str], str]] = {
            "audit": self._from_ways,
            "lines": self._head,
            "blobs": self._blob,
            "keys": self._key,
            "attempts": self._attempt,
        }
        each.remedy = each.remedy or self.remedy(each)
        try:
            if each.object.startswith(f"{MLFLOW}: "):
                each.outcome = self._image(each.object.removeprefix(f"{MLFLOW}: "))
            else:
                each.outcome = do[kind](each, rest)
        except RestitchError as error:
            each.outcome = f"not mended: {error.message()}"
            return False
        each.mended = True
        say(f"{each.object}: {each.outcome}")
        return True

    def finish(self) -> None:
        """Make the heads of tasks again that were removed: an export takes what is there."""
        for line_state in self.found.line_states.values():
            if self.heads:
                try:
                    heads_again(line_state, self.heads, self.space)
                except RestitchError as error:
                    say(
                        f"heads of {line_state.line} are made again when they are asked for: {error.summary}"
                    )

    def _from_ways(self, each: Damaged, digest: str) -> str:
        """Put back what has the digest.

        Raises:
            Damage: no way gives it.
        """
        found = (
            self.remedies.of_entry if each.object.startswith("audit/") else self.remedies.of_blob
        )
        tried = []
        for way in found(digest):
            with self.space.scratch() as scratch:
                file = scratch / "again"
                try:
                    way.write(file)
                except RestitchError as error:
                    tried.append(f"{way.source}: {error.summary}")
                    continue
                made = digest_file(file)
                if made != digest:
                    tried.append(f"{way.source}: gives {made}, which is something else")
                elif self._is_whole(each.object):
                    return "whole since"
                else:
                    self.store.mend(each.object, file)
                    return f"made again from {way.source}"
        raise Damage(
            "it is lost" if tried else "nothing is known to make it again from",
            hint=f"restore {each.object} from a backup",
            details=tried,
        )

    def _is_whole(self, name: str) -> bool:
        try:
            return self.store.digest(name) == name.rpartition("/")[2]
        except (NotInStore, Damage):
            return False

    def _blob(self, each: Damaged, digest: str) -> str:
        if not self._is_free(digest):
            return self._from_ways(each, digest)
        self._check_names()
        for name in self.found.keys_of(digest):
            self._remove_key(name)
        self.store.remove(each.object)
        return "removed: nothing refers to it, and whoever asks makes it again"

    def _is_free(self, digest: str) -> bool:
        """Whether nothing names a blob but keys, which are made again with it."""
        named = digest in self.found.references or digest in self.mentioned
        kinds = {name.split("/")[1] for name in self.found.keys_of(digest)}
        return not named and "source" not in kinds

    def _check_names(self) -> None:
        """Remove nothing that a damaged head or act may name.

        Raises:
            Damage: there is one.
        """
        if not self.knows_all:
            raise Damage(
                "whether anything needs it is not known while acts or heads are damaged",
                hint="restore those from a backup, then restitch verify --repair again",
            )

    def _remove_key(self, name: str) -> None:
        _, kind, inputs = name.split("/")
        if kind == "head":
            self.heads.add(inputs)
        self.store.remove(name)

    def _key(self, each: Damaged, rest: str) -> str:
        kind, _, inputs = rest.partition("/")
        self._check_names()
        self._remove_key(each.object)
        if kind == "patch":
            for record in self.found.records.values():
                if record.recipe_digest == inputs and self.store.exists(f"blobs/{record.patch}"):
                    kept = {"kept": record.kept}
                    self._publish(kind, inputs, record.patch, record.made_by, kept)
                    return f"written again from the record of version {record.version}"
        if kind == "mask":
            for task, number, model in self._localized(inputs):
                facts = model.facts.to_json()
                known = {
                    name: facts[name] for name in (*_MASK_FACTS, *RECORDED_FACTS) if name in facts
                }
                known["mask"] = model.mask
                maker = model.facts.localized_by
                self._publish(kind, inputs, str(model.delta), maker, known)
                return f"written again from what the line says of {task} {number}"
        if kind in KINDS:
            for named in self.remedies.statistics():
                with suppress(RestitchError):  # of another line, whose base may be away
                    if statistic_key(named.line, named.statistic, self.space) == inputs:
                        self._publish(kind, inputs, named.digest, named.made_by, {})
                        return f"written again from {named.source}"
        if kind == SPECIALISTS:
            return self._specialists(inputs)
        if kind == "source":
            for address in self.mentioned:
                if address.startswith(MLFLOW_SCHEMES) and _inputs(address) == inputs:
                    resolve_source(address, self.space.home)
                    return f"fetched again from {address}"
        return "removed: whoever asks makes it again"

    def _specialists(self, recipe: str) -> str:
        """Name the specialists of a version again, where only some can have been its own."""
        records = [one for one in self.found.records.values() if one.recipe_digest == recipe]
        if not records:
            return "removed: no version has this recipe"
        record = records[0]
        models = {task: member.weights for task, member in record.members.items()}
        blobs = {k.blob for n, k in self.found.keys.items() if n.startswith("keys/experts/")}
        sets = [read_experts(blob, self.space) for blob in sorted(blobs)]
        of_these = [one for one in sets if one.members == models]
        if len(of_these) != 1:
            made = f"restitch experts {record.line} {record.version}"
            return f"removed: `{made}` names them again, before `restitch gc` removes them"
        facts = key_facts(record, of_these[0], None)
        self._publish(SPECIALISTS, recipe, of_these[0].manifest, None, facts)
        return f"written again: those of {record.line} {record.version} by {facts['method']}"

    def _publish(
        self, kind: str, inputs: str, blob: str, made_by: JsonValue, facts: dict[str, Any]
    ) -> None:
        self.space.objects.publish(kind, inputs, blob, made_by, facts=facts)

    def _localized(self, inputs: str) -> Iterator[tuple[str, int, ModelVersion]]:
        """The model whose mask is found from such inputs, as it was when that was found."""
        for trail in self.found.trails.values():
            for at, entry in enumerate(trail):
                if entry.kind != "localized" or trail[-1].previous is not None:
                    continue
                line_state = state_after(trail[at:][::-1])
                for task, number in touched_models(entry):
                    model, spec = (
                        line_state.tasks[task].versions[number],
                        line_state.tasks[task].spec,
                    )
                    line = LineRef(line_state.spec, line_state.base)
                    with suppress(RestitchError):  # of another line, whose base may be away
                        if mask_key(line, spec, model.model, self.space) == inputs:
                            yield task, number, model

    def _attempt(self, each: Damaged, _: str) -> str:
        self.store.put(each.object.removesuffix("begun") + "ended", b"{}")
        return "closed"

    def _image(self, line: str) -> str:
        ledger = Ledger(self.space.objects, line)
        self.space.mlflow.repair(ledger, full=True, extras=Reports(ledger).artifacts)
        left = self.space.mlflow.differences(ledger)
        if left:
            raise Unavailable(f"MLflow's image still differs: {'; '.join(left)}")
        return "completed from the trail"

    def _head(self, each: Damaged, rest: str) -> str:
        line = rest.partition("/")[0]
        try:
            old, tag = self.store.read_tagged(each.object)
        except NotInStore:
            old, tag = b"", None
        line_state = self.found.line_states.get(line)
        trail = self.found.trails[line] if line_state is not None else self._last_acts(line)
        if not trail or trail[-1].previous is not None:
            raise Damage(f"the trail of line {line} is not whole", hint="mend its acts first")
        made = state_after(trail[::-1])
        if line_state is not None:
            made = made.model_copy(update={"generation": line_state.generation + 1})
        if self.store.swap(each.object, tag, made.model_dump_json(indent=1).encode()) is None:
            raise Unavailable(f"line {line} was changed meanwhile", hint="run the same again")
        return f"made again from its {len(trail)} acts; before: {len(old)} bytes"

    def _last_acts(self, line: str) -> list[Entry]:
        """The acts of a line whose head is gone, newest first: the longest chain there is.

        Raises:
            Damage: several are equally long, and MLflow does not say which counts.
        """
        entries = {d: e for d, e in self.found.entries.items() if e.line == line}
        followed = {entry.previous for entry in entries.values()}
        ends = [entry for digest, entry in entries.items() if digest not in followed]
        longest = max((entry.sequence for entry in ends), default=0)
        last = [entry for entry in ends if entry.sequence == longest]
        try:
            shown = self.image.acts_shown(line)
        except Unavailable:
            shown = {}
        if len(last) > 1:
            last = [entry for entry in last if entry.digest in shown]
        if len(last) != 1 or set(shown) - entries.keys():
            raise Damage(
                f"which act of line {line} was the last is not known",
                found=f"{len(ends)} acts that none follows",
                hint=f"restore lines/{line}/head.json from a backup",
            )
        trail = last
        while trail[-1].previous in entries:
            trail.append(entries[str(trail[-1].previous)])
        return trail


def _inputs(address: str) -> str:
    return digest_bytes(address.encode())
