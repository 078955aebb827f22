"""The references that steps pass to each other: small frozen values, never tensors."""

from dataclasses import dataclass, field
from typing import Any, Literal

from restitch.registry.ledger.finetuned_models import ModelRef, TensorGroup
from restitch.registry.ledger.measurements import ResultRef as ResultRef
from restitch.registry.specs.line import LineSpec


@dataclass(frozen=True)
class LineRef:
    """A line as one flow run sees it from start to end: its specification and its base."""

    spec: LineSpec
    base: ModelRef


@dataclass(frozen=True)
class DeltaRef:
    """A member's delta in the store: a mask with its values, or a subspace.

    Attributes:
        blob: digest of the delta file.
        mask: digest of the mask alone, or of the subspace.
        kept: the number of coordinates in the mask, or of stored numbers of a subspace.
        coordinates: the number of localizable coordinates.
        localizer: its name and version, for instance "dataless/1".
        made_by: the process that localized: worker, host, process, pool, device.
        facts: the data that calibrated it, and how its density was chosen; see
            `localize.RECORDED_FACTS`.
    """

    blob: str
    mask: str
    kept: int
    coordinates: int
    size: int
    localizer: str
    seconds: float | None = None
    made_by: Any = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """The kept numbers per localizable coordinate."""
        return self.kept / self.coordinates if self.coordinates else 0.0


@dataclass(frozen=True)
class WrittenDelta:
    """A delta file that was written.

    Attributes:
        digest: of the file.
        mask: digest of the mask, or of the subspace.
        facts: how it was calibrated, and how its density or rank was chosen.
    """

    digest: str
    mask: str
    kept: int
    coordinates: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchRef:
    """A merged model in the store, as a patch on its base; `seconds` is None if it was there."""

    blob: str
    kept: int
    size: int
    recipe: str
    seconds: float | None = None


@dataclass(frozen=True)
class StatisticRef:
    """A statistic in the store, which a merge method needs in addition to deltas.

    Attributes:
        seconds: how long this run took to measure it; None if it was in the store.
        recorded_seconds: how long the run took that measured it.
    """

    blob: str
    size: int
    seconds: float | None = None
    recorded_seconds: float | None = None


WeightsKind = Literal["base", "finetuned", "localizable", "grafted", "merged", "expert"]


@dataclass(frozen=True)
class WeightsRef:
    """Weights to evaluate, described by their difference from the base.

    Attributes:
        kind: the base; a whole finetuned model; the base with all localizable coordinates of a
            finetuned model; the base with one delta; a merged model; a specialist for one task.
        identity: digest of the finetuned weights, the delta, the patch, or the mask of a
            specialist, which names the patch that it selects from.
        uri: source of a finetuned model; the others are in the store.
    """

    kind: WeightsKind
    identity: str = ""
    uri: str = ""


@dataclass(frozen=True)
class Validated:
    """A finetuned model that can join its line.

    Attributes:
        outside_share: share of the squared change that lies outside of the localizable tensors.
        outside_tensors: those tensors with their shares, largest first.
        include: globs that would add them to the localizable tensors, as far as a line may.
        unused: the finetuned model's tensors that the base lacks.
        from_base: the base's tensors that the finetuned model lacks.
        notes: sentences about what was inferred, ignored or accepted.
    """

    outside_share: float
    outside_tensors: tuple[tuple[str, float], ...] = ()
    include: tuple[str, ...] = ()
    unused: TensorGroup | None = None
    from_base: TensorGroup | None = None
    notes: tuple[str, ...] = ()
