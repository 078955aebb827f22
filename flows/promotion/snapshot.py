"""The line's state from which a remerge starts, with its members and records."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from restitch.flows.promotion.masks import needs_new_mask
from restitch.flows.promotion.method_selection import earlier_selection
from restitch.flows.promotion.versions import member_of, members_of
from restitch.merging.digests import digest_json
from restitch.registry.ledger.finetuned_models import Member, ModelKey, ModelVersion
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import description_digest
from restitch.tasks.merge import known_recipe
from restitch.tasks.runtime.refs import LineRef

# The name, in the digests of a rejection, of the circumstances in which nothing else can be merged.
CIRCUMSTANCES = "circumstances"


@dataclass(frozen=True)
class Snapshot:
    """A line at one moment.

    Attributes:
        members: the members of a merge of everything, by task name: the newest ready model of
            each task, or a newer held one if the context has changed since it was held.
        newest: the record of the newest version, promoted or not.
        candidate: the record of the version that passed its gates and waits for its promotion.
        rejected: the newest version, if gates block all that can be merged and nothing changed
            since.
        context: the digest of everything on which a gate's verdict depends, but the champion.
    """

    line_state: LineState
    members: tuple[Member, ...]
    champion: MergedRecord | None
    newest: MergedRecord | None
    candidate: MergedRecord | None
    rejected: MergedRecord | None
    context: str

    @property
    def line(self) -> LineRef:
        """The reference that steps take."""
        return LineRef(self.line_state.spec, self.line_state.base)

    @property
    def line_in_use(self) -> LineRef:
        """The line with one method: in a tournament that of the champion, or the first."""
        return line_with_one_method(self.line_state, self.champion)

    @cached_property
    def settled(self) -> MergedRecord | None:
        """The version that already is the merge of these members, or was rejected as that.

        None if there is none, or if a tournament must select their method first.
        """
        records = (*self.current, *([] if self.rejected is None else [self.rejected]))
        selection = earlier_selection(self.line, self.members, self.benchmark, records)
        recipe = None if selection is None else known_recipe(selection.line, self.members)
        if recipe is None:
            return None
        same = (one for one in records if is_merge_of(one, recipe.digest(), self.members))
        return next(same, None)

    def merge_of(self, recipe: str, members: Iterable[Member]) -> MergedRecord | None:
        """The current version with this recipe and these members, if there is one."""
        return next((one for one in self.current if is_merge_of(one, recipe, members)), None)

    @property
    def current(self) -> tuple[MergedRecord, ...]:
        """The champion and, on a pinned line, the candidate.

        On a line that is not pinned, a candidate is about to be promoted.
        """
        records = (self.champion, self.candidate if self.line_state.pinned else None)
        return tuple(record for record in records if record is not None)

    @property
    def circumstances(self) -> str:
        """The digest of everything on which a gate's verdict depends."""
        return _circumstances(self.context, self.line_state.champion)

    @property
    def benchmark(self) -> TaskSpec | None:
        """The line's general benchmark."""
        return retention_task(self.line_state)

    @cached_property
    def champion_members(self) -> tuple[Member, ...]:
        """The champion's members that are still on the line, with the models it holds."""
        if self.champion is None:
            return ()
        members = members_of(self.line_state, self.champion)
        return _by_task(m for m in members if m.model.state in ("ready", "held", "replaced"))

    @property
    def joining(self) -> tuple[Member, ...]:
        """The members that are not in the champion, oldest first."""
        inside = {(m.task, m.version) for m in self.champion_members}
        new = [m for m in self.members if (m.task, m.version) not in inside]
        return tuple(sorted(new, key=lambda m: (m.model.registered_at, m.task.encode())))

    def joined(self, members: tuple[Member, ...], new: Member) -> tuple[Member, ...]:
        """Members with a new one, which replaces another model of its task."""
        return _by_task([*(m for m in members if m.task != new.task), new])


def is_merge_of(record: MergedRecord, recipe: str, members: Iterable[Member]) -> bool:
    """True if a version has this recipe and exactly these members.

    If a task's description changes, the same weights become another version of the task: the
    recipe stays the same, but the measurements differ.
    """
    versions = {member.task: member.version for member in members}
    recorded = {task: member.version for task, member in record.members.items()}
    return record.recipe_digest == recipe and recorded == versions


def line_with_one_method(line_state: LineState, record: MergedRecord | None) -> LineRef:
    """The line with its method; in a tournament with that of a version, or the first."""
    method = line_state.spec.method
    if isinstance(method, MethodSpec):
        return LineRef(line_state.spec, line_state.base)
    used = None if record is None else record.recipe["method"]
    chosen = method.tournament[0]
    if isinstance(used, dict):
        chosen = MethodSpec.from_json({name: used[name] for name in ("name", "settings")})
    return LineRef(line_state.spec.with_method(chosen), line_state.base)


def retention_task(line_state: LineState) -> TaskSpec | None:
    """The general benchmark: described in the line file, or a task of the line."""
    retention = line_state.spec.retention
    if isinstance(retention, str):
        task = line_state.tasks.get(retention)
        return None if task is None else task.spec
    return retention


def take_snapshot(ledger: Ledger) -> Snapshot:
    """Read the line's state once."""
    line_state = ledger.state()
    context = _context(line_state)
    members = {m.task: m for m in line_state.members}
    # Only a task's newest model counts: a model that was held before it is not tried again.
    for (task, version), model in newest_with_gain(line_state):
        is_tried = model.facts.held_in != context and not needs_new_mask(line_state, model)
        if model.state == "held" and is_tried:
            members[task] = member_of(line_state, task, version)

    def record(version: int | None) -> MergedRecord | None:
        return None if version is None else ledger.merged(version)

    newest = record(line_state.newest)
    rejection = None if newest is None or newest.passed else find_rejection(ledger, newest)
    decided_in = None if rejection is None else rejection.digests.get(CIRCUMSTANCES)
    is_rejected = decided_in == _circumstances(context, line_state.champion)
    return Snapshot(
        line_state=line_state,
        members=_by_task(members.values()),
        champion=record(line_state.champion),
        newest=newest,
        candidate=record(line_state.candidate),
        rejected=newest if is_rejected else None,
        context=context,
    )


def find_rejection(ledger: Ledger, record: MergedRecord) -> Entry | None:
    """The last act that rejected the newest version."""
    # The newest entry comes first, so this reads back to the merge at most.
    for entry in ledger.entries():
        if entry.digests.get("patch") == record.patch:
            if entry.kind == "rejected":
                return entry
            if entry.kind == "merged":
                break
    return None


def _circumstances(context: str, champion: int | None) -> str:
    return digest_json([context, champion])


def _context(line_state: LineState) -> str:
    """The digest of everything on which a gate's verdict depends, but the champion."""
    # The newest model of each task, so that holding a model does not change the context.
    models = {key.task: [key.version, model.delta] for key, model in newest_with_gain(line_state)}
    tasks = {
        name: None if task.spec.data is None else description_digest(task.spec)
        for name, task in line_state.tasks.items()
        if task.declared
    }
    retention = line_state.spec.retention
    return digest_json(
        {
            "models": models,
            "gates": line_state.spec.gates.digest,
            "method": line_state.spec.method.to_json(),
            "tasks": tasks,
            "retention": retention if isinstance(retention, str | None) else retention.to_json(),
        }
    )


def needed_models(line_state: LineState) -> list[tuple[ModelKey, ModelVersion]]:
    """The models of which merges may need masks: the members, and newer ones that are held."""
    members = [(ModelKey(m.task, m.version), m.model) for m in line_state.members]
    return list(dict([*members, *newest_models(line_state)]).items())


def newest_models(line_state: LineState) -> list[tuple[ModelKey, ModelVersion]]:
    """The newest ready or held model of each task."""
    return _newest(line_state.in_state("ready", "held"))


def newest_with_gain(line_state: LineState) -> list[tuple[ModelKey, ModelVersion]]:
    """The same without models that are held until they are better than the base."""
    models = line_state.in_state("ready", "held")
    return _newest(m for m in models if m[1].state == "ready" or not m[1].facts.lacks_gain)


def _newest(
    models: Iterable[tuple[ModelKey, ModelVersion]],
) -> list[tuple[ModelKey, ModelVersion]]:
    oldest_first = sorted(models, key=lambda entry: entry[0].version)
    return list({key.task: (key, model) for key, model in oldest_first}.values())


def _by_task(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda m: m.task.encode()))
