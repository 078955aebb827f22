"""Magnitude pruning (a baseline of Wang et al., ICML 2024): each task keeps its largest changes.

It needs as much space as TALL masks: T pruned vectors, each with 1/T of the weights and one bit
per weight for their positions, are as large as one whole vector and T masks.
"""

from restitch.merging.experts.specialists import Experts, OwnExperts
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.elementwise import Elementwise
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.ties import Trim


@method(
    name="magnitude-pruning",
    version=1,
    source="Wang et al., Localizing task information (TALL), ICML 2024, arXiv 2405.07813",
    exact=True,
    kind="experts",
    whole=True,
)
def magnitude_pruning(inputs: MergeInputs) -> Experts:
    """Base + (the largest 1/T of the task's own vector, over the whole model)."""

    def pruned(vector: MemberVector) -> Edits:
        kept = Trim([vector], 1 / len(inputs.tasks), "model")
        return Elementwise(inputs.base, [vector], lambda part: kept.apply(part)[0][1])

    return OwnExperts(dict(zip(inputs.tasks, map(pruned, inputs.vectors), strict=True)))
