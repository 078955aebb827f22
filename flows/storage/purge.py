"""Purge forgotten models: remove their weights, and all that was derived from them alone.

    forget or drop --> merge without them --> act `purged` --> remove the objects

Records and the trail stay, with digests, names and measurements. The act marks the models and the
merged versions that hold them, and names the objects that go; from then on nothing refers to
these objects, so a purge that was killed is completed by another one, or by `restitch gc`. Objects
that the champion, another model or another line needs stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.decisions import Decision, drop, forget
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.versions import named_models
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.flows.storage.gc import intact_inventory, remove_objects
from restitch.merging.digests import digest_json
from restitch.merging.errors import GateFailed, shortlist
from restitch.merging.files.delta import open_delta
from restitch.modeling.families.family import get_family
from restitch.registry.ledger.finetuned_models import ModelKey, Removal
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.references import COPY_SCHEME, PURGED
from restitch.registry.maintenance.inventory import Inventory, purged_objects
from restitch.registry.sources.resolve import discard_folder
from restitch.registry.store.deletion_notice import deletion_notice
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.inputs.task_head import head_inputs
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, actor, workspace

_LISTS = ("manifest", "experts")  # these blobs name others
_WITHOUT_WEIGHTS = ("result", "attached", "record", "listing")


@dataclass(frozen=True)
class PurgePlan(Outcome):
    """The consequences of a purge.

    Attributes:
        models: the models whose weights go.
        versions: the merged versions that hold them, and can then not be rebuilt or exported.
        champion: the version in use if it is one of them; a merge without the models comes first.
        notes: what stays.
    """

    line: str
    models: tuple[str, ...]
    versions: tuple[int, ...]
    champion: int | None
    objects: int
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PurgeOutcome(Outcome):
    """The result of a purge.

    Attributes:
        decision: the act that took the models out of use.
        merged: the merge without them.
        entry: the digest of the act `purged`; None if there was nothing new to purge.
        models: the models that it marked; likewise the merged `versions`.
        objects: the number of objects that were removed, and their `bytes`.
        complete: whether no version is left that holds the models.
        notes: what stays.
    """

    line: str
    decision: Decision
    merged: RemergeOutcome | None
    entry: str | None
    models: tuple[str, ...]
    versions: tuple[int, ...]
    objects: int
    bytes: int
    complete: bool
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0, or the code of a failed gate if the champion still holds one of the models."""
        return 0 if self.complete else GateFailed.exit_code


def plan_purge(line: str, model: str | None) -> PurgePlan:
    """The consequences of purging a task's models, one of them, or (None) a whole line.

    Raises:
        BadInput: there is no such line or model.
        Damage: the store is damaged.
    """
    space = workspace()
    ledger = space.ledger(line, dropped=model is None)
    line_state = ledger.state()
    keys = _chosen(line_state, model)
    champion = line_state.champion
    without = line_state if line_state.pinned and model is not None else _unused(line_state)
    after = _purged(ledger, without, keys, Removal(actor=actor(), time="", reason=""))
    inventory = intact_inventory(space.objects, after)
    names = purged_objects(inventory) | _derived(after, keys, inventory, space).keys()
    versions = _new_versions(line_state, after)
    return PurgePlan(
        line,
        tuple(str(key) for key in keys if line_state.model(key).facts.purged is None),
        versions,
        champion if champion in versions else None,
        len(names),
        sum(inventory.listed[name].size for name in names),
        _notes(ledger, after, keys, inventory),
    )


def forget_and_purge(line: str, model: str, reason: str, *, merge: bool = True) -> PurgeOutcome:
    """Forget models, merge without them in this process, and purge them.

    Raises:
        BadInput: the line has no such model.
        Damage: the store is damaged; nothing was removed.
        Unavailable: the store cannot be reached, or another process is removing objects.
    """
    decision = forget(line, model, reason, merge=False)
    ledger = workspace().ledger(line)
    merged = None
    if merge and _champion_holds(ledger, ledger.state(), _chosen(ledger.state(), model)):
        merged = remerge(line)
    return _purge(ledger, model, reason, decision, merged)


def drop_and_purge(line: str, reason: str) -> PurgeOutcome:
    """Drop a line, or take one that was dropped, and purge all its models."""
    ledger = workspace().ledger(line, dropped=True)
    return _purge(ledger, None, reason, drop(line, reason), None)


def _purge(
    ledger: Ledger,
    model: str | None,
    reason: str,
    decision: Decision,
    merged: RemergeOutcome | None,
) -> PurgeOutcome:
    space = workspace()
    before = ledger.state()
    keys = _chosen(before, model)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    removal = Removal(actor=actor(), time=time, reason=reason.strip())
    assumed = _purged(ledger, before, keys, removal)
    act = None
    if assumed != before:
        listing = space.objects.put_json(_listing(space, assumed, keys))

        def change(line_state: LineState) -> LineState | None:
            after = _purged(ledger, line_state, keys, removal)
            return None if after == line_state else after

        name = "the whole line" if model is None else model.replace("/", " ")
        why = f"{name}: {removal.reason}"
        act = ledger.act("purged", removal.actor, why, change, {PURGED: listing})
    names, size = _remove(space)
    say(f"{ledger.line}: {len(names)} objects removed, {size} bytes")
    mirror(ledger.line)
    after = ledger.state()
    notes = _notes(ledger, after, keys, intact_inventory(space.objects, after))
    for note in notes:
        warn(note)
    return PurgeOutcome(
        ledger.line,
        decision,
        merged,
        None if act is None else act.digest,
        tuple(str(key) for key in keys if before.model(key).facts.purged is None),
        _new_versions(before, after),
        len(names),
        size,
        not _champion_holds(ledger, after, keys),
        notes,
    )


def _chosen(line_state: LineState, model: str | None) -> tuple[ModelKey, ...]:
    """The models that a user names; all models of the line for None."""
    if model is None:
        return tuple(key for key, _ in line_state.models)
    task, version = named_models(line_state, model)
    return tuple(
        key for key, _ in line_state.models if key.task == task and version in (None, key.version)
    )


def _unused(line_state: LineState) -> LineState:
    """The state without a version in use, to see what a merge without models would free."""
    return line_state.without_champion().without_candidate()


def _purged(
    ledger: Ledger, line_state: LineState, keys: Iterable[ModelKey], removal: Removal
) -> LineState:
    """The state in which these models, and the versions that hold purged models, are purged.

    The champion is never purged.
    """
    new = [key for key in keys if line_state.model(key).facts.purged is None]
    marked = line_state.with_purged(new, (), removal)
    versions = [
        number
        for number in marked.versions
        if number not in marked.purged
        and number != marked.champion
        and _holds_purged(ledger, marked, number)
    ]
    return marked.with_purged((), versions, removal) if new or versions else line_state


def _holds_purged(ledger: Ledger, line_state: LineState, number: int) -> bool:
    members = ledger.record(line_state.versions[number]).members.items()
    return any(
        line_state.model(ModelKey(task, member.version)).facts.purged is not None
        for task, member in members
    )


def _champion_holds(ledger: Ledger, line_state: LineState, keys: Iterable[ModelKey]) -> bool:
    if line_state.champion is None:
        return False
    members = ledger.merged(line_state.champion).members.items()
    return not {ModelKey(task, m.version) for task, m in members}.isdisjoint(keys)


def _new_versions(before: LineState, after: LineState) -> tuple[int, ...]:
    return tuple(sorted(after.purged.keys() - before.purged.keys()))


def _listing(
    space: Workspace, line_state: LineState, keys: tuple[ModelKey, ...]
) -> list[dict[str, Any]]:
    """The objects that a purge removes, as its act names them."""
    inventory = intact_inventory(space.objects, line_state)
    derived = _derived(line_state, keys, inventory, space)
    return [
        {
            "object": name,
            "bytes": inventory.listed[name].size,
            "what": sorted({str(r) for r in inventory.purged.get(name.rpartition("/")[2], ())}),
            "weights": derived.get(name),
        }
        for name in sorted(purged_objects(inventory) | derived.keys())
    ]


def _derived(
    line_state: LineState, keys: tuple[ModelKey, ...], inventory: Inventory, space: Workspace
) -> dict[str, str]:
    """Objects of purged models that only a key names, with the digest of the model's weights.

    These are heads with tensors of the model, and its masks with settings that no act names.
    Models of the same weights that are not purged keep them.
    """
    alive = {
        model.model.weights
        for each in inventory.line_states.values()
        for _, model in each.models
        if model.facts.purged is None
    }
    models = {k: line_state.model(k).model for k in keys}
    models = {key: model for key, model in models.items() if model.weights not in alive}
    weights = {model.weights for model in models.values()}
    found: dict[str, str] = {}
    if models and get_family(line_state.spec.family).task_heads is not None:
        base = open_base(LineRef(line_state.spec, line_state.base), space)
        for key, model in models.items():
            spec = line_state.tasks[key.task].spec
            if spec.uses_head:
                for each in base.in_each_type():
                    name = f"keys/head/{digest_json(head_inputs(spec, each, model))}"
                    found |= {name: model.weights} if name in inventory.keys else {}
    named = inventory.references.keys() | inventory.purged.keys()
    for name, key_record in inventory.keys.items():
        blob = key_record.blob
        unnamed = blob not in named and f"blobs/{blob}" in inventory.listed
        if weights and unnamed and name.startswith("keys/mask/"):
            file = open_delta(space.objects.blob_path(blob))
            origin = file.metadata.get("finetuned", "")
            found |= {name: origin} if origin in weights else {}
    for name in list(found):
        blob = inventory.keys[name].blob
        if blob not in inventory.references and f"blobs/{blob}" in inventory.listed:
            found[f"blobs/{blob}"] = found[name]
    return found


def _remove(space: Workspace) -> tuple[list[str], int]:
    """Remove all objects that purges have left without a reference; returns names and bytes."""
    objects = space.objects
    first = intact_inventory(space.objects)
    names = sorted(purged_objects(first))
    if not names:
        return [], 0
    with deletion_notice(objects.store, names):
        for line in first.line_states:
            Ledger(objects, line).touch()
        now = intact_inventory(space.objects)
        gone = sorted(purged_objects(now) & set(names))
        lists = {
            f"blobs/{digest}"
            for digest, references in now.purged.items()
            if any(each.role in _LISTS for each in references)
        }
        for name in lists.intersection(gone):
            discard_folder(name.rpartition("/")[2], space.home)
        remove_objects(objects, now, gone, last=lists)
    return gone, sum(now.listed[name].size for name in gone)


def _notes(
    ledger: Ledger, line_state: LineState, keys: tuple[ModelKey, ...], inventory: Inventory
) -> tuple[str, ...]:
    """What a purge leaves: the champion, shared objects, and sources outside of the store."""
    notes = []
    if _champion_holds(ledger, line_state, keys):
        pinned = ", to which the line is pinned," if line_state.pinned else ""
        notes.append(
            f"version {line_state.champion}{pinned} is in use and holds what is purged: its patch "
            "and its deltas stay; when another version is in use, run this command again"
        )
    # A purged version holds the deltas of other members, too; only those of the models count.
    own = [d for d, refs in inventory.purged.items() if not all(each.of_version for each in refs)]
    shared = {
        f"{reference.owner} of {reference.line}"
        for digest in own
        for reference in inventory.references.get(digest, ())
        if reference.role not in _WITHOUT_WEIGHTS and not reference.owner.startswith("act ")
    }
    if shared:
        notes.append(f"objects that others need stay: {shortlist(sorted(shared))}")
    uris = {line_state.model(key).model.uri for key in keys}
    notes += [
        f"the source {uri} is not in the store, and stays"
        for uri in sorted(uris)
        if not uri.startswith(COPY_SCHEME)
    ]
    return tuple(notes)
