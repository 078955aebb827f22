"""The input of a merge method: a base, and the members in the order of their tasks."""

from collections.abc import Iterable

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta
from restitch.merging.files.factor_file import FactorFile
from restitch.merging.ranking.factored_vector import FactoredVector
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.ranking.member_vector import MemberVector
from restitch.merging.rules.stitch import DeltaMember, ordered_members


class MergeInputs:
    """A base and the members to merge.

    Args:
        base: the base's checkpoint.
        members: in any order, each task once.

    Attributes:
        members: in the order of their tasks, like `tasks` and the task vectors in `vectors`.

    Raises:
        BadInput: a delta does not fit the base.
    """

    def __init__(self, base: Checkpoint, members: Iterable[DeltaMember]) -> None:
        self.base = base
        self.members = ordered_members(base, members)
        self.tasks = tuple(member.task for member in self.members)
        self.vectors = tuple(member_vector(base, member.delta) for member in self.members)


def member_vector(base: Checkpoint, delta: Delta) -> MemberVector:
    """The task vector of a member's delta."""
    if isinstance(delta, FactorFile):
        return FactoredVector(base, delta)
    return KeptVector(base, delta)
