"""The acts of a line, and the records of its merged versions.

An act is an immutable `Entry` that names the digest of the previous one, so that the trail is
a hash chain. It holds what it changed of the line's state as JSON pointers with the values
before and after: applied from the first entry on (`replay`), they give the state itself.
A `MergedRecord` holds everything that is recorded about a merged version.
"""

import copy
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, model_serializer

from restitch.merging.digests import canonical_json, digest_bytes
from restitch.registry.gates.gate import Drop, GateOutcome, Verdict
from restitch.registry.ledger.finetuned_models import MemberFacts, Number
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import Digest, Gain
from restitch.registry.record import Interval, Record
from restitch.registry.specs.metric import METRICS, mean_share

FORMAT = 1

Kind = Literal[
    "configured",
    "registered",
    "localized",
    "measured",
    "quarantined",
    "waiting",
    "held",
    "merged",
    "rejected",
    "promoted",
    "rolled-back",
    "retired",
    "restored",
    "pinned",
    "unpinned",
    "paused",
    "resumed",
    "forgotten",
    "dropped",
    "purged",
]

# The chain's own fields: an entry with them would have to contain its own digest.
_BOOKKEEPING = {"generation", "sequence", "entry", "time"}


class _Stored(Record):
    """A record that is an object in the store."""

    def to_bytes(self) -> bytes:
        """The bytes that are stored."""
        return canonical_json(self.to_json())

    @property
    def digest(self) -> str:
        """The digest under which it is stored."""
        return digest_bytes(self.to_bytes())


class Entry(_Stored):
    """One act.

    Attributes:
        sequence: 1 for the first act of the line.
        previous: the digest of the previous entry.
        time: UTC, ISO with microseconds; never earlier than that of the previous entry.
        before: the values that the act replaced or removed, by JSON pointers into the line's
            state.
        after: the new values.
        reason: why, for a reader.
        digests: the objects that the act is about, by name.
    """

    format: int = FORMAT
    line: str
    sequence: Annotated[int, Field(ge=1)]
    previous: Digest | None
    kind: Kind
    actor: str
    time: str
    before: dict[str, JsonValue]
    after: dict[str, JsonValue]
    reason: str
    digests: dict[str, str] = Field(default_factory=dict)


class DataUsed(Record):
    """The rows that something was measured on.

    Attributes:
        path: their source, an absolute path or a pinned hub id.
        digest: of everything that determines the rows and their content.
    """

    path: str
    split: str
    digest: Digest


class TaskResult(Record):
    """The measurements of one task in a merged version.

    Attributes:
        base: the value of the base; likewise `finetuned`, `grafted` and `merged`. None if it
            was not measured.
        gain: the comparison of finetuned and base; None if it was not measured.
        normalized: merged over finetuned, inverted where lower is better, if the finetuned model
            is better than the base: otherwise a model without any skill would have the best value.
        interval: of the merged value.
        intervals: of the other values, by name.
        count: the number of examples.
        evaluations: the stored evaluations by name, with the outcome of every row.
    """

    metric: str = "accuracy"
    split: str | None = None
    base: float | None = None
    finetuned: float | None = None
    grafted: float | None = None
    merged: float | None = None
    gain: Gain | None = None
    normalized: float | None = None
    interval: Interval | None = None
    intervals: dict[str, Interval] = Field(default_factory=dict)
    count: int | None = None
    evaluations: dict[str, Digest] = Field(default_factory=dict)
    data: DataUsed | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_no_gain(self) -> bool:
        """True if the finetuned model was compared with the base, and is not better."""
        return self.gain is not None and self.gain.verdict != "better"

    @property
    def share_of_finetuned(self) -> float | None:
        """Merged over finetuned, even if the finetuned model has no gain; see `Metric.ratio`."""
        if self.merged is None or self.finetuned is None:
            return None
        return METRICS[self.metric].ratio(self.merged, self.finetuned)


class Retention(Record):
    """The general ability of the merged model, compared with that of the base.

    Attributes:
        value: the metric of the merged model; its 95 % interval is `interval`.
        base: that of the base; its 95 % interval is `base_interval`.
        ratio: value over base, inverted where lower is better; its 95 % interval is
            `ratio_interval`. None if it would be a division by zero.
        more: further values of the merged model by name, such as `top5`; `base_more` of the base.
        evaluations: the stored evaluations of base and merged.
        notes: what else a reader should know; not written if there is nothing.
    """

    task: str
    metric: str = "accuracy"
    value: float
    base: float
    ratio: float | None
    more: dict[str, float] = Field(default_factory=dict)
    base_more: dict[str, float] = Field(default_factory=dict)
    interval: Interval | None = None
    base_interval: Interval | None = None
    ratio_interval: Interval | None = None
    count: int | None = None
    evaluations: dict[str, Digest] = Field(default_factory=dict)
    data: DataUsed | None = None
    notes: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty_notes(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return values if self.notes else {k: v for k, v in values.items() if k != "notes"}


class MergedMember(Record):
    """A member of a merged version.

    Attributes:
        uri: the source of its checkpoint; `weights` and `config` are its digests.
        facts: how it was localized.
    """

    version: int
    uri: str
    weights: Digest
    config: Digest | None = None
    mask: Digest
    delta: Digest
    facts: MemberFacts = MemberFacts()


class MergedRecord(_Stored):
    """Everything that is recorded about one merged version.

    Attributes:
        recipe: everything that determines its bytes.
        patch: the digest of the patch in the store.
        kept: coordinates in which it differs from the base.
        members: by task; likewise `results`.
        drops: the losses against the champion of that time, by task; not written if there are
            none.
        gates: the outcomes of all gates; empty if the line has none.
        files: digests of further files, by name.
        timings: seconds by step.
        software: versions of code and libraries.
    """

    format: int = FORMAT
    line: str
    version: Number
    recipe: dict[str, JsonValue]
    recipe_digest: Digest
    patch: Digest
    patch_bytes: int
    kept: int
    members: dict[str, MergedMember]
    results: dict[str, TaskResult] = Field(default_factory=dict)
    retention: Retention | None = None
    drops: dict[str, Drop] = Field(default_factory=dict)
    gates: tuple[GateOutcome, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    created_at: str
    made_by: JsonValue = None
    timings: dict[str, float] = Field(default_factory=dict)
    software: dict[str, str] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_empty_drops(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return values if self.drops else {k: v for k, v in values.items() if k != "drops"}

    @property
    def statistics(self) -> dict[str, str]:
        """Digests of the member statistics that its method used, from the recipe."""
        other = self.recipe.get("other")
        return {n: str(d) for n, d in other.items()} if isinstance(other, dict) else {}

    @property
    def mean_accuracy(self) -> float | None:
        """The mean of the merged values of the tasks that were evaluated by a share."""
        return mean_share((r.metric, r.merged) for r in self.results.values())

    @property
    def mean_normalized(self) -> float | None:
        """The mean of the normalized values of the tasks that have one."""
        return mean_of(r.normalized for r in self.results.values())

    @property
    def passed(self) -> bool:
        """True if no gate blocks its promotion."""
        return not any(gate.blocks for gate in self.gates)

    @property
    def verdict(self) -> Verdict | Literal["none"]:
        """The outcome of its gates in words; `none` if the line had no gates."""
        if not self.gates:
            return "none"
        blocking = {gate.verdict for gate in self.gates if gate.blocks}
        return "failed" if "failed" in blocking else "not measured" if blocking else "passed"

    @property
    def misses(self) -> tuple[str, ...]:
        """The gates that it did not pass, as sentences."""
        return tuple(gate.note or gate.gate for gate in self.gates if not gate.passed)

    @property
    def losses(self) -> tuple[str, ...]:
        """The significant losses of tasks against the champion of that time, as sentences."""
        return tuple(d.sentence(task) for task, d in self.drops.items() if d.is_significant)


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def state_of(line_state: LineState | None) -> dict[str, Any]:
    """A line's state as plain JSON, without the fields of the chain."""
    return {} if line_state is None else line_state.model_dump(mode="json", exclude=_BOOKKEEPING)


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """The values that differ, before and after, by JSON pointers.

    Mappings are compared key by key, other values as a whole.
    """
    before: dict[str, JsonValue] = {}
    after: dict[str, JsonValue] = {}
    for key in sorted(old.keys() | new.keys()):
        pointer = f"{prefix}/{key.replace('~', '~0').replace('/', '~1')}"
        if key not in new:
            before[pointer] = old[key]
        elif key not in old:
            after[pointer] = new[key]
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            inner_before, inner_after = differences(old[key], new[key], pointer)
            before |= inner_before
            after |= inner_after
        elif not _same(old[key], new[key]):
            before[pointer], after[pointer] = old[key], new[key]
    return before, after


def _same(old: JsonValue, new: JsonValue) -> bool:
    # In Python 1, 1.0 and True are equal; in JSON they are not.
    return old == new and canonical_json(old) == canonical_json(new)


def replay(entries: Iterable[Entry], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Apply acts, oldest first, to a state in place; by default to an empty one."""
    state = {} if state is None else state
    for entry in entries:
        for pointer in entry.before.keys() - entry.after.keys():
            owner, key = _owner(state, pointer)
            owner.pop(key, None)
        for pointer, value in entry.after.items():
            owner, key = _owner(state, pointer)
            # A copy: later acts change parts of it, and entries never change.
            owner[key] = copy.deepcopy(value)
    return state


def _owner(state: dict[str, Any], pointer: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds the value of a pointer.

    An act of a version before a key existed does not give the mapping that is its default now.
    """
    *path, key = (p.replace("~1", "/").replace("~0", "~") for p in pointer.split("/")[1:])
    for part in path:
        state = state.setdefault(part, {})
    return state, key
