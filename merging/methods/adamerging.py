"""AdaMerging, layer-wise (Yang et al., ICLR 2024); see `statistics.entropy_coefficients`."""

from restitch.merging.files.edits import Edits
from restitch.merging.methods.registry import method
from restitch.merging.rules.elementwise import Elementwise, Floats, Range, sum_arrays
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import check_range
from restitch.merging.statistics.statistic_file import COEFFICIENTS, check_fits, statistics_of


@method(
    name="adamerging",
    version=1,
    source="Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575",
    exact=True,
    whole=True,
    needs=(COEFFICIENTS,),
)
def adamerging(
    inputs: MergeInputs,
    *,
    steps: int = 50,
    learning_rate: float = 1e-2,
    start: float = 0.3,
    batch: int = 16,
) -> Edits:
    """Base + sum_t lambda_tl * tau_tl with the learned coefficients, one per task and tensor.

    The settings are those of learning, which happens before; the merge only reads its result.

    Args:
        inputs: the base and the members, each with its task vector and the coefficients of all.
        steps: the number of steps of Adam; each uses one batch of every task.
        learning_rate: the learning rate of Adam.
        start: the initial value of all coefficients.
        batch: rows per batch.
    """
    check_range("steps", steps, 0, 100_000)
    check_range("learning_rate", learning_rate, 0, 1)
    check_range("start", start, 0, 1)
    check_range("batch", batch, 1, 1 << 16)
    learned = statistics_of(inputs.members, COEFFICIENTS)
    for vector, coefficients in zip(inputs.vectors, learned, strict=True):
        check_fits(COEFFICIENTS, coefficients, dict.fromkeys(vector.names, len(learned)))

    def merged(part: Range) -> Floats:
        factors = {
            number: float(learned[number].tensor(part.name)[number]) for number, _ in part.vectors
        }
        return sum_arrays([vector * factors[number] for number, vector in part.vectors])

    return Elementwise(inputs.base, inputs.vectors, merged)
