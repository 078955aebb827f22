"""Which localizer a line uses for a task, and all that its mask depends on.

A trained localizer needs labelled rows to calibrate on; for a task without them the
largest differences are taken, and the record says so.
"""

from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from merging.localize_dataless import NAME, VERSION, localize_dataless
from merging.mask import Mask
from merging.progress import Progress
from merging.task_vector import TaskVector
from registry.head import ModelRef
from registry.specs import TaskSpec
from tasks.models import Base
from tasks.refs import LineRef
from tasks.workspace import Workspace


class Localizer(Protocol):
    """A way to find masks, with its settings.

    Attributes:
        label: for people: name and version.
        fingerprint: what a repetition must share to find the same bytes; None if nothing.
    """

    label: str
    fingerprint: JsonValue

    def inputs(self) -> dict[str, Any]:
        """Name, version, settings and the digests of whatever data the mask depends on."""

    def find(self, vector: TaskVector, scratch: Path, progress: Progress) -> Mask:
        """The mask of a task vector; it may be backed by files in `scratch`."""


class Dataless:
    """The largest differences, over all localizable coordinates together."""

    label = f"{NAME}/{VERSION}"
    fingerprint: JsonValue = None

    def __init__(self, density: float) -> None:
        self.density = density

    def inputs(self) -> dict[str, Any]:
        """Nothing but the density."""
        return {"name": NAME, "version": VERSION, "density": self.density}

    def find(self, vector: TaskVector, scratch: Path, progress: Progress) -> Mask:
        """Exactly k coordinates; see `merging.localize_dataless`."""
        return localize_dataless(vector, self.density, scratch=scratch, progress=progress)


def localizer(
    line: LineRef, task: TaskSpec, base: Base, model: ModelRef, space: Workspace
) -> Localizer:
    """The localizer for one finetuned model of a line."""
    return Dataless(line.spec.localize.density)
