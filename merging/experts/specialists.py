"""Experts: what methods of `kind="experts"` give, one specialist per task on one base.

Most share a multi-task vector: every specialist is the base plus the part of that vector which
the task's mask selects, multiplied by the task's scale where a method has one (`SharedExperts`).
Others keep a vector for each task (`OwnExperts`). Specialists are `Edits`, streamed like any
other; on a coordinate that a mask selects with scale 1, all specialists have the same bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits
from restitch.merging.order import by_bytes
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.rules.elementwise import Elementwise, Floats, Range, check_range, kept_vectors
from restitch.merging.rules.stitch import DeltaMember

# A number for all tasks, or one for each by its name.
PerTask = float | Mapping[str, float]


class Experts(Protocol):
    """One specialist per task.

    Attributes:
        tasks: their names, sorted by their UTF-8 bytes.
    """

    tasks: tuple[str, ...]

    def for_task(self, task: str) -> Edits:
        """The specialist of a task, as edits of the base."""


@dataclass(frozen=True)
class Selected:
    """A multi-task vector on a range of a tensor, and what each member takes of it.

    Attributes:
        together: the multi-task vector.
        masks: by member's number; a member that is not in it takes nothing.
    """

    together: Floats
    masks: Mapping[int, NDArray[np.bool_]]


SelectionRule = Callable[[Range], Selected]


def tasks_and_vectors(
    base: Checkpoint, members: Iterable[DeltaMember]
) -> tuple[tuple[str, ...], tuple[KeptVector, ...]]:
    """The members' tasks and task vectors, in the order of the tasks.

    Raises:
        BadInput: a delta does not fit the base.
    """
    ordered = sorted(members, key=lambda member: by_bytes(member.task))
    return tuple(member.task for member in ordered), kept_vectors(base, ordered)


class SharedExperts:
    """Specialists that take parts of one multi-task vector.

    Args:
        base: the base's checkpoint.
        tasks: in order.
        vectors: the members' task vectors, in the same order.
        rule: what is shared on a range, and who takes what of it.
        scales: by what the part of each task is multiplied, in the same order; 1 by default.
    """

    def __init__(
        self,
        base: Checkpoint,
        tasks: Sequence[str],
        vectors: Sequence[KeptVector],
        rule: SelectionRule,
        scales: Sequence[float] = (),
    ) -> None:
        self.tasks = tuple(tasks)
        self._base = base
        self._vectors = tuple(vectors)
        self._rule = rule
        self._scales = tuple(scales) or (1.0,) * len(self.tasks)

    def scale(self, task: str) -> float:
        """By what a task's part is multiplied."""
        return self._scales[self.tasks.index(task)]

    def for_task(self, task: str) -> Edits:
        """The base plus what a task takes of the multi-task vector."""
        number = self.tasks.index(task)
        scale = self._scales[number]

        def taken(part: Range) -> Floats:
            found = self._rule(part)
            mask = found.masks.get(number)
            if mask is None:
                return np.zeros_like(found.together)
            return np.where(mask, scale * found.together, 0)

        return Elementwise(self._base, self._vectors, taken)

    def observed(self, see: Callable[[Selected], None]) -> Edits:
        """The base plus the whole multi-task vector; each range is shown as it is computed."""

        def shared(part: Range) -> Floats:
            found = self._rule(part)
            see(found)
            return found.together

        return Elementwise(self._base, self._vectors, shared)


class OwnExperts:
    """Specialists that have nothing in common but the base.

    Args:
        edits: of each task, in the order of the tasks.
    """

    def __init__(self, edits: Mapping[str, Edits]) -> None:
        self.tasks = tuple(edits)
        self._edits = dict(edits)

    def for_task(self, task: str) -> Edits:
        """The base plus what the task keeps of its own vector."""
        return self._edits[task]


def per_task(name: str, value: PerTask, tasks: Sequence[str], high: float) -> list[float]:
    """A setting for each task, where it is given for all of them or by their names.

    Args:
        name: of the setting.
        value: what it is set to.
        tasks: in order.
        high: the most that it can be; the least is 0.

    Raises:
        BadInput: it lies outside of that range, or leaves out a task.
    """
    if not isinstance(value, Mapping):
        return [check_range(name, value, 0, high)] * len(tasks)
    missing = [task for task in tasks if task not in value]
    if missing:
        raise BadInput(
            f"the setting {name} cannot be used",
            expected=f"a number, or one for each of {', '.join(tasks)}",
            found=f"none for {', '.join(missing)}",
            hint=f"correct method: settings: {name}",
        )
    return [check_range(f"{name} of {task}", value[task], 0, high) for task in tasks]
