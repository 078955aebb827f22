"""Make a study of a line: a table as CSV, plots, and a run in MLflow; the line stays as it is.

    members in use --> the study's own merges and measurements (stored) --> table

Settings are chosen on validation rows; test rows serve only to report results.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restitch.flows.promotion.snapshot import take_snapshot
from restitch.flows.research.study import STUDIES
from restitch.flows.research.study.subject import Study, Subject
from restitch.flows.research.study_output import StudyOutcome, as_csv, publish_study
from restitch.merging.errors import BadInput, unknown_name
from restitch.tasks.report.drawing import to_png
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.workspace import workspace

# They finetune, localize with data, or run methods of matrices.
_OF_WEIGHTS = ("continual", "runtime", "shots")


@dataclass(frozen=True, kw_only=True)
class StudyTable(StudyOutcome):
    """The result of a study.

    Attributes:
        about: a description of the study in one line.
        version: the version in use.
        columns: the columns of the rows, in order; a terminal leaves out the `details`.
    """

    study: str
    about: str
    version: int | None
    columns: list[str]
    details: list[str]
    rows: list[dict[str, Any]]
    notes: list[str]


@flow("study", "{name} of {line}")
def study(name: str, line: str, out: str | None = None) -> StudyTable:
    """Make a study.

    Args:
        name: one of `STUDIES`.
        line: the line's name.
        out: a folder for the table and the plots.

    Raises:
        BadInput: there is no such study, or the line lacks data or weights that it needs.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    subject = Subject(take_snapshot(workspace().ledger(line)))
    if name in _OF_WEIGHTS and subject.snapshot.line_state.spec.space is not None:
        raise BadInput(
            f"the study {name} works with the weights of layers, and line {line} has vectors",
            expected="a line that merges weights",
            found="a line with `space`",
            hint="choose one of "
            + ", ".join(each for each in STUDIES if each not in _OF_WEIGHTS)
            + ", or another line",
        )
    made: Study = importlib.import_module(f"restitch.flows.research.study.{name}").make(subject)
    left_out = [f"{task} is left out: it has no rows to evaluate on" for task in subject.left_out]
    outcome = StudyTable(
        study=name,
        about=STUDIES[name],
        line=line,
        version=subject.snapshot.line_state.champion,
        members={member.task: member.version for member in subject.members},
        columns=list(made.rows[0]),
        details=list(made.details),
        rows=[dict(row) for row in made.rows],
        notes=[*made.notes, *left_out],
    )
    params = ("study", "version", "members", "notes")
    publish_study(
        outcome,
        f"{name} of {line}",
        out,
        name=name,
        params={key: getattr(outcome, key) for key in params},
        metrics=_metrics(outcome.rows),
        artifacts={
            f"{name}.csv": as_csv(outcome.rows).encode(),
            **{f"{plot.name}.png": to_png(plot) for plot in made.plots},
        },
    )
    return outcome


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The charts in MLflow: the mean of each row, or the other values that a study measures."""
    metrics = {}
    for number, row in enumerate(rows, 1):
        for name in ("mean", "normalized", "seconds", "share"):
            if isinstance(row.get(name), int | float):
                metrics[f"{number:03d}/{name}"] = float(row[name])
    return metrics
