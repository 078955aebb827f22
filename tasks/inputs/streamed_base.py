"""The base of a line without its weights, for passes that go through it part by part."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from restitch.merging.errors import Unavailable
from restitch.merging.files.edits import Edits, edited
from restitch.merging.progress import Progress, ignore
from restitch.modeling.device import device
from restitch.modeling.gradients import precision
from restitch.modeling.part_by_part import PartByPart, Pass, nothing
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.live_base import (
    LiveBase,
    check_compute,
    drop_live_base,
    empty_model,
    more_memory,
)
from restitch.tasks.runtime.free_memory import Part, check_memory, release_freed


class StreamedBase(LiveBase):
    """The base as a model whose weights are read part by part during `run`.

    It has other weights only within `edited`.

    Args:
        base: the base.
        on: the device to compute on.
        scratch: a folder for the tensors of suspended passes.

    Raises:
        BadInput: its model cannot be loaded in parts; the message says why.
    """

    def __init__(self, base: Base, on: torch.device, scratch: Path) -> None:
        model = empty_model(base)
        self._parts = PartByPart(model, on)
        super().__init__(base, on, model)
        self.largest = self._parts.largest
        self._scratch = scratch
        self._edits: Edits | None = None

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[nn.Module]:
        """The model with edits applied."""
        self._edits = self.base.on_weights(edits)
        try:
            yield self.model
        finally:
            self._edits = None

    def run(
        self,
        passes: Sequence[Pass],
        done: Callable[[], None] = nothing,
        progress: Progress = ignore,
    ) -> None:
        """Run passes through the model, part by part."""

        def part_done() -> None:
            done()
            # What the passes keep lies between the freed weights, which would pile up.
            release_freed()

        # Passes enter it as well; each would end it for those that are suspended.
        with precision(self.device):
            self._parts.run(
                passes,
                self.parameters,
                self._weights,
                self._scratch,
                done=part_done,
                progress=progress,
            )

    def _weights(self, name: str) -> Tensor:
        if self._edits is None:
            return self.base.weights.tensor(name)
        return edited(self.base.weights, self._edits, name)


def streamed_base(base: Base, step: str, scratch: Path) -> StreamedBase:
    """The base without its weights.

    Args:
        base: the base.
        step: the work that needs it, after "to".
        scratch: a folder for temporary files.

    Raises:
        BadInput: its model cannot be loaded in parts; the message says why.
        Unavailable: the memory is not enough for the largest part.
    """
    check_compute(base.family, base.compute)
    on = device()
    streamed = StreamedBase(base, on, scratch)
    parts = [Part("the largest part of the model", streamed.largest)]
    hint = more_memory(base, on)
    try:
        check_memory(step, parts, on, hint)
    except Unavailable:
        drop_live_base()
        check_memory(step, parts, on, hint)
    return streamed
