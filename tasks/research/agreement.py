"""Count how many masks select each weight; results are stored once per set of deltas."""

from restitch.merging.analysis.agreement import VERSION, agreement_profile, kept_profile
from restitch.merging.digests import digest_json
from restitch.merging.files.delta import open_delta
from restitch.merging.rules.consensus import MultiTask, task_arithmetic_sum, ties_sum
from restitch.merging.rules.stitch import DeltaMember as Part
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

# The multi-task vectors that TALL masks can be computed from, by their display names.
TOGETHER = {"of the sum": "sum", "of TIES": "elected"}
_MAKERS: dict[str, MultiTask] = {"sum": task_arithmetic_sum, "elected": ties_sum}


@step("agreement")
def agreement(
    line: LineRef, deltas: tuple[str, ...], together: str | None, threshold: float
) -> tuple[int, ...] | Cached[tuple[int, ...]]:
    """The number of localizable weights in exactly 0, 1, ... masks.

    Args:
        line: with the base.
        deltas: digests of the members' deltas, in the order of their tasks.
        together: the multi-task vector for TALL masks, a value of `TOGETHER`; None counts the
            deltas' own masks.
        threshold: lambda of the TALL masks.
    """
    space = workspace()
    base = open_base(line, space)
    key = digest_json([VERSION, base.ref.weights, base.names, list(deltas), together, threshold])
    known = space.stored("agreement", key)
    if known is not None:
        return Cached(tuple(known))
    # Numbers stand for tasks, because the result does not depend on names.
    parts = [
        Part(f"{index:06d}", open_delta(space.objects.blob_path(delta), base.checkpoint))
        for index, delta in enumerate(deltas)
    ]
    with working("counting agreement"):
        if together is None:
            profile = kept_profile(base.checkpoint, parts, base.names)
        else:
            profile = agreement_profile(
                base.checkpoint, parts, base.names, _MAKERS[together], threshold
            )
    return tuple(space.keep("agreement", key, list(profile)))
