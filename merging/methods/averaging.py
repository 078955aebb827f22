"""Simple averaging: the mean of the finetuned models."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import Elementwise, sum_vectors
from restitch.merging.rules.merge_inputs import MergeInputs


@method(
    name="averaging",
    version=1,
    source="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482",
    exact=True,
    whole=True,
)
def averaging(inputs: MergeInputs) -> Edits:
    """Base + (1/T) sum of task vectors."""
    vectors = inputs.vectors
    return Elementwise(inputs.base, vectors, lambda part: sum_vectors(part.vectors) / len(vectors))
