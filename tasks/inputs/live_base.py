"""The live base: the base of a line as a loaded model, in the type that the line computes in.

It is loaded once per process. A context sets other weights on it and copies the base's own back
afterwards, so nothing drifts. No second model is ever loaded: other weights are read from their
mapped file, tensor by tensor.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy

import torch

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.files.coordinates import select_tensors
from restitch.merging.files.edits import Edits
from restitch.merging.progress import Progress, ignore
from restitch.modeling.device import device
from restitch.modeling.families.family import (
    Family,
    loads_in_any_type,
    loads_without_weights,
)
from restitch.modeling.part_by_part import Pass, nothing
from restitch.modeling.spread import Room, plan, spread
from restitch.modeling.weights import apply_edits, resized, restore, set_weights
from restitch.registry.specs.line import Compute, LineSpec
from restitch.tasks.inputs.checkpoints import (
    Base,
    line_up,
    open_sparse,
    open_specialist,
    open_weights,
    unchanged,
)
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.free_memory import Part, check_memory, free_memory
from restitch.tasks.runtime.refs import WeightsRef
from restitch.tasks.runtime.workspace import Workspace


@contextmanager
def memory_explained(doing: str, expected: str, hint: str = "") -> Iterator[None]:
    """Explain what to do if the GPU's memory is not enough for a block.

    Args:
        doing: the work of the block, after "to".
        expected: what must fit into the memory.
        hint: more that helps, in addition to another device.

    Raises:
        Unavailable: the memory is not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Unavailable(
            f"the GPU's memory is not enough to {doing}",
            expected=expected,
            found=str(error).splitlines()[0],
            hint=f"use a worker with a larger GPU or RESTITCH_DEVICE=cpu{hint}",
        ) from error


def check_device(line: LineSpec) -> None:
    """Refuse a line that requires another device than this worker's.

    Raises:
        Unavailable: the line requires another device.
    """
    here = device().type
    if line.require_device not in (None, here):
        raise Unavailable(
            f"line {line.line} requires the device {line.require_device}",
            found=f"this worker has {here}",
            hint=f"run `restitch remerge {line.line}` on a worker with {line.require_device}",
        )


class LiveBase:
    """The base as a loaded model.

    Args:
        base: the base.
        on: the device of batches and heads.
        model: the model that its family loaded.

    Attributes:
        parameters: the live tensors, by the base's tensor names.
    """

    def __init__(self, base: Base, on: torch.device, model: torch.nn.Module) -> None:
        self.base = base
        self.device = on
        self.model = model
        self.parameters = base.family.parameters(model)

    def on(self, base: Base) -> "LiveBase":
        """The same loaded model for the base as another line opened it."""
        if base == self.base:
            return self
        other = copy(self)
        other.base = base
        return other

    @contextmanager
    def wearing(self, weights: WeightsRef, space: Workspace) -> Iterator[torch.nn.Module]:
        """The model with other weights; afterwards it has the base's again, bit for bit."""
        with ExitStack() as block:
            touched = self._put_on(weights, space, block)
            try:
                yield self.model
            finally:
                restore(self.parameters, self.base.weights, touched)

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[torch.nn.Module]:
        """The model with edits applied; afterwards it has the base's weights again, bit for bit."""
        edits = self.base.on_weights(edits)
        try:
            apply_edits(self.parameters, self.base.weights, edits)
            yield self.model
        finally:
            restore(self.parameters, self.base.weights, edits.names)

    def run(
        self,
        passes: Sequence[Pass],
        done: Callable[[], None] = nothing,
        progress: Progress = ignore,
    ) -> None:
        """Run passes through the model, one after the other.

        Args:
            passes: functions that run the model.
            done: called when all passes have gone through a part of the model.
            progress: called with the passes done and the total.
        """
        for number, one in enumerate(passes, 1):
            one()
            progress(number, len(passes))
        done()

    def _put_on(self, weights: WeightsRef, space: Workspace, block: ExitStack) -> list[str]:
        """Set weights; returns the tensors to restore, without those that `block` restores."""
        if weights.kind == "base":
            return []
        if weights.kind in ("grafted", "merged", "expert"):
            open_edits = open_specialist if weights.kind == "expert" else open_sparse
            edits = open_edits(weights.identity, space, self.base.checkpoint)
            edits = self.base.on_weights(edits)
            apply_edits(self.parameters, self.base.weights, edits)
            return list(edits.names)
        local, checkpoint = open_weights(weights.uri, weights.identity, space, self.base)
        if self.base.space is not None:
            assert isinstance(checkpoint, AdapterCheckpoint), "checked at registration"
            with unchanged(local):
                changed = ((name, checkpoint.tensor(name)) for name in checkpoint.touched)
                set_weights(self.parameters, changed)
            return list(checkpoint.touched)
        with unchanged(local):
            found, base = line_up(self.base, checkpoint), self.base.checkpoint
            finetuned = found.aligned(checkpoint)
            names = [n for n in finetuned.names if n in self.parameters]
            names = [n for n in names if not finetuned.is_known_as(base, n)]
            if weights.kind == "localizable":
                names = [n for n in names if n in frozenset(self.base.names)]
            elif found.more_rows:
                whole = checkpoint.renamed(found.mapping)
                larger = {n: whole.tensor(n) for n in names if n in found.more_rows}
                block.enter_context(resized(self.parameters, larger))
                names = [n for n in names if n not in larger]
            set_weights(self.parameters, ((n, finetuned.tensor(n)) for n in names))
        return names


_live: dict[tuple[str, str, str, str, str], LiveBase] = {}


def live_base(base: Base, step: str, holds: Sequence[Part] = ()) -> LiveBase:
    """The loaded base; the process holds one at a time.

    Args:
        base: the base.
        step: the work that needs it, after "to".
        holds: what the step holds in addition to the weights.

    Raises:
        BadInput: its family cannot load it in the line's type.
        Unavailable: the memory is not enough.
    """
    on = device()
    check_compute(base.family, base.compute)
    key = (base.family.name, base.ref.weights, base.ref.config, base.compute_type, str(on))
    loaded = key in _live
    if not loaded and _live:
        drop_live_base()
    parts = [*([] if loaded else [_weights(base)]), *holds]
    try:
        check_memory(step, parts, on, more_memory(base, on))
    except Unavailable:
        rooms = _rooms(base, on)
        if not rooms:
            raise
        drop_live_base()
        found = _spread_base(base, rooms, holds)
        if found is None:
            raise
        say(f"one GPU is not enough to {step}: the model is spread over {len(rooms)}")
        _live[key] = found
    if key not in _live:
        # Families from before there was a choice load float32.
        given = () if base.compute_type == "float32" else (torch.bfloat16,)
        _live[key] = LiveBase(base, on, base.family.load(base.folder, *given).to(on))
    return _live[key].on(base)


def empty_model(base: Base) -> torch.nn.Module:
    """The model of a base without its weights, in the type to compute in.

    Raises:
        BadInput: its family cannot make it.
    """
    if not loads_without_weights(base.family):
        raise BadInput(f"the family {base.family.name} loads whole models only")
    dtype = torch.float32 if base.compute_type == "float32" else torch.bfloat16
    return base.family.load(base.folder, dtype, empty=True)


def _spread_base(base: Base, rooms: Sequence[Room], holds: Sequence[Part]) -> LiveBase | None:
    """The base with its blocks on several devices; None if it does not fit there."""
    model, weights = empty_model(base), _weights(base).size
    places = plan(model, rooms, (weights + sum(part.size for part in holds)) / weights)
    if places is None:
        return None
    spread(model, base.family.parameters(model), base.weights.tensor, rooms, places)
    return LiveBase(base, rooms[0].device, model)


def _rooms(base: Base, on: torch.device) -> list[Room]:
    """The GPUs that a base may be spread over, with their memory; empty if it may not be.

    A tenth of each stays free for activations.
    """
    # One that is named, as in cuda:1, is meant alone.
    if str(on) != "cuda" or not loads_without_weights(base.family):
        return []
    devices = [torch.device("cuda", place) for place in range(torch.cuda.device_count())]
    found = ((device, free_memory(device)) for device in devices)
    rooms = [Room(device, free.size * 9 // 10) for device, free in found if free is not None]
    return rooms if len(rooms) > 1 else []


def drop_live_base() -> None:
    """Free the memory of the loaded base; the next step that needs it loads it again."""
    _live.clear()
    gc.collect()  # models have cycles


def check_compute(family: Family, compute: Compute) -> None:
    """Refuse a type that a family cannot load.

    Raises:
        BadInput: the family has no choice of types.
    """
    if compute == "bfloat16" and not loads_in_any_type(family):
        raise BadInput(
            f"the family {family.name} computes in float32 only",
            expected="compute: auto or float32",
            found=f"compute: {compute}",
            hint="correct the line file, or give the family's `load` an argument `dtype`",
        )


def _weights(base: Base) -> Part:
    """The weights that a live model has for certain: not all tensors of a file belong to it."""
    names = select_tensors(base.weights.floating, base.family.localizable)
    numbers = sum(base.weights.info(name).numel for name in names)
    size = numbers * (4 if base.compute_type == "float32" else 2)
    return Part(f"the weights in {base.compute_type}", size)


def more_memory(base: Base, on: torch.device) -> str:
    """How a step can have more memory, for messages."""
    larger = "a larger GPU" if on.type == "cuda" else "more memory"
    worker = f"use a worker with {larger}"
    if base.compute_type == "float32" and loads_in_any_type(base.family):
        return f"set `compute: bfloat16` in the line file, or {worker}"
    return worker
