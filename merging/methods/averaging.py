"""Simple averaging: the mean of the finetuned models."""

from collections.abc import Iterable

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import Elementwise, kept_vectors, sum_vectors
from restitch.merging.rules.stitch import DeltaMember


@method(
    name="averaging",
    version=1,
    source="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482",
    exact=True,
    whole=True,
)
def averaging(base: Checkpoint, members: Iterable[DeltaMember]) -> Edits:
    """Base + (1/T) sum of task vectors.

    Args:
        base: the base's checkpoint.
        members: the members, each with its whole task vector.
    """
    vectors = kept_vectors(base, members)
    return Elementwise(base, vectors, lambda part: sum_vectors(part.vectors) / len(vectors))
