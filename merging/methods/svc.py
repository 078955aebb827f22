"""Singular value calibration (Li et al., 2026): shared directions are not counted several times.

A step after another method: the singular vectors of its merged matrix stay, and each singular
value is scaled so that, along its direction, the tasks get on average their own response.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import Method, get_method, method, method_names
from restitch.merging.numerics.decompositions import svd
from restitch.merging.numerics.factors import above_rounding
from restitch.merging.numerics.rounding import cast
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.per_matrix import Matrix, PerMatrix
from restitch.merging.rules.settings import LARGE_COEFFICIENTS, check_range

NAME = "svc"

# The paper's values after a method; 0.1 after the other methods, which are kinds of sums too.
FLOORS: Mapping[str, float] = MappingProxyType({"iso-cts": 0.2, "tsv-m": 1.0, "wudi": 1.0})
_FLOOR = 0.1

# Singular values that differ by less than this share count as equal; their vectors are arbitrary.
_EQUAL = 1e-3
_LEAN = 1e-2


@method(
    name=NAME,
    version=2,
    source="Li et al., When shared knowledge hurts, 2026, arXiv 2602.05536",
    exact=False,
    whole=True,
    tunes=("alpha", LARGE_COEFFICIENTS),
)
def svc(
    inputs: MergeInputs,
    *,
    after: str = "tsv-m",
    floor: float = 0.0,
    alpha: float = 1.0,
) -> Edits:
    """Base + alpha * (what the method `after` merges, with calibrated singular values).

    Args:
        inputs: the base and the members, each with its whole task vector.
        after: the method, used with its defaults: a coefficient of its own mostly cancels out.
        floor: the lower bound of a task's coefficient in a direction; 0 is the paper's value.
        alpha: the coefficient.
    """
    check_range("floor", floor, 0, 100)
    check_range("alpha", alpha, 0, 10)
    inner = _checked_method(after)(inputs.base, inputs.members)
    least = floor or FLOORS.get(after, _FLOOR)

    def unchanged(matrix: Matrix) -> Tensor:
        """The other method's merged task vector, not rounded to the base's type."""
        before = cast(inputs.base.tensor(matrix.name).reshape(-1), torch.float64)
        wide = before.clone()
        inner.apply(matrix.name, wide)
        change = (wide - before).view(inputs.base.info(matrix.name).shape)
        return matrix.projected(change.to(matrix.changes))

    return PerMatrix(
        inputs,
        lambda matrix: alpha * calibrated(unchanged(matrix), matrix.changes, least),
        lambda matrix: alpha * unchanged(matrix),
    )


def calibrated(change: Tensor, changes: Tensor, floor: float) -> Tensor:
    """D = U S V^T with s_r scaled by T / sum_t max(floor, p_rt).

    p_rt = <u_r^T D, u_r^T D_t> / |u_r^T D_t|^2 is the coefficient of the task's own response along
    the direction u_r in the merged one; it is 0 if the task changes nothing there. If all singular
    values that are not 0 are equal, as after Iso-C, the singular vectors are arbitrary. Then those
    of D plus a small multiple of the sum are used (after Iso-C, they are the sum's own).

    Args:
        change: the merged matrix, rows x columns.
        changes: task vectors, members x rows x columns.
        floor: the lower bound of p_rt, more than 0.
    """
    left, values, right = svd(change)
    rank = int(above_rounding(values, max(change.shape)).sum())
    if values[0] - values[rank - 1] <= _EQUAL * values[0]:
        together = changes.sum(0)
        size = together.norm().clamp_min(torch.finfo().tiny)
        left, _, right = svd(change + _LEAN * values[0] / size * together)
    responses = left.mT @ changes
    met = (responses * (values[:, None] * right)).sum(2)
    coefficients = met / responses.square().sum(2).clamp_min(torch.finfo().tiny)
    scale = len(changes) / coefficients.clamp_min(floor).sum(0)
    return (left * (values * scale)) @ right


def _checked_method(name: str) -> Method:
    chosen = get_method(name)
    others = (get_method(other) for other in method_names() if other != NAME)
    allowed = [o.name for o in others if o.kind == "merged" and o.whole and not o.needs]
    if name not in allowed:
        raise BadInput(
            f"{NAME} cannot come after {name}",
            expected="another method that merges whole task vectors alone into one model: "
            + ", ".join(allowed),
            found=name,
            hint="correct method: settings: after",
        )
    return chosen
