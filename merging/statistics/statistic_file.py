"""What a method knows of a finetuned model beside its delta, each as one safetensors file.

A statistic is found once on rows of the model's own task and kept by digest; a merge reads it
tensor by tensor. The file says of what kind it is and to which base and delta it belongs; equal
statistics give equal bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from restitch.merging.errors import BadInput, Damage, RestitchError
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.header import write_header
from restitch.merging.order import by_bytes
from restitch.merging.rules.stitch import DeltaMember

FISHER, GRAM, COEFFICIENTS = "fisher", "gram", "coefficients"

_KIND = "restitch.statistic"
_BELONGS = ("base", "delta")


def write_statistic(
    path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a statistic.

    Args:
        path: the file.
        kind: one of those above.
        tensors: by name, on any device.
        metadata: `base` and whatever it belongs to.
    """
    names = sorted(tensors, key=by_bytes)
    entries = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    # Not by the safetensors library, which does not order what is in the metadata.
    with path.open("wb") as file:
        file.write(write_header(entries, dict(sorted({**metadata, _KIND: kind}.items()))))
        for name in names:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)


def open_statistic(path: Path, kind: str, belongs: Mapping[str, str]) -> Checkpoint:
    """Open a statistic.

    Args:
        path: the file.
        kind: what it must be.
        belongs: the digests of the base and, where it is of one member, of the delta.

    Raises:
        Damage: it is something else.
    """
    try:
        found = Checkpoint.open(path)
    except RestitchError as error:
        raise Damage("a statistic cannot be read", found=error.summary) from error
    said = {name: found.metadata.get(name) for name in _BELONGS if name in belongs}
    if found.metadata.get(_KIND) != kind or said != dict(belongs):
        raise Damage(
            "a statistic belongs to something else",
            expected=f"{kind} of {', '.join(f'{k} {v[:12]}' for k, v in belongs.items())}",
            found=f"{found.metadata.get(_KIND)} of "
            + ", ".join(f"{name} {str(value)[:12]}" for name, value in said.items()),
            hint="restore the store from a backup, and find out what altered it",
        )
    return found


def statistics_of(members: Sequence[DeltaMember], kind: str) -> tuple[Checkpoint, ...]:
    """One statistic of each member, in the order of their tasks.

    Raises:
        BadInput: a member has none.
    """
    ordered = sorted(members, key=lambda member: by_bytes(member.task))
    lacking = [member.task for member in ordered if kind not in member.statistics]
    if lacking:
        raise BadInput(
            f"the method needs statistics of kind {kind}",
            expected="one for every member",
            found=f"none for {', '.join(lacking)}",
        )
    return tuple(member.statistics[kind] for member in ordered)


def check_fits(kind: str, statistic: Checkpoint, sizes: Mapping[str, int]) -> None:
    """Make sure that a statistic has entries for a member's tensors.

    Args:
        kind: of the statistic.
        statistic: the statistic.
        sizes: how many entries each tensor must have.

    Raises:
        Damage: it has others.
    """
    for name, size in sizes.items():
        found = statistic.info(name).numel if name in statistic else 0
        if found != size:
            raise Damage(
                f"the statistics of kind {kind} do not fit the member at {name}",
                expected=f"{size} entries",
                found=found,
                hint="restore the store from a backup, and find out what altered it",
            )


@contextmanager
def requiring_gradients(
    parameters: Mapping[str, Tensor], names: Sequence[str]
) -> Iterator[Callable[[], None]]:
    """Have some live tensors ask for gradients, and no others, for the length of a block.

    Yields:
        What drops their gradients.
    """
    asked = [(tensor, tensor.requires_grad) for tensor in parameters.values()]
    live = [parameters[name] for name in names]

    def drop() -> None:
        for tensor in live:
            tensor.grad = None

    try:
        for tensor, _ in asked:
            tensor.requires_grad_(False)
        for tensor in live:
            tensor.requires_grad_(True)
        drop()
        yield drop
    finally:
        drop()
        for tensor, before in asked:
            tensor.requires_grad_(before)


def check_finite(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a statistic with numbers that are none.

    Raises:
        BadInput: names every tensor that has some.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise BadInput(
            f"the statistics of kind {kind} are not finite",
            expected="a number for every weight",
            found=f"infinity or NaN in {len(bad)} tensors",
            hint="check the train rows of the task and the finetuned model",
            details=bad,
        )
