"""Make the heads of a line's tasks again whose place in the store is empty."""

from restitch.merging.digests import digest_json
from restitch.registry.ledger.line_state import LineState
from restitch.tasks.inputs.checkpoints import live_base, open_base
from restitch.tasks.inputs.task_data import head_inputs, task_head
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace


def heads_again(line_state: LineState, missing: set[str], space: Workspace) -> int:
    """Make those heads that these digests of inputs stand for.

    Args:
        line_state: a line.
        missing: digests of inputs, as keys have them.
        space: where the heads go.

    Returns:
        How many were made.

    Raises:
        RestitchError: the base cannot be read now.
    """
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    made = 0
    for task in line_state.tasks.values():
        if task.spec.head is None:
            continue
        for model in task.versions.values():
            inputs = digest_json(head_inputs(task.spec, base, model.model))
            if inputs in missing:
                task_head(task.spec, base, live_base(base), model.model, space)
                missing.discard(inputs)
                made += 1
    return made
