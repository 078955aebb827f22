"""The state of a line: its tasks, their models, its merged versions and the champion.

A `LineState` is a frozen value. Each method that changes it returns a new one and does nothing
else, so a change can be applied again to a newer state if another process was faster
(`registry.ledger`). It holds digests and small facts only; the store holds large objects
under these digests.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from restitch.merging.digests import digest_bytes
from restitch.registry.ledger.measurements import Acceptance, Digest, Gain, ResultRef
from restitch.registry.record import Record
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import Name, TaskSpec

FORMAT = 1

# Stands for the digest of a checkpoint that could not be read: the digest of no bytes.
UNREAD = digest_bytes(b"")

# The checks that a person may switch off for a model; see `MemberFacts.accepted`.
NO_GAIN, PREPROCESSING = "no gain", "preprocessing"

State = Literal[
    "registered", "waiting", "quarantined", "ready", "held", "replaced", "retired", "forgotten"
]

Number = Annotated[int, Field(ge=1)]


class Removal(Record):
    """Who removed something, when and why.

    Attributes:
        time: UTC, ISO.
    """

    actor: str
    time: str
    reason: str

    def __str__(self) -> str:
        return f"by {self.actor} on {self.time[:16].replace('T', ' ')} UTC: {self.reason}"


class ModelRef(Record):
    """A checkpoint, where to read it, and the digests to check it against.

    Attributes:
        uri: the resolved source: an absolute path, an address, or `org/name@commit`.
        weights: the digest of its tensors; `UNREAD` if they could not be read.
        config: the digest of its configuration, tokenizer and processor files.
        size: the bytes of its tensors.
        blob: the digest of a copy in the store, if there is one.
    """

    uri: str
    weights: Digest
    config: Digest
    size: Annotated[int, Field(ge=0)] = 0
    blob: Digest | None = None


class MlflowVersion(Record):
    """A version of a registered model that was made in MLflow.

    Attributes:
        number: MLflow's number.
        created: the time of its creation in milliseconds, because the numbers start again if
            the registered model is deleted and created again.
    """

    number: Number
    created: int


class RetiredFrom(Record):
    """The state that a retired model had before, and the reason for it."""

    state: State
    reason: str | None = None


class TensorGroup(Record):
    """Some tensors of a checkpoint.

    Attributes:
        count: the number of tensors.
        weights: the number of their elements.
        share: the fraction of all elements of the checkpoint.
        names: the first of them.
    """

    count: int
    weights: int
    share: float
    names: tuple[str, ...] = ()


class Addition(Record):
    """Tensors that a line could merge, too.

    Attributes:
        include: globs for `localize: include`.
        value: the value of the base with all weights of a finetuned model in the tensors that the
            line would then merge.
    """

    include: tuple[str, ...]
    value: float


class MemberFacts(Record):
    """The facts of localizing a member, which a merged version's record keeps.

    Unset fields are not written.

    Attributes:
        localizer: the name and version of the localizer, for instance `dataless/1`.
        density: `kept` per localizable coordinate.
        kept: the number of coordinates in the mask, or of the numbers that a subspace stores.
        coordinates: the number of localizable coordinates.
        delta_bytes: the size of the sparse delta.
        outside_share: the share of the finetuning's squared norm outside of the localizable
            tensors.
        unused: the finetuned model's tensors that the base lacks; nothing reads them.
        from_base: the base's tensors that the finetuned model lacks; the base's are used.
        notes: sentences about what was inferred from its files, ignored, or accepted by a person.
        seconds: the time that localizing took.
        localized_by: the process that localized: actor, host, pid, device.
        calibrated_with: what was used of the calibration rows: labels, inputs or nothing.
        budget: the allowed `bytes` of the delta, and how many coordinates fit (`fits`).
        recovery: the measurements from which `density: auto` chose the density.
        statistics_seconds: the time that measuring the statistics took.
        accepted: the decisions to switch off a check for it, by check.
    """

    localizer: str | None = None
    density: float | None = None
    kept: int | None = None
    coordinates: int | None = None
    delta_bytes: int | None = None
    outside_share: float | None = None
    unused: TensorGroup | None = None
    from_base: TensorGroup | None = None
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    localized_by: dict[str, JsonValue] | None = None
    calibrated_with: str | None = None
    calibration_rows: int | None = None
    budget: dict[str, int] | None = None
    recovery: dict[str, JsonValue] | None = None
    statistics_bytes: int | None = None
    statistics_seconds: float | None = None
    accepted: dict[str, Acceptance] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        default = type(self)()
        return {k: v for k, v in values.items() if getattr(self, k) != getattr(default, k)}


class ModelFacts(MemberFacts):
    """The findings about a finetuned model. Unset fields are not written.

    Attributes:
        choice: the digest of the settings that chose the mask; `onboard` localizes again when
            the line's settings have another.
        outside_tensors: the tensors outside of the localizable ones that changed, with their
            shares of the squared norm, largest first.
        addition: globs that would add the tensors without which a skill is lost, and the value of
            the base with all weights that the line could merge then.
        results: the evaluations of base, finetuned, localizable and grafted weights.
        gain: the comparison of base and finetuned weights; None if it was not measured.
        measured_on: the digest of the task's description with which it was measured; `onboard`
            measures again when the task has another.
        expected: the value that the model's author measured.
        statistics: the digests of the statistics that the line's methods need, by kind.
        deaths: the number of processes that died while they onboarded the model.
        registered_again: how often the model was registered again after such deaths.
        retired_from: the state before a retirement, which `restore` gives back.
        held_in: the digest of the circumstances in which a gate held the model; it is tried
            again when they change.
        purged: the removal of its weights and of all that was derived from them.
    """

    choice: str | None = None
    outside_tensors: tuple[tuple[str, float], ...] = ()
    addition: Addition | None = None
    results: dict[str, ResultRef] = Field(default_factory=dict)
    gain: Gain | None = None
    measured_on: Digest | None = None
    expected: float | None = None
    statistics: dict[str, Digest] = Field(default_factory=dict)
    deaths: int = 0
    registered_again: int = 0
    retired_from: RetiredFrom | None = None
    held_in: str | None = None
    purged: Removal | None = None

    @property
    def lacks_gain(self) -> bool:
        """True if it is worse than the base on its own task and nobody has accepted that."""
        worse = self.gain is not None and self.gain.verdict == "worse"
        return worse and NO_GAIN not in self.accepted

    def of_member(self) -> MemberFacts:
        """The part that a merged version's record keeps."""
        return MemberFacts(**{name: getattr(self, name) for name in MemberFacts.model_fields})


class ModelVersion(Record):
    """One finetuned model of a task.

    Attributes:
        state: registered (nothing done yet), waiting (for its task's description),
            quarantined (cannot join), ready (localized: the newest one is the member), held
            (its joining failed a gate, or it is worse than the base), replaced (by a newer
            member), retired, forgotten (it was registered by mistake, and never takes part again).
        reason: the reason for the state, for a reader.
        registered_at: the time of registration, UTC, ISO.
        mlflow: the version in MLflow, if it was registered there and not here.
    """

    model: ModelRef
    state: State = "registered"
    reason: str | None = None
    mask: Digest | None = None
    delta: Digest | None = None
    registered_at: str = ""
    facts: ModelFacts = ModelFacts()
    mlflow: MlflowVersion | None = None

    @model_validator(mode="after")
    def _ready_has_a_delta(self) -> Self:
        if self.state in ("ready", "held") and (self.mask is None or self.delta is None):
            raise ValueError(f"a model that is {self.state} needs a mask and a delta")
        return self


class Task(Record):
    """A task of the line, with all models that were registered for it.

    Attributes:
        declared: whether the task is described; until then its models wait, and the spec
            holds only the name. A forgotten task is not declared any more.
    """

    spec: TaskSpec
    declared: bool = True
    versions: dict[Number, ModelVersion] = Field(default_factory=dict)

    @property
    def next_version(self) -> int:
        """The number of the next model; no number is used twice."""
        return max(self.versions, default=0) + 1

    @property
    def ready(self) -> int | None:
        """The newest ready version, which is the member."""
        return max((n for n, v in self.versions.items() if v.state == "ready"), default=None)

    @property
    def forgotten(self) -> bool:
        """True if it has models, and all of them are forgotten."""
        return {model.state for model in self.versions.values()} == {"forgotten"}


class ModelKey(NamedTuple):
    """A finetuned model of a line: its task, and its version there."""

    task: str
    version: int

    def __str__(self) -> str:
        return f"{self.task} {self.version}"


class Member(Record):
    """A task's model that takes part in merges."""

    task: str
    version: int
    spec: TaskSpec
    model: ModelVersion


class Pause(Record):
    """A pause of the automatic work on a line.

    Attributes:
        schedule_only: whether events still start work, and only the schedule is off.
        actor: who paused it.
        since: when, UTC, ISO.
        reason: why, for a reader.
    """

    schedule_only: bool
    actor: str
    since: str
    reason: str

    def __str__(self) -> str:
        """Since when, by whom and why."""
        return f"since {self.since[:16].replace('T', ' ')} UTC by {self.actor}: {self.reason}"


class LineState(Record):
    """The state of a line.

    Attributes:
        generation: a number that grows with every swap.
        sequence: the number of the last act; 0 before the first one.
        entry: the digest of the last act's audit entry.
        time: the time of the last act; no later act has an earlier time.
        versions: the digests of the records of all merged versions.
        champion: the merged version in use.
        candidate: the newest merged version that passed its gates and waits for its promotion,
            because the line is pinned.
        pinned: whether automatic promotion is off.
        paused: the pause of its automatic work, or of its schedule.
        purged: the removals of the weights of merged versions.
        dropped: the removal of the line; its trail and its records stay.
    """

    format: int = FORMAT
    line: Name
    generation: int = 0
    sequence: int = 0
    entry: Digest | None = None
    time: str = ""
    spec: LineSpec
    base: ModelRef
    tasks: dict[Name, Task] = Field(default_factory=dict)
    next_version: Number = 1
    versions: dict[Number, Digest] = Field(default_factory=dict)
    champion: Number | None = None
    candidate: Number | None = None
    pinned: bool = False
    paused: Pause | None = None
    purged: dict[Number, Removal] = Field(default_factory=dict)
    dropped: Removal | None = None

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        # A line without pauses and removals is written as before these fields existed.
        return {k: v for k, v in values.items() if v or k not in ("purged", "dropped", "paused")}

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        return self._checked()

    def _checked(self) -> Self:
        """Refuse a state that contradicts itself."""
        if self.spec.line != self.line:
            raise ValueError(f"the spec describes line {self.spec.line}, not {self.line}")
        for role in ("champion", "candidate"):
            version = getattr(self, role)
            if version is not None and version not in self.versions:
                raise ValueError(f"the {role} is version {version}, which does not exist")
            if version in self.purged:
                raise ValueError(f"the {role} is version {version}, which is purged")
        if self.versions and max(self.versions) >= self.next_version:
            raise ValueError(
                f"the next version is {self.next_version}, and {max(self.versions)} exists"
            )
        return self

    @property
    def newest(self) -> int | None:
        """The newest merged version, promoted or not."""
        return max(self.versions, default=None)

    @property
    def members(self) -> tuple[Member, ...]:
        """The newest ready model of each task, by task name."""
        return tuple(
            Member(task=name, version=ready, spec=task.spec, model=task.versions[ready])
            for name, task in sorted(self.tasks.items(), key=lambda item: item[0].encode())
            if (ready := task.ready) is not None
        )

    def model(self, key: ModelKey) -> ModelVersion:
        """A model of the line."""
        return self.tasks[key.task].versions[key.version]

    @property
    def models(self) -> tuple[tuple[ModelKey, ModelVersion], ...]:
        """All models of all tasks."""
        return tuple(
            (ModelKey(name, number), version)
            for name, task in self.tasks.items()
            for number, version in task.versions.items()
        )

    def in_state(self, *states: State) -> tuple[tuple[ModelKey, ModelVersion], ...]:
        """All models in one of the states, oldest first."""
        models = [(key, version) for key, version in self.models if version.state in states]
        return tuple(
            sorted(models, key=lambda m: (m[1].registered_at, m[0].task.encode(), m[0].version))
        )

    def with_spec(self, spec: LineSpec) -> "LineState":
        """Return the state with another spec."""
        return self._changed(spec=spec)

    def with_task(self, spec: TaskSpec) -> "LineState":
        """Return the state with a new task, or with another description of a known one."""
        old = self.tasks.get(spec.task)
        versions = {} if old is None else old.versions
        return self._changed(tasks={**self.tasks, spec.task: Task(spec=spec, versions=versions)})

    def with_undeclared(self, task: str) -> "LineState":
        """Return the state with a task that is not described yet, unless it has the task."""
        if task in self.tasks:
            return self
        unknown = Task(spec=TaskSpec(task=task), declared=False)
        return self._changed(tasks={**self.tasks, task: unknown})

    def adopted(self, task: str, mlflow: MlflowVersion) -> int | None:
        """The version of a task that was adopted from this version in MLflow."""
        versions = self.tasks[task].versions if task in self.tasks else {}
        return next((n for n, v in versions.items() if v.mlflow == mlflow), None)

    def with_version(self, task: str, model: ModelVersion) -> "LineState":
        """Return the state with a model as the task's next version."""
        known = self._task(task)
        return self._with_versions(task, {**known.versions, known.next_version: model})

    def with_state(
        self, task: str, version: int, state: State, reason: str | None = None, **changes: Any
    ) -> "LineState":
        """Return the state with a model in another state, and with other changes of it."""
        known = self._task(task)
        if version not in known.versions:
            raise ValueError(f"task {task} has no model {version}")
        values = known.versions[version].to_json() | changes | {"state": state, "reason": reason}
        model = ModelVersion.model_validate(values)
        return self._with_versions(task, {**known.versions, version: model})

    def with_accepted(self, key: ModelKey, accepted: Mapping[str, Acceptance]) -> "LineState":
        """Return the state with checks of a model switched off; earlier decisions stay.

        If the model is held or quarantined for one of them, it is registered again.
        """
        model = self.model(key)
        if not accepted.keys() - model.facts.accepted.keys():
            return self
        decided = {**accepted, **model.facts.accepted}
        facts = model.facts.model_copy(update={"accepted": decided})
        held = model.state == "held" and model.facts.lacks_gain and not facts.lacks_gain
        if held or model.state == "quarantined":
            return self.with_state(*key, "registered", facts=facts)
        return self.with_state(*key, model.state, model.reason, facts=facts)

    def with_merged(self, record: str, *, passed: bool = True) -> "LineState":
        """Return the state with another version, which is the candidate if it passed its gates."""
        return self._changed(
            versions={**self.versions, self.next_version: record},
            candidate=self.next_version if passed else self.candidate,
            next_version=self.next_version + 1,
        )

    def promoted(self, version: int) -> "LineState":
        """Return the state with another champion, which supersedes older candidates."""
        superseded = self.candidate is not None and self.candidate <= version
        candidate = None if superseded else self.candidate
        return self._changed(champion=version, candidate=candidate)

    def without_champion(self) -> "LineState":
        """Return the state without a champion."""
        return self._changed(champion=None)

    def without_candidate(self) -> "LineState":
        """Return the state without a candidate."""
        return self._changed(candidate=None)

    def with_forgotten(self, task: str, version: int, reason: str) -> "LineState":
        """Return the state without a model in any later merge."""
        return self.with_state(task, version, "forgotten", reason)

    def without_description(self, task: str) -> "LineState":
        """Return the state in which a task's description counts only for its present models."""
        known = self._task(task).model_copy(update={"declared": False})
        return self._changed(tasks={**self.tasks, task: known})

    def with_purged(
        self, models: Iterable[ModelKey], versions: Iterable[int], removal: Removal
    ) -> "LineState":
        """Return the state with models and merged versions whose weights are removed."""
        line_state, gone = self, list(versions)
        for key in models:
            model = line_state.model(key)
            facts = model.facts.model_copy(update={"purged": removal})
            line_state = line_state.with_state(*key, model.state, model.reason, facts=facts)
        candidate = None if line_state.candidate in gone else line_state.candidate
        purged = {**line_state.purged, **dict.fromkeys(gone, removal)}
        return line_state._changed(purged=purged, candidate=candidate)

    def with_drop(self, dropped: Removal | None) -> "LineState":
        """Return the state of a line that is dropped, or starts again (None)."""
        return self._changed(dropped=dropped)

    def with_pin(self, pinned: bool) -> "LineState":
        """Return the state with automatic promotion off (pinned) or on."""
        return self._changed(pinned=pinned)

    @property
    def is_paused(self) -> bool:
        """True if all automatic work is paused, and not only the schedule."""
        return self.paused is not None and not self.paused.schedule_only

    def with_pause(self, pause: Pause | None) -> "LineState":
        """Return the state with automatic work paused, or going on (None)."""
        return self._changed(paused=pause)

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(f"line {self.line} has no task {name}")
        return self.tasks[name]

    def _with_versions(self, name: str, versions: dict[int, ModelVersion]) -> "LineState":
        task = self.tasks[name].model_copy(update={"versions": versions})
        return self._changed(tasks={**self.tasks, name: task})

    def _changed(self, **changes: Any) -> "LineState":
        # `model_copy` does not validate.
        return self.model_copy(update=changes)._checked()
