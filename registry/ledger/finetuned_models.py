"""The tasks of a line and their finetuned models: sources, states, and findings."""

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
from restitch.registry.specs.task import TaskSpec

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
