"""A set of members, stitched, evaluated and judged: what may become a merged version."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as library_version

from flows.gates import Check, check_gates
from flows.snapshot import Snapshot, is_merge_of, measured
from merging.errors import BadInput
from merging.recipe import Recipe
from registry.head import Head, Member
from registry.history import (
    GateOutcome,
    Interval,
    MergedMember,
    MergedRecord,
    Retention,
    TaskResult,
)
from registry.specs import TaskSpec
from tasks.evaluate import evaluate
from tasks.inputs import evaluation_split
from tasks.merge import make_recipe, stitch
from tasks.refs import LineRef, PatchRef, ResultRef, WeightsRef
from tasks.workspace import made_by

LIBRARIES = ("restitch", "torch", "transformers", "datasets", "prefect", "mlflow", "safetensors")


@dataclass(frozen=True)
class Candidate:
    """A merged model with all that was measured of it.

    Attributes:
        members: by task name.
        checks: every gate that was applied.
    """

    members: tuple[Member, ...]
    recipe: Recipe
    patch: PatchRef
    results: dict[str, TaskResult]
    retention: Retention | None
    checks: tuple[Check, ...]
    timings: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether no gate was failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that were failed."""
        return tuple(check for check in self.checks if not check.passed)

    def is_version(self, record: MergedRecord | None) -> bool:
        """Whether this is a version that is there already."""
        return record is not None and is_merge_of(record, self.patch.recipe, self.members)

    def record(self, line: str, version: int) -> MergedRecord:
        """The record of a merged version with this number."""
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
            gates=tuple(_gate_outcome(check) for check in self.checks),
            created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            made_by=made_by(),
            timings=self.timings,
            software={name: library_version(name) for name in LIBRARIES},
        )


def make_candidate(
    snapshot: Snapshot, members: tuple[Member, ...], *, again: bool = False
) -> Candidate:
    """Stitch members, evaluate the merged model and apply the line's gates.

    Args:
        snapshot: the line, its champion and its gates.
        members: by task name.
        again: stitch and evaluate although the store holds the results.
    """
    line = snapshot.line
    timings: dict[str, float] = {}
    recipe = make_recipe(line, members)
    with _timed(timings, "stitch"):
        patch = stitch(line, recipe, again)
    merged = WeightsRef("merged", patch.blob)
    with _timed(timings, "evaluate"):
        results = {m.task: measure_member(line, m, merged, again=again) for m in members}
        retention = measure_retention(line, snapshot.head, merged, again=again)
    champion = snapshot.measured_champion()
    joining = {m.task for m in snapshot.joining}
    checks = check_gates(snapshot.gates, measured(results, retention), champion, joining)
    return Candidate(members, recipe, patch, results, retention, checks, timings)


def measure_member(
    line: LineRef, member: Member, merged: WeightsRef, *, again: bool = False
) -> TaskResult:
    """How a member's task fares in a merged model, beside its base and its finetuned model."""
    spec, model = member.spec, member.model
    split = evaluation_split(spec)
    if split is None:
        return TaskResult(metric=spec.metric, notes=("no data: not evaluated",))
    found = evaluate(line, spec, merged, model.model, again)
    base = evaluate(line, spec, WeightsRef("base"), model.model)
    grafted = evaluate(line, spec, WeightsRef("grafted", str(model.delta)), model.model)
    notes: tuple[str, ...] = ()
    finetuned: ResultRef | None = None
    try:
        whole = WeightsRef("finetuned", model.model.weights, model.model.uri)
        finetuned = evaluate(line, spec, whole, model.model)
    except BadInput as error:  # its folder may be gone: the merge does not need it
        notes += (f"the finetuned model cannot be evaluated: {error.what}",)
    if spec.data is not None and spec.data.validation is None and split == "validation":
        notes += ("validation rows are set apart from train: the model may have seen them",)
    return TaskResult(
        metric=spec.metric,
        split=split,
        base=base.value,
        finetuned=None if finetuned is None else finetuned.value,
        grafted=grafted.value,
        merged=found.value,
        normalized=found.value / finetuned.value if finetuned and finetuned.value else None,
        interval=Interval(low=found.low, high=found.high),
        count=found.count,
        notes=notes,
    )


def measure_retention(
    line: LineRef, head: Head, merged: WeightsRef, *, again: bool = False
) -> Retention | None:
    """What a merged model keeps of the base's general ability; None without a benchmark."""
    spec = retention_task(head)
    if spec is None or evaluation_split(spec) is None:
        return None
    base = evaluate(line, spec, WeightsRef("base"))
    found = evaluate(line, spec, merged, None, again)
    return Retention(
        task=spec.task,
        top1=found.top1,
        top5=found.top5,
        base_top1=base.top1,
        base_top5=base.top5,
        ratio=found.top1 / base.top1 if base.top1 else 0.0,
        interval=Interval(low=found.low, high=found.high),
        count=found.count,
    )


def retention_task(head: Head) -> TaskSpec | None:
    """The general benchmark: described in the line, or a task of the line by its name."""
    retention = head.spec.retention
    if isinstance(retention, str):
        task = head.tasks.get(retention)
        return None if task is None else task.spec
    return retention


def _merged_member(member: Member) -> MergedMember:
    assert member.model.mask is not None, "a member has been localized"
    assert member.model.delta is not None, "a member has been localized"
    return MergedMember(
        version=member.version,
        uri=member.model.model.uri,
        weights=member.model.model.weights,
        mask=member.model.mask,
        delta=member.model.delta,
    )


def _gate_outcome(check: Check) -> GateOutcome:
    return GateOutcome(
        gate=check.gate,
        limit=check.limit,
        value=check.value,
        passed=check.passed,
        task=None if check.gate == "min_retention" else check.subject,
        note=str(check),
    )


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = round(time.perf_counter() - started, 3)
