"""Stitch, evaluate and judge a set of members, which may become a merged version."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as library_version

from restitch.flows.promotion.lost_skill import why_little
from restitch.flows.promotion.method_selection import FACT, select_method, summarize
from restitch.flows.promotion.snapshot import Snapshot, is_merge_of, retention_task
from restitch.flows.promotion.versions import members_of
from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.merging.recipe import Recipe
from restitch.registry.gates.gate import Drop, GateOutcome, Measured, NotMeasured
from restitch.registry.gates.max_task_drop import MaxTaskDrop
from restitch.registry.gates.registry import check_gates
from restitch.registry.ledger.finetuned_models import Member, ModelRef
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import Acceptance, Gain, decisions
from restitch.registry.ledger.records import (
    DataUsed,
    MergedMember,
    MergedRecord,
    Retention,
    TaskResult,
)
from restitch.registry.record import Interval
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.compare_results import compare_results, read_evaluation
from restitch.tasks.evaluate import Evaluations, evaluate
from restitch.tasks.gain import gain_over_base
from restitch.tasks.inputs.task_data import evaluation_split, left_out_note
from restitch.tasks.merge import make_recipe, stitch
from restitch.tasks.method_selection import SelectionOutcome
from restitch.tasks.runtime.events import this_run
from restitch.tasks.runtime.refs import LineRef, PatchRef, ResultRef, WeightsRef
from restitch.tasks.runtime.sharing import sharing
from restitch.tasks.runtime.workspace import made_by, workspace

# Why a task without data is not measured.
NO_ROWS = "the task has no rows to evaluate on"

LIBRARIES = ("restitch", "torch", "transformers", "datasets", "prefect", "mlflow", "safetensors")


@dataclass(frozen=True)
class Candidate:
    """A merged model with its measurements.

    Attributes:
        gates: the outcomes of all gates that were applied.
        joining: the tasks that gates judge as joining ones.
        drops: the losses against the champion, by task, as far as they were measured.
        tournament: the selection of its method, if the line names several.
    """

    members: tuple[Member, ...]
    recipe: Recipe
    patch: PatchRef
    results: dict[str, TaskResult]
    retention: Retention | None
    joining: frozenset[str]
    drops: dict[str, Drop]
    gates: tuple[GateOutcome, ...]
    timings: dict[str, float]
    tournament: SelectionOutcome | None = None

    @property
    def summary(self) -> str:
        """The members and, after a tournament, the method, for the trail."""
        members = ", ".join(f"{m.task} {m.version}" for m in self.members)
        return members if self.tournament is None else f"{members}: {summarize(self.tournament)}"

    @property
    def passed(self) -> bool:
        """True if no gate blocks it."""
        return not self.failed

    @property
    def failed(self) -> tuple[GateOutcome, ...]:
        """The gates that keep it from promotion."""
        return tuple(gate for gate in self.gates if gate.blocks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a promotion must not pass over: gates that only warn, and losses without a gate."""
        warned = [str(gate.note) for gate in self.gates if not gate.passed and not gate.blocks]
        return (*warned, *self._losses)

    @property
    def _losses(self) -> tuple[str, ...]:
        """The significant losses that no gate judged."""
        judged = {gate.task for gate in self.gates if gate.gate == MaxTaskDrop.name}
        return tuple(text for task, text in self.significant_drops.items() if task not in judged)

    @property
    def significant_drops(self) -> dict[str, str]:
        """A sentence for each task that lost more against the champion than chance explains."""
        drops = self.drops.items()
        return {task: drop.sentence(task) for task, drop in drops if drop.is_significant}

    @property
    def reason(self) -> str:
        """The outcomes of all gates and the losses without a gate, for the trail."""
        gates = [str(gate.note) for gate in self.gates]
        return "; ".join([*(gates or ["no gates"]), *self._losses])

    def is_version(self, record: MergedRecord | None) -> bool:
        """True if this candidate is the same as an existing version."""
        return record is not None and is_merge_of(record, self.patch.recipe, self.members)

    def record(self, line: str, version: int) -> MergedRecord:
        """The record of this candidate as the merged version with a number."""
        return MergedRecord(
            line=line,
            version=version,
            recipe=self.recipe.to_json(),
            recipe_digest=self.patch.recipe,
            patch=self.patch.blob,
            patch_bytes=self.patch.size,
            kept=self.patch.kept,
            members={m.task: _merged_member(m) for m in self.members},
            results=self.results,
            retention=self.retention,
            drops=self.drops,
            gates=self.gates,
            facts={} if self.tournament is None else {FACT: self.tournament},
            created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            made_by=made_by() | ({} if (run := this_run()) is None else {"flow_run": run}),
            timings=self.timings,
            software={name: library_version(name) for name in LIBRARIES},
        )


def make_candidate(
    snapshot: Snapshot, members: tuple[Member, ...], *, again: bool = False
) -> Candidate:
    """Stitch members, evaluate the merged model and apply the line's gates.

    `again` stitches and evaluates even if the store holds the results.
    """
    timings: dict[str, float] = {}
    with _timed(timings, "tournament"):
        selection = select_method(
            snapshot.line, members, snapshot.benchmark, snapshot.current, snapshot.newest
        )
    line = selection.line
    if selection.outcome is None:
        del timings["tournament"]
    with _timed(timings, "statistics"):
        recipe = make_recipe(line, members)
    if not recipe.other:
        del timings["statistics"]
    with _timed(timings, "stitch"):
        patch = stitch(line, recipe, again)
    merged = WeightsRef("merged", patch.blob)
    with _timed(timings, "evaluate"):
        results, retention = measure(line, snapshot.line_state, members, merged, again=again)
        results = with_reasons(line, members, results)
        drops = _drops(snapshot, line, members, results)
    joining = _joining(snapshot, members, recipe)
    measured = Measured(
        normalized={task: _normalized(result) for task, result in results.items()},
        without_gain=frozenset(task for task, r in results.items() if r.has_no_gain),
        drops=drops,
        joining=joining,
        retention=_ratio(snapshot, retention),
        retention_interval=None if retention is None else retention.ratio_interval,
        patch_bytes=patch.size,
    )
    limits = snapshot.line_state.spec.gates
    return Candidate(
        members,
        recipe,
        patch,
        results,
        retention,
        joining,
        {task: drop for task, drop in drops.items() if isinstance(drop, Drop)},
        check_gates(limits.limits, measured, limits.warn),
        timings,
        selection.outcome,
    )


def measure(
    line: LineRef,
    line_state: LineState,
    members: tuple[Member, ...],
    merged: WeightsRef,
    *,
    again: bool = False,
) -> tuple[dict[str, TaskResult], Retention | None]:
    """Evaluate a merged model on its members' tasks and on the benchmark, with idle workers.

    `again` evaluates it here, even if the store holds the results.
    """
    benchmark = retention_task(line_state)
    exams: list[tuple[TaskSpec, ModelRef | None]] = [(m.spec, m.model.model) for m in members]
    if benchmark is not None:
        exams.append((benchmark, None))
    with_rows = [n for n, (spec, _) in enumerate(exams) if evaluation_split(spec) is not None]
    results: dict[str, TaskResult] = {}
    retention = None
    shared = Evaluations(line, merged, [exams[number] for number in with_rows], workspace())
    with sharing(workspace(), shared.work, after=math.inf if again else None) as turns:
        for turn in turns:
            number = with_rows[turn]
            if number == len(members):
                retention = measure_retention(line, line_state, merged, again=again)
            else:
                member = members[number]
                results[member.task] = measure_member(line, member, merged, again=again)
    for member in members:
        if member.task not in results:  # it has no rows
            results[member.task] = measure_member(line, member, merged)
    return {member.task: results[member.task] for member in members}, retention


def with_reasons(
    line: LineRef, members: tuple[Member, ...], results: dict[str, TaskResult]
) -> dict[str, TaskResult]:
    """The results, with a note on each task of which the merged model has little."""
    noted = {}
    for member in members:
        result = results[member.task]
        why = why_little(line.spec, member, result, [t for t in results if t != member.task])
        notes = result.notes if why is None else (*result.notes, why)
        noted[member.task] = result.model_copy(update={"notes": notes})
    return noted


def _joining(snapshot: Snapshot, members: tuple[Member, ...], recipe: Recipe) -> frozenset[str]:
    """The tasks that gates judge as joining ones: all, if the method or the masks changed."""
    tasks = frozenset(member.task for member in members)
    champion = snapshot.champion
    if champion is None or champion.recipe["method"] != recipe.to_json()["method"]:
        return tasks
    inside = champion.members
    known = {m.task: m for m in members if m.task in inside and inside[m.task].version == m.version}
    if any(inside[task].delta != member.model.delta for task, member in known.items()):
        return tasks
    return tasks - known.keys()


def _normalized(result: TaskResult) -> float | NotMeasured:
    """The normalized accuracy of a task, or why it has none."""
    if (share := result.share_of_finetuned) is not None:
        return share
    if result.merged is None:
        return NotMeasured(NO_ROWS)
    if result.finetuned is None:
        return NotMeasured("the finetuned model could not be evaluated")
    return NotMeasured(f"the finetuned model's {result.metric} is {result.finetuned:g}")


def _ratio(snapshot: Snapshot, retention: Retention | None) -> float | NotMeasured:
    """The retention on the line's benchmark, or why there is none."""
    benchmark = snapshot.benchmark
    if retention is not None:
        zero = f"the base's {retention.metric} on {retention.task} is {retention.base:g}"
        return NotMeasured(zero) if retention.ratio is None else retention.ratio
    if benchmark is not None:
        return NotMeasured(f"the benchmark {benchmark.task} has no rows to evaluate on")
    named = snapshot.line_state.spec.retention
    return NotMeasured("the line has no benchmark" if named is None else f"the line has no {named}")


def measure_member(
    line: LineRef, member: Member, merged: WeightsRef, *, again: bool = False
) -> TaskResult:
    """Evaluate a member's task on the merged, base, finetuned and grafted weights."""
    spec, model = member.spec, member.model
    split = evaluation_split(spec)
    if split is None:
        return TaskResult(metric=spec.metric, notes=("no data: not evaluated",))
    result = evaluate(line, spec, merged, model.model, again)
    base = evaluate(line, spec, WeightsRef("base"), model.model)
    grafted = evaluate(line, spec, WeightsRef("grafted", str(model.delta)), model.model)
    notes: tuple[str, ...] = ()
    finetuned: ResultRef | None = None
    try:
        whole = WeightsRef("finetuned", model.model.weights, model.model.uri)
        finetuned = evaluate(line, spec, whole, model.model)
    except BadInput as error:  # its files may be gone, and the merge does not need them
        notes += (f"the finetuned model cannot be evaluated: {error.summary}",)
    if spec.data is not None and spec.data.validation is None and split == "validation":
        notes += ("the validation rows are a part of train: the model may have seen them",)
    notes += _left_out(spec, split)
    measured = {"base": base, "finetuned": finetuned, "grafted": grafted, "merged": result}
    known = {name: ref for name, ref in measured.items() if ref is not None}
    gain = None if finetuned is None else gain_over_base(workspace().objects, base, finetuned)
    has_gain = gain is not None and gain.verdict == "better"
    if gain is not None and not has_gain:
        notes += (_without_gain(gain, model.facts.accepted),)
    return TaskResult(
        metric=spec.metric,
        split=split,
        base=base.value,
        finetuned=None if finetuned is None else finetuned.value,
        grafted=grafted.value,
        merged=result.value,
        gain=gain,
        normalized=result.measure.ratio(result.value, finetuned.value)
        if finetuned and has_gain
        else None,
        interval=_interval(result),
        intervals={name: _interval(ref) for name, ref in known.items() if ref is not result},
        count=result.count,
        evaluations={name: ref.blob for name, ref in known.items()},
        data=_data_used(spec, split),
        notes=notes,
    )


def _without_gain(gain: Gain, accepted: Mapping[str, Acceptance]) -> str:
    note = f"the finetuned model is {gain.against_base}, so there is no normalized value"
    return f"{note}; {decisions(accepted)}" if accepted else note


def measure_retention(
    line: LineRef, line_state: LineState, merged: WeightsRef, *, again: bool = False
) -> Retention | None:
    """Evaluate the general benchmark on merged and base weights; None without a benchmark."""
    spec = retention_task(line_state)
    split = None if spec is None else evaluation_split(spec)
    if spec is None or split is None:
        return None
    base = evaluate(line, spec, WeightsRef("base"))
    result = evaluate(line, spec, merged, None, again)
    blobs = {"base": base.blob, "merged": result.blob}
    rows = {n: read_evaluation(workspace().objects, blob).rows for n, blob in blobs.items()}
    of_ratio = rows["base"].ratio_interval(rows["merged"])
    return Retention(
        task=spec.task,
        metric=result.metric,
        value=result.value,
        base=base.value,
        ratio=result.measure.ratio(result.value, base.value),
        more=result.more,
        base_more=base.more,
        interval=_interval(result),
        base_interval=_interval(base),
        ratio_interval=None if of_ratio is None else Interval(low=of_ratio[0], high=of_ratio[1]),
        count=result.count,
        evaluations=blobs,
        data=_data_used(spec, split),
        notes=_left_out(spec, split),
    )


def _left_out(spec: TaskSpec, split: str) -> tuple[str, ...]:
    note = None if spec.data is None else left_out_note(spec.data, split)
    return () if note is None else (note,)


def _drops(
    snapshot: Snapshot, line: LineRef, members: tuple[Member, ...], results: dict[str, TaskResult]
) -> dict[str, Drop | NotMeasured]:
    """The loss of each task against the champion, or why it cannot be measured.

    A joining task without rows is among them, because none of its losses could ever be measured.
    """
    champion = snapshot.champion
    old = () if champion is None else members_of(snapshot.line_state, champion)
    inside = {member.task: member for member in old}
    drops: dict[str, Drop | NotMeasured] = {}
    for member in members:
        task, new = member.task, results[member.task]
        if new.merged is None:
            drops[task] = NotMeasured(NO_ROWS)
        elif champion is not None and task in inside:
            drops[task] = _drop(line, champion, inside[task], new)
    return drops


def _drop(line: LineRef, champion: MergedRecord, member: Member, new: TaskResult) -> Drop:
    """The loss of a task against the champion on the same rows, and whether it can be chance.

    The champion is evaluated on the task as it is described now; mostly that result is stored.
    """
    assert new.merged is not None
    old = evaluate(line, member.spec, WeightsRef("merged", champion.patch), member.model.model)
    before = TaskResult(metric=new.metric, evaluations={"merged": old.blob}, data=new.data)
    pairs = compare_results(workspace().objects, before, new)
    assert pairs is not None, "both have the same rows and the same metric"
    metric = old.measure
    ends = sorted(metric.loss(old.value, old.value + end) for end in (pairs.low, pairs.high))
    return Drop(
        value=metric.loss(old.value, new.merged),
        fraction_of=None if metric.is_share else metric.name,
        is_noise=not pairs.is_significant,
        against=champion.version,
        interval=Interval(low=ends[0], high=ends[1]),
        p_value=pairs.p_value,
    )


def _interval(result: ResultRef) -> Interval:
    return Interval(low=result.low, high=result.high)


def _data_used(spec: TaskSpec, split: str) -> DataUsed:
    assert spec.data is not None
    sample = None if spec.data.sample is None else spec.data.sample.to_json()
    return DataUsed(
        path=spec.data.path, split=split, digest=digest_json([spec.data.content, split, sample])
    )


def _merged_member(member: Member) -> MergedMember:
    model = member.model
    assert model.mask is not None, "a member has been localized"
    assert model.delta is not None, "a member has been localized"
    return MergedMember(
        version=member.version,
        uri=model.model.uri,
        weights=model.model.weights,
        config=model.model.config,
        mask=model.mask,
        delta=model.delta,
        facts=model.facts.of_member(),
    )


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = round(time.perf_counter() - started, 3)
