"""Which localizer a line uses for a task, and all that its mask depends on.

A trained localizer needs labelled rows to calibrate on; for a task without them the
largest differences are taken, and the record says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from merging import localize_dataless as dataless
from merging import localize_trained as trained
from merging.digests import digest_json
from merging.mask import Mask
from merging.progress import Progress
from merging.task_vector import TaskVector
from modeling.family import Batch
from registry.head import ModelRef
from registry.specs import LocalizeSpec, TaskSpec
from tasks.inputs import head_inputs, task_head, verified_data
from tasks.models import Base, device, live_base
from tasks.refs import LineRef
from tasks.reporting import warn
from tasks.workspace import Workspace


class Localizer(Protocol):
    """A way to find masks, with its settings."""

    @property
    def label(self) -> str:
        """For people: name and version."""

    @property
    def fingerprint(self) -> JsonValue:
        """What a repetition must share to find the same bytes; None if nothing."""

    def inputs(self) -> dict[str, Any]:
        """Name, version, settings and the digests of whatever data the mask depends on."""

    def find(self, vector: TaskVector, scratch: Path, progress: Progress) -> Mask:
        """The mask of a task vector; it may be backed by files in `scratch`."""


class Dataless:
    """The largest differences, over all localizable coordinates together."""

    label = f"{dataless.NAME}/{dataless.VERSION}"
    fingerprint: JsonValue = None

    def __init__(self, density: float) -> None:
        self.density = density

    def inputs(self) -> dict[str, Any]:
        """Nothing but the density."""
        return {"name": dataless.NAME, "version": dataless.VERSION, "density": self.density}

    def find(self, vector: TaskVector, scratch: Path, progress: Progress) -> Mask:
        """Exactly k coordinates; see `merging.localize_dataless`."""
        return dataless.localize_dataless(vector, self.density, scratch=scratch, progress=progress)


class Trained:
    """A mask that is learned with the task's loss on calibration rows of its train split."""

    def __init__(
        self, choice: LocalizeSpec, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
    ) -> None:
        self.choice = choice
        self.task = task
        self.base = base
        self.model = model
        self.space = space
        self.settings = trained.TrainedSettings.of(
            choice.preset,
            modality=base.family.modality,
            density=choice.density,
            epochs=choice.epochs,
            seed=choice.seed,
        )

    @property
    def label(self) -> str:
        """Name, version and preset."""
        return f"{trained.NAME}/{trained.VERSION} {self.choice.preset}"

    @property
    def fingerprint(self) -> JsonValue:
        """Gradients are the same bytes only with the same torch, device and threads."""
        return trained.fingerprint(device())

    def inputs(self) -> dict[str, Any]:
        """Settings, the rows by content and choice, and the head that gives the loss."""
        data = self.task.data
        assert data is not None
        assert data.content is not None
        splits: Any = data.content["splits"]
        return {
            "name": trained.NAME,
            "version": trained.VERSION,
            "settings": self.settings.to_json(),
            "shots": self.choice.shots,
            "train": splits["train"],
            "columns": [data.content["input"], data.content["label"]],
            # Without validation rows of its own, a part of train is set apart.
            "set_apart": data.validation is None,
            "head": digest_json(head_inputs(self.task, self.base, self.model)),
        }

    def find(self, vector: TaskVector, scratch: Path, progress: Progress) -> Mask:
        """Learn the mask; see `merging.localize_trained`."""
        family, live = self.base.family, live_base(self.base)
        rows = verified_data(self.task, family).calibration(self.choice.shots, self.choice.seed)
        head = task_head(self.task, self.base, live, self.model, self.space)
        preprocess = family.preprocessor(self.base.folder, head.spec.max_length)

        def batch(indices: Sequence[int]) -> Batch:
            examples = preprocess([rows[index] for index in indices])
            return {name: tensor.to(live.device) for name, tensor in examples.items()}

        return trained.localize_trained(
            live.parameters,
            vector,
            len(rows),
            batch,
            lambda some: family.loss(live.model, some, head),
            self.settings,
            scratch=scratch,
            progress=progress,
        ).mask


def localizer(
    line: LineRef, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> Localizer:
    """The localizer for one finetuned model of a line."""
    choice = line.spec.localize
    if choice.mode == "dataless":
        return Dataless(choice.density)
    if task.data is None or task.data.train is None:
        warn(f"{task.task} has no train rows to calibrate on: its largest differences are kept")
        return Dataless(choice.density)
    return Trained(choice, task, base, model, space)
