"""The state of a line: its tasks, their models, its merged versions and the champion.

A `LineState` is a frozen value. Each method that changes it returns a new one and does nothing
else, so a change can be applied again to a newer state if another process was faster
(`registry.ledger`). It holds digests and small facts only; the store holds large objects
under these digests.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from restitch.registry.ledger.finetuned_models import (
    Member,
    MlflowVersion,
    ModelKey,
    ModelRef,
    ModelVersion,
    Number,
    Removal,
    State,
    Task,
)
from restitch.registry.ledger.measurements import Acceptance, Digest
from restitch.registry.record import Record
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.name import Name
from restitch.registry.specs.task import TaskSpec

FORMAT = 1


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
