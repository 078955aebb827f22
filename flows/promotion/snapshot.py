"""What a remerge starts from: one look at the head, and the questions asked of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from restitch.flows.promotion.method_selection import earlier_selection
from restitch.merging.digests import digest_json
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState, Member, ModelVersion
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.merge import known_recipe
from restitch.tasks.runtime.refs import LineRef


@dataclass(frozen=True)
class Snapshot:
    """A line at one moment.

    Attributes:
        members: what a merge of everything holds, by task name: the newest ready model of each
            task, and held ones whose circumstances changed since they were held.
        champion: the record of the version in use.
        newest: the record of the newest version, whatever became of it.
        context: digest of all that decides about holding: models, gates and data.
    """

    line_state: LineState
    members: tuple[Member, ...]
    champion: MergedRecord | None
    newest: MergedRecord | None
    context: str

    @property
    def line(self) -> LineRef:
        """The line as this run sees it."""
        return LineRef(self.line_state.spec, self.line_state.base)

    @property
    def line_in_use(self) -> LineRef:
        """The line with one method: of a tournament's that of the version in use, or the first."""
        return line_with_one_method(self.line_state, self.champion)

    @cached_property
    def settled(self) -> MergedRecord | None:
        """The version that is the merge of these members already, so that none need be made.

        None, too, where a tournament has yet to say what their merge is.
        """
        held = earlier_selection(self.line, self.members, self.benchmark, self.current)
        recipe = None if held is None else known_recipe(held.line, self.members)
        return None if recipe is None else self.merge_of(recipe.digest(), self.members)

    def merge_of(self, recipe: str, members: Iterable[Member]) -> MergedRecord | None:
        """The current version that was made by a recipe from members, if one was."""
        return next((one for one in self.current if is_merge_of(one, recipe, members)), None)

    @property
    def current(self) -> tuple[MergedRecord, ...]:
        """The version in use and, where promotion is switched off, the newest one.

        Otherwise a newer one that failed its gates counts for nothing.
        """
        found = (self.champion, self.newest if self.line_state.pinned else None)
        return tuple(record for record in found if record is not None)

    @property
    def benchmark(self) -> TaskSpec | None:
        """The general benchmark of the line."""
        return retention_task(self.line_state)

    @cached_property
    def champion_members(self) -> tuple[Member, ...]:
        """The champion's members that are still on the line, with the models it holds."""
        if self.champion is None:
            return ()
        found = []
        for task, kept in self.champion.members.items():
            versions = self.line_state.tasks[task].versions
            model = versions.get(kept.version)
            if model is not None and model.state in ("ready", "held", "replaced"):
                spec = self.line_state.tasks[task].spec
                found.append(Member(task=task, version=kept.version, spec=spec, model=model))
        return _by_task(found)

    @property
    def joining(self) -> tuple[Member, ...]:
        """The members that the champion does not hold, oldest first."""
        held = {(m.task, m.version) for m in self.champion_members}
        new = [m for m in self.members if (m.task, m.version) not in held]
        return tuple(sorted(new, key=lambda m: (m.model.registered_at, m.task.encode())))

    def joined(self, members: tuple[Member, ...], new: Member) -> tuple[Member, ...]:
        """Members with one more, which takes the place of another model of its task."""
        return _by_task([*(m for m in members if m.task != new.task), new])


def is_merge_of(record: MergedRecord, recipe: str, members: Iterable[Member]) -> bool:
    """Whether a version was made by this recipe from these very versions of the tasks.

    A task that was described anew has another version with the same weights: the recipe is
    the same, what was measured is not.
    """
    versions = {member.task: member.version for member in members}
    recorded = {task: member.version for task, member in record.members.items()}
    return record.recipe_digest == recipe and recorded == versions


def line_with_one_method(line_state: LineState, record: MergedRecord | None) -> LineRef:
    """The line with its method; of a tournament's with that of a version, or else the first."""
    method = line_state.spec.method
    if isinstance(method, MethodSpec):
        return LineRef(line_state.spec, line_state.base)
    found = None if record is None else record.recipe["method"]
    one = method.tournament[0]
    if isinstance(found, dict):
        one = MethodSpec.from_json({name: found[name] for name in ("name", "settings")})
    return LineRef(line_state.spec.with_method(one), line_state.base)


def retention_task(line_state: LineState) -> TaskSpec | None:
    """The general benchmark: described in the line, or a task of the line by its name."""
    retention = line_state.spec.retention
    if isinstance(retention, str):
        task = line_state.tasks.get(retention)
        return None if task is None else task.spec
    return retention


def take_snapshot(ledger: Ledger) -> Snapshot:
    """Look at the head once."""
    line_state = ledger.state()
    context = _context(line_state)
    members = {m.task: m for m in line_state.members}
    # A task's newest model counts: one that was held before it is not tried any more.
    newest = {task: (number, model) for task, number, model in localized_models(line_state)}
    for task, (number, model) in newest.items():
        if model.state == "held" and model.facts.held_in != context:
            spec = line_state.tasks[task].spec
            members[task] = Member(task=task, version=number, spec=spec, model=model)
    return Snapshot(
        line_state=line_state,
        members=_by_task(members.values()),
        champion=None if line_state.champion is None else ledger.merged(line_state.champion),
        newest=None if line_state.newest is None else ledger.merged(line_state.newest),
        context=context,
    )


def _context(line_state: LineState) -> str:
    """What a gate's verdict depends on: a held model is tried again when this changes."""
    # The newest of each task: holding or replacing a model must not change its own context.
    models = {task: [number, model.delta] for task, number, model in localized_models(line_state)}
    data = {
        name: None if task.spec.data is None else task.spec.data.content
        for name, task in line_state.tasks.items()
        if task.declared
    }
    retention = line_state.spec.retention
    return digest_json(
        {
            "models": models,
            "gates": line_state.spec.gates.to_json(),
            "method": line_state.spec.method.to_json(),
            "data": data,
            "retention": retention if isinstance(retention, str | None) else retention.to_json(),
        }
    )


def localized_models(line_state: LineState) -> list[tuple[str, int, ModelVersion]]:
    """All models that could be merged, the newest of each task last."""
    return sorted(line_state.in_state("ready", "held"), key=lambda found: found[1])


def _by_task(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda m: m.task.encode()))
