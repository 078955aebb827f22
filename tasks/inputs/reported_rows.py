"""Which rows of a task its results are reported on, and which are left to choose by."""

import numpy as np
from numpy.typing import NDArray

from restitch.merging.errors import BadInput
from restitch.modeling.data.task_data import Rows, TaskData, stratified
from restitch.modeling.families.family import Family
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import evaluation_split, has_validation, task_data


def has_rows_to_choose_by(spec: TaskSpec, family: Family) -> bool:
    """True if a task has labelled rows other than those that its results are reported on.

    These are validation rows, rows set apart from train, or test rows outside of the sample. There
    are none of the last kind if the sample takes all rows: see `check_some_are_left`.
    """
    return has_validation(spec, family) or (spec.data is not None and spec.data.sample is not None)


def check_some_are_left(spec: TaskSpec, family: Family) -> None:
    """Refuse a task whose sample leaves no row to choose by, before a merge needs them.

    Raises:
        BadInput: results are reported on all rows.
    """
    if has_rows_to_choose_by(spec, family) and not has_validation(spec, family):
        rows_to_choose_by(task_data(spec, family), spec, family)


def rows_to_choose_by(data: TaskData, spec: TaskSpec, family: Family) -> Rows:
    """The rows to choose by.

    Raises:
        BadInput: results are reported on all rows.
    """
    if has_validation(spec, family):
        return data.rows("validation")
    rows, reported = reported_rows(data, spec)
    if reported is None or len(reported) == len(rows):
        raise BadInput(
            f"task {spec.task} has no rows to choose by",
            expected="rows in addition to those that results are reported on",
            found=f"{len(rows)} {evaluation_split(spec)} rows, "
            "and results are reported on all of them",
            hint="name validation rows in the task's file, or a smaller sample",
        )
    return rows.select(np.setdiff1d(np.arange(len(rows)), reported))


def reported_rows(data: TaskData, spec: TaskSpec) -> tuple[Rows, NDArray[np.int64] | None]:
    """The evaluation split, and the indices of the task's sample of it; None reports on all."""
    split = evaluation_split(spec)
    assert split is not None
    assert spec.data is not None
    rows, sample = data.rows(split), spec.data.sample
    return rows, None if sample is None else stratified(rows.strata, sample.rows, sample.seed)
