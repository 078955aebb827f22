"""Singular value calibration (Li et al., 2026): shared directions are not counted several times.

A step after another method: the singular vectors of its merged matrix stay, and each singular
value is scaled so that, along its direction, the tasks get on average their own response.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import get_method, method, method_names
from restitch.merging.numerics.rounding import cast
from restitch.merging.rules.elementwise import check_range
from restitch.merging.rules.per_matrix import Matrix, PerMatrix, svd
from restitch.merging.rules.stitch import DeltaMember

NAME = "svc"

# The paper's values after a method; 0.1 after the other methods, which are kinds of sums too.
FLOORS: Mapping[str, float] = MappingProxyType({"iso-cts": 0.2, "tsv-m": 1.0, "wudi": 1.0})
_FLOOR = 0.1

# Singular values that differ by less than this share count as equal; their vectors are arbitrary.
_EQUAL = 1e-3
_LEAN = 1e-2


@method(
    name=NAME,
    version=1,
    source="Li et al., When shared knowledge hurts, 2026, arXiv 2602.05536",
    exact=False,
    whole=True,
    tunes=("alpha", tuple(n / 5 for n in range(1, 11))),
)
def svc(
    base: Checkpoint,
    members: Iterable[DeltaMember],
    *,
    after: str = "tsv-m",
    floor: float = 0.0,
    alpha: float = 1.0,
) -> Edits:
    """Base + alpha * (what the method `after` merges, with calibrated singular values).

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
        after: the method, used with its defaults: a coefficient of its own mostly cancels out.
        floor: the lower bound of a task's coefficient in a direction; 0 is the paper's value.
        alpha: the coefficient.
    """
    check_range("floor", floor, 0, 100)
    check_range("alpha", alpha, 0, 10)
    members = tuple(members)
    inner = get_method(_checked_method(after))(base, members)
    least = floor or FLOORS.get(after, _FLOOR)

    def unchanged(matrix: Matrix) -> Tensor:
        """The other method's merged task vector, not rounded to the base's type."""
        before = cast(base.tensor(matrix.name).reshape(-1), torch.float64)
        wide = before.clone()
        inner.apply(matrix.name, wide)
        return (wide - before).view(matrix.changes.shape[1:]).to(matrix.changes)

    return PerMatrix(
        base,
        members,
        lambda matrix: alpha * calibrated(unchanged(matrix), matrix.changes, least),
        lambda matrix: alpha * unchanged(matrix),
    )


def calibrated(change: Tensor, changes: Tensor, floor: float) -> Tensor:
    """D = U S V^T with s_r scaled by T / sum_t max(floor, p_rt).

    p_rt = <u_r^T D, u_r^T D_t> / |u_r^T D_t|^2 is the coefficient of the task's own response along
    the direction u_r in the merged one; it is 0 if the task changes nothing there. If all singular
    values are equal, as after Iso-C, the singular vectors are arbitrary. Then those of D plus a
    small multiple of the sum are used (after Iso-C, they are the sum's own).

    Args:
        change: the merged matrix, rows x columns.
        changes: task vectors, members x rows x columns.
        floor: the lower bound of p_rt, more than 0.
    """
    left, values, right = svd(change)
    if values[0] - values[-1] <= _EQUAL * values[0]:
        together = changes.sum(0)
        size = together.norm().clamp_min(torch.finfo().tiny)
        left, _, right = svd(change + _LEAN * values[0] / size * together)
    responses = left.mT @ changes
    met = (responses * (values[:, None] * right)).sum(2)
    coefficients = met / responses.square().sum(2).clamp_min(torch.finfo().tiny)
    scale = len(changes) / coefficients.clamp_min(floor).sum(0)
    return (left * (values * scale)) @ right


def _checked_method(name: str) -> str:
    chosen = get_method(name)
    if not _can_be_before(name):
        raise BadInput(
            f"{NAME} cannot come after {name}",
            expected=", ".join(filter(_can_be_before, method_names())),
            found=f"{name}, which does not merge whole task vectors alone into one model"
            if name != NAME
            else f"{NAME} itself",
            hint="correct method: settings: after",
        )
    return chosen.name


def _can_be_before(name: str) -> bool:
    chosen = get_method(name)
    return name != NAME and chosen.kind == "merged" and chosen.whole and not chosen.needs
