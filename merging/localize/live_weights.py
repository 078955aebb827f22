"""The live weights of a loaded model, set to points between its base and a finetuned checkpoint.

Within `with LiveWeights(...)` exactly the localizable tensors of the model require gradients.
Weights are computed from the two checkpoints each time. Leaving the block, also by an exception,
restores the base's weights and `requires_grad` of all tensors, and drops the gradients. On the CPU
the checkpoints stay memory-mapped; on another device their localizable tensors are copied once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.ranking.score_tensors import Sample
from restitch.merging.ranking.task_vector import TaskVector

Key = TypeVar("Key")


@dataclass(frozen=True)
class LiveTensor:
    """One localizable tensor: live, in the base and in the finetuned checkpoint."""

    name: str
    live: Tensor
    base: Tensor
    finetuned: Tensor

    def zeros(self) -> Tensor:
        """A score of zero for each coordinate: float32, or float64 for such a tensor."""
        return torch.zeros(self.live.shape, dtype=self.score_dtype, device=self.live.device)

    @property
    def score_dtype(self) -> torch.dtype:
        """The type of its scores."""
        wide = torch.float64 in (self.live.dtype, self.base.dtype, self.finetuned.dtype)
        return torch.float64 if wide else torch.float32

    def difference(self, buffer: Tensor) -> Tensor:
        """Finetuned minus base, written to `buffer`."""
        if self.base.dtype == self.finetuned.dtype == buffer.dtype:
            return torch.sub(self.finetuned, self.base, out=buffer)
        return buffer.copy_(self.finetuned).sub_(self.base)

    def pull(self, buffer: Tensor) -> Tensor:
        """The gradient times the difference, written to `buffer`; zero without a gradient."""
        if self.live.grad is None:
            return buffer.zero_()
        return self.difference(buffer).mul_(self.live.grad)

    def add_pull(self, score: Tensor, buffer: Tensor, share: float) -> None:
        """Add a share of the gradient times the difference to a score."""
        if score.is_cuda and self.live.grad is not None:
            # Saves a kernel; on the CPU it rounds differently and saves nothing.
            score.addcmul_(self.difference(buffer), self.live.grad, value=share)
        else:
            score.add_(self.pull(buffer), alpha=share)


class LiveWeights:
    """The localizable tensors of a loaded model, as a context manager.

    Args:
        parameters: live tensors by the base checkpoint's names.
        task_vector: the two checkpoints and the localizable names.
    """

    def __init__(self, parameters: Mapping[str, Tensor], task_vector: TaskVector) -> None:
        self.task_vector = task_vector
        self.coordinates = task_vector.coordinates
        missing = [name for name in task_vector.names if name not in parameters]
        if missing:
            raise BadInput(
                "the loaded model lacks localizable tensors of its checkpoint",
                expected="every localizable tensor of the checkpoint",
                found=f"{len(missing)} missing",
                hint="exclude them in localize: exclude",
                details=missing,
            )
        self.parts = tuple(_part(name, parameters[name], task_vector) for name in task_vector.names)
        self._parameters = parameters
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._undo.enter_context(torch.no_grad())
        self._undo.enter_context(requiring_gradients(self._parameters, self.task_vector.names))
        self._undo.callback(self._write_base)
        self._write_base()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.__exit__(*error)

    def graft(self, scores: Mapping[str, Tensor], threshold: float) -> None:
        """Write finetuned values where scores are above the threshold, the base's elsewhere."""
        for part in self.parts:
            chosen, dtype = scores[part.name] > threshold, part.live.dtype
            torch.where(chosen, part.finetuned.to(dtype), part.base.to(dtype), out=part.live)

    def interpolate(self, share: float) -> None:
        """Write the base plus a share of the difference; 1 gives exactly the finetuned values."""
        for part in self.parts:
            if share == 1:
                part.live.copy_(part.finetuned)
            else:
                part.live.copy_(part.difference(self.buffer(part)).mul_(share).add_(part.base))

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.live.grad = None

    def consuming_gradients(
        self, use: Callable[[LiveTensor], None]
    ) -> AbstractContextManager[None]:
        """Within the block, pass each tensor with its gradient to `use`, then drop the gradient."""
        return consuming_gradients(((part, part.live) for part in self.parts), use)

    def step(self, backward: Callable[[], Tensor], use: Callable[[LiveTensor], None]) -> Tensor:
        """Run a backward pass and pass every tensor to `use`, most of them during the pass.

        Only one gradient is in memory at a time, and none afterwards. Tensors that the pass does
        not reach have none.

        Returns:
            What the pass returns.
        """
        left = {part.name: part for part in self.parts}

        def used(part: LiveTensor) -> None:
            del left[part.name]
            use(part)

        with self.consuming_gradients(used):
            found = backward()
        for part in left.values():
            use(part)
        return found

    def add_pull(self, scores: Mapping[str, Tensor], share: float, part: LiveTensor) -> None:
        """Add a share of a tensor's gradient times its difference to its score."""
        part.add_pull(scores[part.name], self.buffer(part), share)

    def kth_pull(self, kept: int, backward: Callable[[], Tensor]) -> float:
        """The k-th largest |pull| of a backward pass; see `Sample`."""
        sample = Sample(self.coordinates)
        places = {part.name: sample.next(part.live.numel()) for part in self.parts}
        pieces: dict[str, Tensor] = {}

        def look(part: LiveTensor) -> None:
            pull = part.pull(self.buffer(part)).abs_()
            pieces[part.name] = pull.view(-1)[places[part.name]].clone()

        self.step(backward, look)
        return sample.threshold([pieces[part.name] for part in self.parts], kept)

    def buffer(self, part: LiveTensor) -> Tensor:
        """Scratch memory in the shape and score type of a tensor; the next call reuses it."""
        key = (part.live.device, part.score_dtype)
        if key not in self._buffers:
            largest = max(other.live.numel() for other in self.parts)
            self._buffers[key] = torch.empty(largest, dtype=key[1], device=key[0])
        return self._buffers[key][: part.live.numel()].view(part.live.shape)

    def _write_base(self) -> None:
        for part in self.parts:
            part.live.copy_(part.base)


@contextmanager
def requiring_gradients(
    parameters: Mapping[str, Tensor], names: Iterable[str]
) -> Iterator[Callable[[], None]]:
    """Let exactly the named live tensors require gradients within a block.

    Yields:
        A function that drops their gradients.
    """
    previous = [(tensor, tensor.requires_grad) for tensor in parameters.values()]
    live = [parameters[name] for name in names]

    def drop() -> None:
        for tensor in live:
            tensor.grad = None

    try:
        for tensor, _ in previous:
            tensor.requires_grad_(False)
        for tensor in live:
            tensor.requires_grad_(True)
        drop()
        yield drop
    finally:
        drop()
        for tensor, before in previous:
            tensor.requires_grad_(before)


@contextmanager
def consuming_gradients(
    live: Iterable[tuple[Key, Tensor]], use: Callable[[Key], None]
) -> Iterator[None]:
    """Within a block, pass the key of each tensor to `use` and then drop its gradient.

    Args:
        live: the tensors with their keys.
        use: called during a backward pass, when the gradient of a tensor is complete.
    """

    def complete(key: Key, tensor: Tensor) -> None:
        use(key)
        tensor.grad = None

    with ExitStack() as hooks:
        for key, tensor in live:
            untyped: Any = tensor  # the method below has no type annotations
            hooks.enter_context(untyped.register_post_accumulate_grad_hook(partial(complete, key)))
        yield


def _part(name: str, live: Tensor, task_vector: TaskVector) -> LiveTensor:
    base, finetuned = task_vector.base.tensor(name), task_vector.finetuned.tensor(name)
    if live.shape != base.shape:
        raise BadInput(
            f"the shape of the loaded model's {name} differs from its checkpoint",
            expected=list(base.shape),
            found=list(live.shape),
        )
    return LiveTensor(name, live, base.to(live.device), finetuned.to(live.device))
