"""Make a study of a line: a table as CSV, plots, and a run in MLflow; the line stays as it is.

    members in use --> the study's own merges and measurements (kept in the store) --> table

Test rows are for reporting alone: what a study has to choose it chooses on validation rows.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from restitch.flows.promotion.snapshot import take_snapshot
from restitch.flows.research.studies import as_csv, log_study, write_study
from restitch.flows.research.study import STUDIES
from restitch.flows.research.study.subject import Study, Subject
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput
from restitch.tasks.report.drawing import to_png
from restitch.tasks.runtime.engine import flow
from restitch.tasks.runtime.workspace import actor, workspace


@flow("study", "{name} of {line}")
def study(name: str, line: str, out: str | None = None) -> dict[str, Any]:
    """Make a study.

    Args:
        name: which; see `restitch.flows.research.study.STUDIES`.
        line: the line's name.
        out: a folder for the table and the plots.

    Raises:
        BadInput: there is no such study, or the line has not what it needs.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.5)
        raise BadInput(
            f"unknown study: {name!r}",
            expected=", ".join(STUDIES),
            found=name,
            hint=f"did you mean {near[0]!r}?"
            if near
            else "restitch study --help says what is there",
        )
    subject = Subject(take_snapshot(workspace().ledger(line)))
    made: Study = importlib.import_module(f"restitch.flows.research.study.{name}").make(subject)
    left_out = [f"{task} has no rows to evaluate on" for task in subject.left_out]
    found: dict[str, Any] = {
        "study": name,
        "about": STUDIES[name],
        "line": line,
        "version": subject.snapshot.line_state.champion,
        "members": {member.task: member.version for member in subject.members},
        "columns": list(made.rows[0]),
        "details": list(made.details),
        "rows": [dict(row) for row in made.rows],
        "notes": [*made.notes, *left_out],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": actor(),
    }
    artifacts = {
        f"{name}.json": canonical_json(found),
        f"{name}.csv": as_csv(made.rows).encode(),
        **{f"{plot.name}.png": to_png(plot) for plot in made.plots},
    }
    write_study(out, artifacts)
    params = {key: found[key] for key in ("study", "version", "members", "notes")}
    log_study(found, f"{name} of {line}", params, _metrics(made.rows), artifacts)
    return found


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What MLflow charts: the mean, or what else a study is about, of each row."""
    found = {}
    for place, row in enumerate(rows, 1):
        for name in ("mean", "normalized", "seconds", "share"):
            if isinstance(row.get(name), int | float):
                found[f"{place:03d}/{name}"] = float(row[name])
    return found
