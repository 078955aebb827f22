"""EMR-Merging (Huang et al., NeurIPS 2024): elect, mask and rescale, without tuning.

The shared vector has on each coordinate the sign of the sum and the largest magnitude among the
task vectors of that sign. A task takes it where its own vector has the same sign, scaled so that
the sum of magnitudes is that of its own vector.
"""

from collections.abc import Sequence

import numpy as np

from restitch.merging.experts.specialists import Experts, Selected, SharedExperts
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.methods.registry import method
from restitch.merging.order import by_bytes
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.elementwise import Floats, Range, ranges, sum_vectors
from restitch.merging.rules.merge_inputs import MergeInputs


@method(
    name="emr",
    version=1,
    source="Huang et al., EMR-Merging, NeurIPS 2024, arXiv 2405.17461",
    exact=True,
    kind="experts",
    whole=True,
)
def emr(inputs: MergeInputs) -> Experts:
    """Base + scale * (the elected vector where the task's own has its sign)."""
    return SharedExperts(inputs, _elected, _scales(inputs.base, inputs.vectors))


def _elected(part: Range) -> Selected:
    sign = np.sign(sum_vectors(part.vectors))
    largest = np.zeros_like(sign)
    masks = {}
    for number, vector in part.vectors:
        masks[number] = (np.sign(vector) == sign) & (sign != 0)
        np.maximum(largest, np.absolute(vector), out=largest, where=masks[number])
    return Selected(sign * largest, masks)


def _scales(base: Checkpoint, vectors: Sequence[MemberVector]) -> list[float]:
    """The sum of magnitudes of each task vector over that of its task's part."""
    own, taken = [0.0] * len(vectors), [0.0] * len(vectors)
    for name in sorted({n for vector in vectors for n in vector.names}, key=by_bytes):
        for part in ranges(base, vectors, name):
            selected = _elected(part)
            largest = np.absolute(selected.together)
            for number, vector in part.vectors:
                own[number] = _summed(own[number], np.absolute(vector))
                taken[number] = _summed(taken[number], np.where(selected.masks[number], largest, 0))
    return [one / other if other else 1.0 for one, other in zip(own, taken, strict=True)]


def _summed(start: float, values: Floats) -> float:
    # In order: any other order, and so the last bits, would depend on the machine.
    return float(np.add.accumulate(np.concatenate([[start], values], dtype=np.float64))[-1])
