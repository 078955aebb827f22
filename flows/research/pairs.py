"""Measure which members of the version in use fit together.

    members in use --> every two of them: signals on their deltas and gradients
                                          merge the two, evaluate both tasks --> what the pair loses
                   --> the rank correlation of each signal with the loss

The line does not change, and no decision depends on the result. The measurements are stored: a
second run computes nothing, and the report of the version has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from restitch.flows.promotion.snapshot import line_with_one_method, take_snapshot
from restitch.flows.research.study_output import StudyOutcome, as_csv, publish_study
from restitch.merging.errors import BadInput, unknown_name
from restitch.tasks.report.drawing import drawing, to_png
from restitch.tasks.report.pair_plots import pairs_plot
from restitch.tasks.research.pairs import SIGNALS, evaluated_members, measure_pairs
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.workspace import workspace


@dataclass(frozen=True, kw_only=True)
class PairsOutcome(StudyOutcome):
    """Which members of a version fit together.

    Attributes:
        method: the merge method that merged each pair.
        pairs: the signals of each pair, and what merging it loses.
        correlations: of each signal with the loss over all pairs.
    """

    version: int
    method: str
    pairs: list[dict[str, Any]]
    correlations: dict[str, dict[str, Any]]


@flow("analyze-pairs", "{line}")
def analyze_pairs(line: str, tasks: Sequence[str] = (), out: str | None = None) -> PairsOutcome:
    """Measure all pairs of members of the version in use.

    Args:
        line: the line's name.
        tasks: the tasks to pair; by default all that were evaluated.
        out: a folder for the table and the plot.

    Raises:
        BadInput: there is no such task, or there are fewer than two to pair.
    """
    snapshot = take_snapshot(workspace().ledger(line))
    record = snapshot.champion
    if record is None:
        raise BadInput(f"line {line} has no members to analyze", hint="register models first")
    measured = evaluated_members(record, snapshot.champion_members)
    known = {member.task: member for member in measured}
    for task in tasks:
        if task not in known:
            raise unknown_name("evaluated task of the version in use", task, known)
    members = tuple(m for m in measured if not tasks or m.task in tasks)
    if len(members) < 2:
        raise BadInput(
            f"line {line} has fewer than two members to pair",
            expected="two or more members with rows to evaluate on",
            found=", ".join(m.task for m in members) or "none",
            hint="register more models, or describe the data of their tasks",
        )
    one_method = line_with_one_method(snapshot.line_state, record)
    found = measure_pairs(one_method, members, record.results)
    outcome = PairsOutcome(
        line=line,
        version=record.version,
        members={m.task: m.version for m in members},
        method=one_method.spec.method.name,
        pairs=found["pairs"],
        correlations={signal: found["correlations"][signal] for signal in SIGNALS},
    )
    with drawing("pairs"):
        plot = pairs_plot(found)
    plots = {} if plot is None else {f"{plot.name}.png": to_png(plot)}
    publish_study(
        outcome,
        f"pairs of {line} {outcome.version}",
        out,
        name="pairs",
        params={"version": outcome.version, "members": outcome.members, "method": outcome.method},
        metrics={
            f"rho/{signal}": found["correlations"][signal]["rho"]
            for signal in SIGNALS
            if found["correlations"][signal]["rho"] is not None
        },
        artifacts={"pairs.csv": as_csv([_row(pair) for pair in found["pairs"]]).encode(), **plots},
    )
    return outcome


def _row(pair: dict[str, Any]) -> dict[str, Any]:
    signals = {signal: pair[signal] for signal in SIGNALS}
    return {"pair": " ".join(pair["tasks"]), **signals, "loss": pair["loss"]}
