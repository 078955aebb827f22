"""How many weights the masks of members agree on, kept in the store once per set of deltas."""

import json
from collections.abc import Callable, Sequence

from restitch.merging.analysis.agreement import (
    VERSION,
    MultiTaskVector,
    agreement_profile,
    kept_profile,
    task_arithmetic_sum,
    ties_sum,
)
from restitch.merging.digests import digest_json
from restitch.merging.files.sparse import SparseFile
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.rules.stitch import DeltaMember as Part
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import made_by, workspace

# The multi-task vectors that TALL masks can be taken of, by what people call them.
TOGETHER = {"of the sum": "sum", "of TIES": "elected"}
_MAKERS: dict[str, Callable[[Sequence[KeptVector]], MultiTaskVector]] = {
    "sum": task_arithmetic_sum,
    "elected": ties_sum,
}


@step("agreement")
def agreement(
    line: LineRef, deltas: tuple[str, ...], together: str | None, threshold: float
) -> tuple[int, ...] | Cached[tuple[int, ...]]:
    """The localizable weights in exactly 0, 1, ... masks.

    Args:
        line: with the base.
        deltas: of the members, by digest, in the order of their tasks.
        together: the multi-task vector of TALL masks, a value of `TOGETHER`; None counts the
            masks of the deltas themselves.
        threshold: lambda of TALL masks.
    """
    space = workspace()
    base = open_base(line, space)
    key = digest_json([VERSION, base.ref.weights, base.names, list(deltas), together, threshold])
    record = space.objects.lookup("agreement", key)
    if record is not None:
        return Cached(tuple(json.loads(space.objects.read_blob(record.blob))))
    # Places in a row stand for tasks: nothing here depends on their names.
    parts = [
        Part(f"{place:06d}", SparseFile.open(space.objects.blob_path(delta), base.checkpoint))
        for place, delta in enumerate(deltas)
    ]
    with working("counting agreement"):
        if together is None:
            found = kept_profile(base.checkpoint, parts, base.names)
        else:
            found = agreement_profile(
                base.checkpoint, parts, base.names, _MAKERS[together], threshold
            )
    space.objects.publish("agreement", key, space.objects.put_json(list(found)), made_by())
    return found
