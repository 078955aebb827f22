"""Statistics of a finetuned model that a method needs in addition to its delta, as safetensors.

A statistic is measured once on rows of the model's own task and stored by digest; a merge reads it
tensor by tensor. The file names its kind and the base and delta that it belongs to. Equal
statistics have equal bytes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from restitch.merging.errors import BadInput, Damage, RestitchError
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.header import count_elements, write_header
from restitch.merging.order import by_bytes
from restitch.merging.rules.stitch import DeltaMember

FISHER, GRAM, COEFFICIENTS = "fisher", "gram", "coefficients"
GRADIENT_GRAM = "gradient-gram"

_KIND = "restitch.statistic"
_SUBJECTS = ("base", "delta")


def write_statistic(
    path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a statistic.

    Args:
        path: the file.
        kind: `FISHER`, `GRAM`, `GRADIENT_GRAM` or `COEFFICIENTS`.
        tensors: by name, on any device.
        metadata: the digest of `base` and, for a statistic of one member, of `delta`.
    """
    forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, mapped in new_statistic(path, kind, forms, metadata).items():
        mapped.copy_(tensors[name].detach())


def new_statistic(
    path: Path,
    kind: str,
    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> dict[str, Tensor]:
    """Write a statistic whose entries are 0, and are measured later.

    Args:
        path: the file.
        kind: `FISHER`, `GRAM`, `GRADIENT_GRAM` or `COEFFICIENTS`.
        forms: the type and shape of each tensor by name; types of one size.
        metadata: as of `write_statistic`.

    Returns:
        The tensors of the file itself: it has what is written to them.
    """
    entries = [(name, *forms[name]) for name in sorted(forms, key=by_bytes)]
    # Without the safetensors library, which does not sort the metadata.
    header = write_header(entries, dict(sorted({**metadata, _KIND: kind}.items())))
    sizes = [count_elements(shape) * dtype.itemsize for _, dtype, shape in entries]
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        # A full disk is an error here, and would kill the process later.
        os.posix_fallocate(file.fileno(), 0, len(header) + sum(sizes))
    plain = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
    flat = torch.split(plain[len(header) :], sizes)
    return {
        name: one.view(dtype).view(shape)
        for one, (name, dtype, shape) in zip(flat, entries, strict=True)
    }


def open_statistic(path: Path, kind: str, subjects: Mapping[str, str]) -> Checkpoint:
    """Open a statistic.

    Args:
        path: the file.
        kind: the expected kind.
        subjects: the digests of the base and, for a statistic of one member, of the delta.

    Raises:
        Damage: the file is a statistic of another kind or subject, or none at all.
    """
    try:
        statistic = Checkpoint.open(path)
    except RestitchError as error:
        raise Damage("a statistic cannot be read", found=error.summary) from error
    recorded = {name: statistic.metadata.get(name) for name in _SUBJECTS if name in subjects}
    if statistic.metadata.get(_KIND) != kind or recorded != dict(subjects):
        raise Damage(
            "a statistic belongs to another base or delta, or is of another kind",
            expected=f"{kind} of {', '.join(f'{k} {v[:12]}' for k, v in subjects.items())}",
            found=f"{statistic.metadata.get(_KIND)} of "
            + ", ".join(f"{name} {str(value)[:12]}" for name, value in recorded.items()),
            hint="restore the store from a backup, and find out what changed it",
        )
    return statistic


def statistics_of(members: Sequence[DeltaMember], kind: str) -> tuple[Checkpoint, ...]:
    """One statistic of each member, in their order.

    Raises:
        BadInput: a member does not have this statistic.
    """
    lacking = [member.task for member in members if kind not in member.statistics]
    if lacking:
        raise BadInput(
            f"the method needs statistics of kind {kind}",
            expected="one for every member",
            found=f"none for {', '.join(lacking)}",
        )
    return tuple(member.statistics[kind] for member in members)


def check_fits(kind: str, statistic: Checkpoint, sizes: Mapping[str, int]) -> None:
    """Check that a statistic has the right number of entries for each of a member's tensors.

    Args:
        kind: the kind of the statistic.
        statistic: the statistic.
        sizes: the number of entries of each tensor.

    Raises:
        Damage: a tensor has another number of entries.
    """
    for name, size in sizes.items():
        entries = statistic.info(name).numel if name in statistic else 0
        if entries != size:
            raise Damage(
                f"the statistics of kind {kind} do not fit the member at {name}",
                expected=f"{size} entries",
                found=entries,
                hint="restore the store from a backup, and find out what changed it",
            )


def check_finite(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all entries of a statistic are finite.

    Raises:
        BadInput: some are not; the error names their tensors.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise BadInput(
            f"the statistics of kind {kind} are not finite",
            expected="finite entries",
            found=f"infinity or NaN in {len(bad)} tensors",
            hint="check the train rows of the task and the finetuned model",
            details=bad,
        )
