"""Experts: the result of methods of `kind="experts"`, one specialist per task on one base.

Most methods share a multi-task vector (`SharedExperts`): a specialist is the base plus the part of
the vector that the task's mask selects, multiplied by the task's scale if the method has one.
Others keep a vector for each task (`OwnExperts`). Specialists are streamed `Edits`. With scale 1,
all specialists have the same bits at the coordinates that their masks select.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from restitch.merging.files.edits import Edits
from restitch.merging.rules.elementwise import Elementwise, Floats, Range
from restitch.merging.rules.merge_inputs import MergeInputs
from restitch.merging.rules.settings import bad_setting, check_range

# One number for all tasks, or one for each task by name.
PerTask = float | Mapping[str, float]


class Experts(Protocol):
    """One specialist per task.

    Attributes:
        tasks: their names, sorted by their UTF-8 bytes.
    """

    tasks: tuple[str, ...]

    def for_task(self, task: str) -> Edits:
        """The specialist of a task as edits of the base."""


@dataclass(frozen=True)
class Selected:
    """A multi-task vector on a range of a tensor, and each member's mask on it.

    Attributes:
        together: the multi-task vector.
        masks: by member number; a member without a mask takes nothing.
    """

    together: Floats
    masks: Mapping[int, NDArray[np.bool_]]


SelectionRule = Callable[[Range], Selected]


class SharedExperts:
    """Specialists that take parts of one multi-task vector.

    Args:
        inputs: the base and the members, each with its whole task vector.
        rule: computes the multi-task vector and the masks on a range.
        scales: the factor of each task's part, in the order of the tasks; 1 by default.
    """

    def __init__(
        self, inputs: MergeInputs, rule: SelectionRule, scales: Sequence[float] = ()
    ) -> None:
        self.tasks = inputs.tasks
        self._inputs = inputs
        self._rule = rule
        self._scales = tuple(scales) or (1.0,) * len(self.tasks)

    def scale(self, task: str) -> float:
        """The factor of a task's part."""
        return self._scales[self.tasks.index(task)]

    def for_task(self, task: str) -> Edits:
        """The base plus the task's part of the multi-task vector."""
        number = self.tasks.index(task)
        scale = self._scales[number]

        def taken(part: Range) -> Floats:
            selected = self._rule(part)
            mask = selected.masks.get(number)
            if mask is None:
                return np.zeros_like(selected.together)
            return np.where(mask, scale * selected.together, 0)

        return Elementwise(self._inputs.base, self._inputs.vectors, taken)

    def observed(self, observe: Callable[[Selected], None]) -> Edits:
        """The base plus the whole multi-task vector; `observe` receives each computed range."""

        def shared(part: Range) -> Floats:
            selected = self._rule(part)
            observe(selected)
            return selected.together

        return Elementwise(self._inputs.base, self._inputs.vectors, shared)


class OwnExperts:
    """Specialists that share only the base.

    Args:
        edits: by task, in order.
    """

    def __init__(self, edits: Mapping[str, Edits]) -> None:
        self.tasks = tuple(edits)
        self._edits = dict(edits)

    def for_task(self, task: str) -> Edits:
        """The base plus the kept part of the task's own vector."""
        return self._edits[task]


def per_task(name: str, value: PerTask, tasks: Sequence[str], high: float) -> list[float]:
    """The value of a setting for each task, from one number or from a number by task.

    Args:
        name: the name of the setting.
        value: its value.
        tasks: the tasks in order.
        high: the largest allowed value; the smallest is 0.

    Raises:
        BadInput: a value is out of range, or a task is missing.
    """
    if not isinstance(value, Mapping):
        return [check_range(name, value, 0, high)] * len(tasks)
    missing = [task for task in tasks if task not in value]
    if missing:
        expected = f"one number, or one for each of {', '.join(tasks)}"
        raise bad_setting(name, "not valid", expected, f"none for {', '.join(missing)}")
    return [check_range(f"{name} of {task}", value[task], 0, high) for task in tasks]
