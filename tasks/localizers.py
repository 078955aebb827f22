"""The localizers that a line can use, and all that their rankings depend on.

A localizer ranks all coordinates; `density` decides how many of them a mask keeps, except with
presets that end with a mask. `trained` needs labelled rows of the task, `fisher` and `distilled`
need inputs only, `dataless` needs no rows. A task with less data gets the next best localizer, with
a warning and a note in the record.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import JsonValue
from torch import Tensor

from restitch.merging.files.mask import Mask
from restitch.merging.localize import dataless, distilled, fisher, trained
from restitch.merging.localize import random as random_baseline
from restitch.merging.progress import Progress
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import Scores
from restitch.modeling.data.rows import Rows
from restitch.modeling.device import device
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.gradients import precision
from restitch.modeling.heads import Head
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.task_data import train_has_labels, verified_data
from restitch.tasks.inputs.task_head import reading_inputs, task_head
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.free_memory import Part
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace

# exp() of it is 0, and the difference of two is a number.
_LOWEST = -1e30

T = TypeVar("T")
CalibratedWith = Literal["labels", "inputs", "nothing"]


@dataclass(frozen=True)
class Ranking:
    """The result of a localizer.

    Attributes:
        scores: of all coordinates; None if there is a mask.
        mask: from a localizer that chooses the density itself.
        factors: sensitivities of coordinates for the sparse delta, if measured.
        calibrated: the part of the task's train rows that was used.
        rows: the number of rows that were used.
    """

    scores: Scores | None
    mask: Mask | None = None
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    calibrated: CalibratedWith = "nothing"
    rows: int = 0

    def facts(self) -> dict[str, Any]:
        """The facts for the record."""
        return {"calibrated_with": self.calibrated, "calibration_rows": self.rows}


class Localizer(ABC):
    """A localizer with its settings.

    Attributes:
        version: raised when the same inputs give another ranking.
    """

    name: str
    version: int

    @property
    def label(self) -> str:
        """Its name and version, for display."""
        return f"{self.name}/{self.version}"

    @property
    def fingerprint(self) -> JsonValue:
        """The environment that another run needs to get the same bytes; None for any."""
        return None

    def inputs(self) -> dict[str, Any]:
        """Name, version, settings, and digests of all data that the ranking depends on."""
        return {"name": self.name, "version": self.version}

    @abstractmethod
    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Rank the coordinates of a task vector, with temporary files in `scratch`."""


class Dataless(Localizer):
    """Ranks coordinates by the magnitude of the task vector."""

    name, version = dataless.NAME, dataless.VERSION

    def __init__(self, choice: LocalizeSpec) -> None:
        self.choice = choice

    def inputs(self) -> dict[str, Any]:
        """Also the density, unless it is chosen later."""
        given = {} if self.choice.density == "auto" else {"density": self.choice.density}
        return super().inputs() | given

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Use the task vector itself as scores."""
        return Ranking(vector)


class Random(Localizer):
    """Ranks coordinates at random: a baseline for studies that no line uses."""

    name, version = random_baseline.NAME, random_baseline.VERSION

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def inputs(self) -> dict[str, Any]:
        """Also the seed."""
        return super().inputs() | {"seed": self.seed}

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Draw random scores."""
        return Ranking(random_baseline.random_scores(vector, self.seed))


def split_digests(task: TaskSpec) -> Any:
    """The digests of a registered task's rows, by split."""
    assert task.data is not None
    assert task.data.content is not None
    return task.data.content["splits"]


@dataclass(frozen=True)
class Calibration:
    """The rows of a task that calibrate a localizer, and the model that evaluates them."""

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace

    def inputs(self) -> dict[str, Any]:
        """The rows by content and selection, and the head."""
        return {
            "shots": self.choice.shots,
            "train": split_digests(self.task)["train"],
            **reading_inputs(self.task, self.base, self.model),
        }

    def opened(self, step: str, holds: Sequence[Part]) -> "OpenCalibration":
        """Load the rows, the head and the live base; see `live_base` for the arguments."""
        rows = self.rows()
        return self.opened_on(live_base(self.base, step, holds), rows)

    def rows(self) -> Rows:
        """Load the rows.

        Raises:
            BadInput: they are missing, or changed since the task was registered.
        """
        data = verified_data(self.task, self.base.family)
        return data.calibration(self.choice.shots, self.choice.seed)

    def opened_on(self, live: LiveBase, rows: Rows) -> "OpenCalibration":
        """Load the head for a live base and the rows."""
        return OpenCalibration.of(live, rows, self.task, self.model, self.space)


@dataclass(frozen=True)
class OpenCalibration:
    """A loaded calibration: rows in batches, and the live base with the task's head."""

    live: LiveBase
    rows: Rows
    head: Head
    preprocess: Preprocess

    @classmethod
    def of(
        cls, live: LiveBase, rows: Rows, task: TaskSpec, model: ModelRef, space: Workspace
    ) -> "OpenCalibration":
        """Load the head while the live base has its own weights."""
        base, heads = live.base, []
        live.run([lambda: heads.append(task_head(task, base, live, model, space))])
        (head,) = heads
        return cls(live, rows, head, base.family.preprocessor(base.folder, head.spec.most_read))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of some rows, on the device of the live base."""
        examples = self.preprocess([self.rows[index] for index in indices])
        return {name: tensor.to(self.live.device) for name, tensor in examples.items()}

    def logits(self, batch: Batch) -> Tensor:
        """The predictions of the model with its current weights; see `Family.predictions`.

        A choice that a row lacks has the lowest number in place of minus infinity, whose
        differences are not numbers.
        """
        with precision(self.live.device):
            scores = self.live.base.family.predictions(self.live.model, batch, self.head)
        return scores.masked_fill(scores.isneginf(), _LOWEST)

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of the task."""
        with precision(self.live.device):
            return self.live.base.family.loss(self.live.model, batch, self.head)

    def by_inputs(
        self, rank: Callable[..., T], vector: TaskVector, settings: Any, progress: Progress
    ) -> T:
        """Call a function that ranks coordinates by inputs without labels."""
        rows = len(self.rows)
        inputs = self.live.parameters, vector, rows, self.batch, self.logits
        return rank(*inputs, settings, progress=progress)


class _Calibrated(Localizer):
    """The common part of localizers that use rows."""

    settings: trained.TrainedSettings | fisher.FisherSettings | distilled.DistilledSettings

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    @property
    def fingerprint(self) -> JsonValue:
        """Gradients have equal bytes only with the same torch, device and threads."""
        return fingerprint(device())

    def inputs(self) -> dict[str, Any]:
        """Also the settings, the rows by content and selection, and the head."""
        settings = {"settings": self.settings.to_json()}
        return super().inputs() | settings | self.calibration.inputs()

    def _opened(self, vector: TaskVector, *holds: Part) -> OpenCalibration:
        """Load the calibration; `holds` is what the ranking holds on any device."""
        step = f"localize {self.calibration.task.task} with mode {self.name}"
        copied = (Part("base and finetuned weights", _bytes(vector)),)
        return self.calibration.opened(step, holds if device().type == "cpu" else copied + holds)


def _bytes(vector: TaskVector) -> int:
    """The bytes of the localizable tensors of base and finetuned model."""
    files = (vector.base, vector.finetuned)
    return sum(file.info(name).nbytes for file in files for name in vector.names)


def _scores(vector: TaskVector) -> Part:
    return Part("the scores", 4 * vector.coordinates)


class Trained(_Calibrated):
    """Learns a mask with the task's loss on labelled train rows."""

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
        """Learn the scores or the mask; see `localize.trained`."""
        opened = self._opened(vector, _scores(vector), *self._gradients(vector))
        learned = trained.localize_trained(
            opened.live.parameters,
            vector,
            len(opened.rows),
            opened.batch,
            opened.loss,
            self.settings,
            scratch=scratch,
            progress=progress,
        )
        mask = learned.mask if learned.scores is None else None
        return Ranking(learned.scores, mask, calibrated="labels", rows=len(opened.rows))

    def _gradients(self, vector: TaskVector) -> list[Part]:
        """The gradients of all weights, if the preset sums those of several batches."""
        if self.settings.preset != "official":
            return []
        size = 4 if self.calibration.base.compute_type == "float32" else 2
        return [Part("the gradients", size * vector.coordinates)]


class Fisher(_Calibrated):
    """Ranks differences weighted by the sensitivity of the predictions to each coordinate."""

    name, version = fisher.NAME, fisher.VERSION
    settings: fisher.FisherSettings

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration)
        self.settings = fisher.FisherSettings(seed=calibration.choice.seed)

    def inputs(self) -> dict[str, Any]:
        """Also the density, which is no setting of this localizer."""
        return {**super().inputs(), "density": self.calibration.choice.density}

    def rank(self, vector: TaskVector, scratch: Path, progress: Progress) -> Ranking:
        """Measure the sensitivities; see `localize.fisher`."""
        opened = self._opened(vector)
        scores, sensitivities = opened.by_inputs(
            fisher.localize_fisher, vector, self.settings, progress
        )
        rows = min(len(opened.rows), self.settings.most_rows)
        return Ranking(scores, None, sensitivities.to_factors(vector.names), "inputs", rows)


class Distilled(_Calibrated):
    """Refines a ranking until the graft predicts like the finetuned model."""

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
        """Refine the ranking; see `localize.distilled`."""
        opened = self._opened(vector, _scores(vector))
        refined = opened.by_inputs(distilled.localize_distilled, vector, self.settings, progress)
        factors = refined.sensitivities.to_factors(vector.names)
        return Ranking(refined.scores, None, factors, "inputs", len(opened.rows))


# Without a given density, `distilled` refines at densities from the highest down to it over this.
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
        warn(f"task {task.task} has no train rows for mode {choice.mode}: using mode dataless")
        return Dataless(choice)
    calibration = Calibration(choice, task, base, model, space)
    if choice.mode == "fisher":
        return Fisher(calibration)
    if choice.mode == "distilled":
        return Distilled(calibration)
    if not train_has_labels(task, base.family):
        warn(f"the train rows of task {task.task} have no labels: using mode distilled")
        return Distilled(calibration)
    return Trained(calibration)


LOCALIZERS = (dataless.NAME, fisher.NAME, distilled.NAME, trained.NAME, random_baseline.NAME)


def lacks(name: str, task: TaskSpec, family: Family) -> str | None:
    """The data that a localizer needs and a task lacks; None if nothing is missing."""
    if name in (dataless.NAME, random_baseline.NAME):
        return None
    if task.data is None or task.data.train is None:
        return "train rows"
    if name == trained.NAME and not train_has_labels(task, family):
        return "labels of train rows"
    return None


def named_localizer(
    name: str, line: LineRef, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> Localizer:
    """A localizer by its name, with a density that is chosen later.

    It uses the line's rows and seed, and the line's settings if it is the line's own localizer. The
    task has the data that it needs; see `lacks`.
    """
    own = line.spec.localize
    if name == random_baseline.NAME:
        return Random(own.seed)
    settings = {"epochs": own.epochs} if name == own.mode else {}
    given = {"mode": name, "density": "auto", "shots": own.shots, "seed": own.seed, **settings}
    choice = LocalizeSpec.model_validate(given)
    changed = LineRef(line.spec.model_copy(update={"localize": choice}), line.base)
    return localizer(changed, task, base, model, space)
