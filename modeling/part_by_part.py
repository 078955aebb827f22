"""Run a model whose weights do not fit in memory: only one of its parts has them at a time.

The parts are the repeated layers of a model, and its large embeddings and linear layers outside of
them. Passes of many rows stop before each part. When all have arrived at it, its weights are read,
each pass goes through it, and the weights are dropped. A pass is suspended as it is, with all that
it computes between two parts, by a greenlet. So a model with an encoder and a decoder, or a pass
that continues from a cache, needs no code of its own, and a layer computes the same bits as in a
model that is loaded as a whole.

The tensors that suspended passes hold for their next part are moved to files when there are many.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.progress import Progress, ignore
from restitch.modeling.gradients import repeated_layers
from restitch.modeling.stored_weights import StoredWeights

# Bytes of a layer outside of the blocks that is a part of its own: smaller ones stay in memory.
_LARGE = 16_000_000
# Bytes that suspended passes keep in memory.
_KEPT = 256_000_000
# Smaller tensors stay in memory.
_SMALL = 4096

Pass = Callable[[], object]


def nothing() -> None:
    """The default of `done`."""


class PartByPart:
    """A model without weights, which passes go through part by part.

    Args:
        model: a model that a family loaded with `empty`; it is changed in place.
        device: the device to compute on.

    Attributes:
        parts: in the order of the model.
        largest: the bytes of the weights that are in memory at once.

    Raises:
        BadInput: the model has no repeated layers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        blocks = repeated_layers(model)
        if not blocks:
            raise BadInput("the model has no repeated layers that could be loaded one by one")
        _place(model, device)
        self._model = model
        inside = {id(each) for block in blocks for each in block.modules()}
        large = [m for m in model.modules() if id(m) not in inside and _is_large(m)]
        chosen = {id(each) for each in (*blocks, *large)}
        self.parts = [module for module in model.modules() if id(module) in chosen]
        inside |= {id(module) for module in large}
        self._others = [module for module in model.modules() if id(module) not in inside]
        self._device = device
        own = sum(map(_weights, self._others))
        self.largest = own + max(sum(map(_weights, part.modules())) for part in self.parts)

    def run(
        self,
        passes: Sequence[Pass],
        parameters: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        scratch: Path,
        *,
        done: Callable[[], None] = nothing,
        progress: Progress = ignore,
    ) -> None:
        """Run passes through the model; each may go through it several times.

        Args:
            passes: functions that run the model; they begin in their order, and go through each
                part in it. Where running a model changes it, passes disturb each other.
            parameters: the tensors of the model by their names, which stand for their weights.
            read: reads the weights of a name.
            scratch: a folder for the tensors of suspended passes.
            done: called when all passes have gone through a part.
            progress: called with the steps done and all that are known of, after each part.
        """
        weights = _Weights(StoredWeights(self._model, parameters, read), self._device)
        with weights.within(self._others), _Suspended(self.parts, scratch) as suspended:
            for one in passes:
                suspended.start(one)
            finished, place = 0, 0
            while suspended.waiting:
                place = suspended.next(place)
                with weights.within(self.parts[place].modules()):
                    finished += suspended.go_through(place)
                done()
                progress(finished, finished + suspended.left)
                place += 1


class _Weights:
    """The weights of a model that lie in a file."""

    def __init__(self, stored: StoredWeights, device: torch.device) -> None:
        self._stored = stored
        self._device = device

    @contextmanager
    def within(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let modules have their weights within a block."""
        before = [
            (module, name, live)
            for module in modules
            for name, live in module._parameters.items()
            if live is not None and live in self._stored
        ]
        read: dict[int, nn.Parameter] = {}
        for module, name, live in before:
            if id(live) not in read:
                value = self._stored.read(live, self._device)
                read[id(live)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = read[id(live)]
        try:
            yield
        finally:
            for module, name, live in before:
                module._parameters[name] = live


class _Suspended:
    """Passes that wait before parts of a model."""

    def __init__(self, parts: Sequence[nn.Module], scratch: Path) -> None:
        self._parts = parts
        self._scratch = scratch
        self._open: int | None = None
        self._kept = 0
        self.waiting: dict[int, list[greenlet]] = {}

    def __enter__(self) -> "_Suspended":
        self._scheduler = getcurrent()
        for place, part in enumerate(self._parts):
            # It hides the method of the class until it is deleted.
            part.forward = partial(self._arrive, place, part.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for row in (row for rows in self.waiting.values() for row in rows):
            row.throw()
        for part in self._parts:
            del part.forward

    @property
    def left(self) -> int:
        """The steps to the end of the model of all passes that wait."""
        return sum((len(self._parts) - at) * len(rows) for at, rows in self.waiting.items())

    def start(self, one: Pass) -> None:
        """Run a pass to its first part."""
        row = greenlet(one, self._scheduler)
        row.gr_context = copy_context()
        self._resume(row)

    def next(self, place: int) -> int:
        """The first part, from a place on, before which passes wait; then from the beginning."""
        return min(self.waiting, key=lambda one: (one < place, one))

    def go_through(self, place: int) -> int:
        """Run all passes that wait before a part to the next one; returns their number."""
        rows = self.waiting.pop(place)
        self._open = place
        for number, row in enumerate(rows):
            try:
                self._resume(row)
            except BaseException:
                self.waiting[place] = rows[number + 1 :]
                raise
        self._open = None
        return len(rows)

    def _resume(self, row: greenlet) -> None:
        place = row.switch()
        if not row.dead:
            self.waiting.setdefault(place, []).append(row)

    def _arrive(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Called in a pass in place of a part."""
        if place != self._open:
            size = self._keep((*args, *kwargs.values()))
            self._scheduler.switch(place)
            self._kept -= size
        return forward(*args, **kwargs)

    def _keep(self, values: object) -> int:
        """Move the tensors of a pass to files if too many are in memory; return the bytes kept."""
        movable = [one for one in _tensors(values) if _is_movable(one)]
        size = sum(one.nbytes for one in movable)
        if self._kept + size <= _KEPT:
            self._kept += size
            return size
        for one in movable:
            _move(one, self._scratch)
        return 0


def _place(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device; weights that are not there become NaN, without memory.

    Unlike tensors on the meta device they tell their device, and a model that reads them past the
    module that they belong to gives no number.
    """
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, live in module._parameters.items():
            if live is None:
                continue
            if id(live) not in placed:
                value = live.to(device) if not live.is_meta else _not_there(live, device)
                placed[id(live)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = placed[id(live)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _not_there(live: Tensor, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=live.dtype, device=device).expand(live.shape)


def _is_large(module: nn.Module) -> bool:
    return type(module) in (nn.Embedding, nn.Linear) and _weights(module) >= _LARGE


def _weights(module: nn.Module) -> int:
    """The bytes of the weights of a module without its children."""
    return sum(one.nbytes for one in module._parameters.values() if one is not None)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors among the arguments of a part, also those of caches."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif type(value).__module__ == "transformers.cache_utils":
        yield from _tensors(vars(value))


def _is_movable(tensor: Tensor) -> bool:
    """True if a tensor is in private memory, and as a file the same."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_inference()
    return plain and tensor.nbytes >= _SMALL and tensor.untyped_storage().filename is None


def _move(tensor: Tensor, scratch: Path) -> None:
    """Move a tensor to a file, under all references to it; the file goes away with it."""
    with tempfile.NamedTemporaryFile(dir=scratch) as file:
        # A full disk is an error here, and would kill the process later.
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        moved = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    tensor.data = moved.view(tensor.shape).copy_(tensor)
