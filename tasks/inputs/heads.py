"""Rebuild heads of a line's tasks that are missing in the store."""

from restitch.merging.digests import digest_json
from restitch.registry.ledger.line_state import LineState
from restitch.tasks.inputs.checkpoints import live_base, open_base
from restitch.tasks.inputs.task_data import head_inputs, task_head
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace


def heads_again(line_state: LineState, missing: set[str], space: Workspace) -> int:
    """Rebuild the heads with these digests of inputs.

    Args:
        line_state: the line's state.
        missing: the digests of their inputs, as in keys; rebuilt ones are removed from the set.
        space: the workspace to store them in.

    Returns:
        The number of heads that were built.

    Raises:
        RestitchError: the base cannot be read now.
    """
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    made = 0
    for task in line_state.tasks.values():
        if not task.spec.has_head:
            continue
        for model in task.versions.values():
            for each in base.in_each_type():
                inputs = digest_json(head_inputs(task.spec, each, model.model))
                if inputs in missing:
                    live = live_base(each, f"build the head of {task.spec.task}")
                    task_head(task.spec, each, live, model.model, space)
                    missing.discard(inputs)
                    made += 1
    return made
