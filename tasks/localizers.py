"""Which localizer a line uses for a task, and all that its mask depends on.

A localizer ranks all coordinates; how many of them are kept is decided elsewhere
(`restitch.tasks.density`), except by the presets that end with a density of their own. What it needs of a
task differs: labelled rows (`trained`), inputs alone (`fisher`, `distilled`), or nothing. Where a
task has less, the next best is taken, which is said and recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import JsonValue
from torch import Tensor

from restitch.merging.files.mask import Mask
from restitch.merging.localize import dataless, distilled, fisher, trained
from restitch.merging.localize import random as lot
from restitch.merging.progress import Progress
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import Scores
from restitch.modeling.data.rows import Rows
from restitch.modeling.families.family import Batch, Family
from restitch.modeling.gradients import precision
from restitch.modeling.heads import Head
from restitch.registry.ledger.line_state import ModelRef
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base, LiveBase, device, live_base
from restitch.tasks.inputs.task_data import (
    reading_inputs,
    task_head,
    train_has_labels,
    verified_data,
)
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace

Found = TypeVar("Found")
Calibrated = Literal["labels", "inputs", "nothing"]


@dataclass(frozen=True)
class Ranking:
    """What a localizer found.

    Attributes:
        scores: of all coordinates; None where there is a mask.
        mask: of a localizer that ends with a density of its own.
        factors: what coordinates are worth to the model, for the sparse delta.
        calibrated: what of the task's train rows was used.
        rows: how many.
    """

    scores: Scores | None
    mask: Mask | None = None
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    calibrated: Calibrated = "nothing"
    rows: int = 0

    def facts(self) -> dict[str, Any]:
        """What the record keeps of it."""
        return {"calibrated_with": self.calibrated, "calibration_rows": self.rows}


class Localizer(Protocol):
    """A way to rank coordinates, with its settings."""

    @property
    def label(self) -> str:
        """For people: name and version."""

    @property
    def fingerprint(self) -> JsonValue:
        """What a repetition must share to find the same bytes; None if nothing."""

    def inputs(self) -> dict[str, Any]:
        """Name, version, settings and the digests of whatever data the ranking depends on."""

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Rank the coordinates of a task vector; `scratch` is for temporary files."""


class Dataless:
    """The largest differences, over all localizable coordinates together."""

    label = f"{dataless.NAME}/{dataless.VERSION}"
    fingerprint: JsonValue = None

    def __init__(self, choice: LocalizeSpec) -> None:
        self.choice = choice

    def inputs(self) -> dict[str, Any]:
        """Nothing but the density, where it is given."""
        known = {} if self.choice.density == "auto" else {"density": self.choice.density}
        return {"name": dataless.NAME, "version": dataless.VERSION, **known}

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """The differences are the scores."""
        return Ranking(vector)


class Random:
    """Coordinates by lot, which no line uses: what a localizer must beat."""

    label = f"{lot.NAME}/{lot.VERSION}"
    fingerprint: JsonValue = None

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def inputs(self) -> dict[str, Any]:
        """The seed."""
        return {"name": lot.NAME, "version": lot.VERSION, "seed": self.seed}

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Draw the scores."""
        return Ranking(lot.random_scores(vector, self.seed))


@dataclass(frozen=True)
class Calibration:
    """The rows of a task that a localizer looks at, and the model that it looks with."""

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace

    def inputs(self) -> dict[str, Any]:
        """The rows by content and choice, and the head that reads them."""
        data = self.task.data
        assert data is not None
        assert data.content is not None
        splits: Any = data.content["splits"]
        return {
            "shots": self.choice.shots,
            "train": splits["train"],
            **reading_inputs(self.task, self.base, self.model),
        }

    def opened(self) -> "OpenCalibration":
        """The rows, the head and the live base."""
        family, live = self.base.family, live_base(self.base)
        rows = verified_data(self.task, family).calibration(self.choice.shots, self.choice.seed)
        head = task_head(self.task, self.base, live, self.model, self.space)
        preprocess = family.preprocessor(self.base.folder, head.spec.max_length)

        def batch(indices: Sequence[int]) -> Batch:
            examples = preprocess([rows[index] for index in indices])
            return {name: tensor.to(live.device) for name, tensor in examples.items()}

        return OpenCalibration(live, rows, head, batch)


@dataclass(frozen=True)
class OpenCalibration:
    """What localizers call: rows in batches, and the loaded base with the task's head."""

    live: LiveBase
    rows: Rows
    head: Head
    batch: Callable[[Sequence[int]], Batch]

    def logits(self, batch: Batch) -> Tensor:
        """The scores of the classes at the model's current weights."""
        with precision(self.live.device):
            return self.live.base.family.logits(self.live.model, batch, self.head)

    def loss(self, batch: Batch) -> Tensor:
        """The loss that the task is trained with."""
        with precision(self.live.device):
            return self.live.base.family.loss(self.live.model, batch, self.head)

    def by_inputs(
        self, find: Callable[..., Found], vector: TaskVector, settings: Any, progress: Progress
    ) -> Found:
        """What a function that ranks by inputs alone makes of a task vector."""
        rows = len(self.rows)
        on = self.live.parameters, vector, rows, self.batch, self.logits
        return find(*on, settings, progress=progress)


class _Calibrated:
    """What localizers that look at rows have in common.

    Attributes:
        name: of the localizer.
        version: raised whenever the same input gives another ranking.
        settings: all that it was told.
    """

    name: str
    version: int
    settings: trained.TrainedSettings | fisher.FisherSettings | distilled.DistilledSettings

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name}/{self.version}"

    @property
    def fingerprint(self) -> JsonValue:
        """Gradients are the same bytes only with the same torch, device and threads."""
        return fingerprint(device())

    def inputs(self) -> dict[str, Any]:
        """Settings, the rows by content and choice, and the head that reads them."""
        return {
            "name": self.name,
            "version": self.version,
            "settings": self.settings.to_json(),
            **self.calibration.inputs(),
        }


class Trained(_Calibrated):
    """A mask that is learned with the task's loss on labelled rows of its train split."""

    name, version = trained.NAME, trained.VERSION
    settings: trained.TrainedSettings

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration)
        choice = calibration.choice
        self.settings = trained.TrainedSettings.of(
            choice.preset,
            modality=calibration.base.family.modality,
            density=_highest(choice) / (1 if choice.density != "auto" else 2),
            epochs=choice.epochs,
            seed=choice.seed,
        )

    @property
    def label(self) -> str:
        """Name, version and preset."""
        return f"{super().label} {self.calibration.choice.preset}"

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Learn the scores, or the mask; see `restitch.merging.localize.trained`."""
        on = self.calibration.opened()
        found = trained.localize_trained(
            on.live.parameters,
            vector,
            len(on.rows),
            on.batch,
            on.loss,
            self.settings,
            scratch=scratch,
            progress=progress,
        )
        mask = found.mask if found.scores is None else None
        return Ranking(found.scores, mask, calibrated="labels", rows=len(on.rows))


class Fisher(_Calibrated):
    """Differences weighed with how much the model's predictions depend on each coordinate."""

    name, version = fisher.NAME, fisher.VERSION
    settings: fisher.FisherSettings

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration)
        self.settings = fisher.FisherSettings(seed=calibration.choice.seed)

    def inputs(self) -> dict[str, Any]:
        """The same, and the density, of which the settings know nothing."""
        return {**super().inputs(), "density": self.calibration.choice.density}

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Measure the sensitivities; see `restitch.merging.localize.fisher`."""
        on = self.calibration.opened()
        scores, worth = on.by_inputs(fisher.localize_fisher, vector, self.settings, progress)
        rows = min(len(on.rows), self.settings.most_rows)
        return Ranking(scores, None, worth.to_factors(vector.names), "inputs", rows)


class Distilled(_Calibrated):
    """A ranking that is refined until the graft predicts what the finetuned model does."""

    name, version = distilled.NAME, distilled.VERSION
    settings: distilled.DistilledSettings

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration)
        choice = calibration.choice
        highest = _highest(choice)
        self.settings = distilled.DistilledSettings(
            lowest=highest if choice.density != "auto" else highest / _RANGE,
            highest=highest,
            epochs=choice.epochs,
            seed=choice.seed,
            fisher=fisher.FisherSettings(seed=choice.seed),
        )

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Refine the ranking; see `restitch.merging.localize.distilled`."""
        on = self.calibration.opened()
        found = on.by_inputs(distilled.localize_distilled, vector, self.settings, progress)
        factors = found.sensitivities.to_factors(vector.names)
        return Ranking(found.scores, None, factors, "inputs", len(on.rows))


# Where the density is not known, a ranking is refined at densities from this part of the highest.
_RANGE = 8


def _highest(choice: LocalizeSpec) -> float:
    if choice.density == "auto":
        assert choice.max_density is not None
        return choice.max_density
    return choice.density


def localizer(
    line: LineRef, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> Localizer:
    """The localizer for one finetuned model of a line."""
    choice = line.spec.localize
    if choice.mode == "dataless":
        return Dataless(choice)
    if task.data is None or task.data.train is None:
        warn(f"{task.task} has no train rows to calibrate on: its largest differences are kept")
        return Dataless(choice)
    calibration = Calibration(choice, task, base, model, space)
    if choice.mode == "fisher":
        return Fisher(calibration)
    if choice.mode == "distilled":
        return Distilled(calibration)
    if not train_has_labels(task, base.family):
        warn(f"{task.task} has train rows without labels: its mask is distilled from the model")
        return Distilled(calibration)
    return Trained(calibration)


LOCALIZERS = (dataless.NAME, fisher.NAME, distilled.NAME, trained.NAME, lot.NAME)


def lacks(name: str, task: TaskSpec, family: Family) -> str | None:
    """What a task lacks that a localizer needs of it; None where it has all."""
    if name in (dataless.NAME, lot.NAME):
        return None
    if task.data is None or task.data.train is None:
        return "train rows"
    if name == trained.NAME and not train_has_labels(task, family):
        return "labels of train rows"
    return None


def named_localizer(
    name: str, line: LineRef, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> Localizer:
    """A localizer by its name, which ranks as it would for a density that is not known yet.

    Rows and seed are the line's, and all settings where it is the line's own.

    Args:
        name: one of `LOCALIZERS`.
        line: the line.
        task: one that lacks nothing for it; see `lacks`.
        base: of the line, opened.
        model: the finetuned model.
        space: where heads are kept.
    """
    own = line.spec.localize
    if name == lot.NAME:
        return Random(own.seed)
    settings = {"epochs": own.epochs} if name == own.mode else {}
    given = {"mode": name, "density": "auto", "shots": own.shots, "seed": own.seed, **settings}
    choice = LocalizeSpec.model_validate(given)
    asked = LineRef(line.spec.model_copy(update={"localize": choice}), line.base)
    return localizer(asked, task, base, model, space)
