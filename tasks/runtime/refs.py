"""What steps hand to each other: small frozen references, never tensors."""

from dataclasses import dataclass, field
from typing import Any, Literal

from restitch.registry.ledger.line_state import ModelRef
from restitch.registry.ledger.line_state import ResultRef as ResultRef
from restitch.registry.specs.line import LineSpec


@dataclass(frozen=True)
class LineRef:
    """A line as one flow run sees it from beginning to end: its specification and its base."""

    spec: LineSpec
    base: ModelRef


@dataclass(frozen=True)
class DeltaRef:
    """A sparse delta in the store.

    Attributes:
        blob: digest of the delta file.
        mask: digest of the mask alone.
        kept: how many coordinates it keeps.
        coordinates: how many there are to choose from.
        size: bytes of the file.
        localizer: how the mask was found, for instance "dataless/1".
        seconds: how long finding it took.
        made_by: which process found it: worker, host, process, pool, device.
        found: what it was calibrated with, and how its density was chosen.
    """

    blob: str
    mask: str
    kept: int
    coordinates: int
    size: int
    localizer: str
    seconds: float | None = None
    made_by: Any = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """The fraction of localizable coordinates that is kept."""
        return self.kept / self.coordinates if self.coordinates else 0.0


@dataclass(frozen=True)
class PatchRef:
    """A merged model in the store: where it differs from its base.

    Attributes:
        seconds: how long making it took, where this run has made it.
    """

    blob: str
    kept: int
    size: int
    recipe: str
    seconds: float | None = None


@dataclass(frozen=True)
class StatisticRef:
    """What a method needs of a member beside its delta, in the store.

    Attributes:
        blob: digest of its file.
        size: bytes of the file.
        seconds: how long finding it took, where this run has found it.
        took: how long it took whoever found it.
    """

    blob: str
    size: int
    seconds: float | None = None
    took: float | None = None


WeightsKind = Literal["base", "finetuned", "localizable", "grafted", "merged", "expert"]


@dataclass(frozen=True)
class WeightsRef:
    """Which weights to evaluate, as what lies on top of the base.

    Attributes:
        kind: the base itself; a finetuned model whole; the base with all of its localizable
            coordinates finetuned; the base with one delta; a merged model; the specialist of a
            task.
        identity: digest of what lies on top: of the finetuned weights, the delta, the patch, or
            the mask of a specialist, which names the patch that it selects from.
        uri: where a finetuned model is read; the others are in the store.
    """

    kind: WeightsKind
    identity: str = ""
    uri: str = ""


@dataclass(frozen=True)
class Validated:
    """A finetuned model that can join its line.

    Attributes:
        outside_share: squared norm of what finetuning changed outside of the localizable
            tensors, over that of everything it changed.
        outside_tensors: those tensors with their shares, largest first.
        ignored: tensors that the base does not have, or that the finetuned model lacks.
    """

    outside_share: float
    outside_tensors: tuple[tuple[str, float], ...] = field(default=())
    ignored: tuple[str, ...] = field(default=())
