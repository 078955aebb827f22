"""The report of a merged version: all that is known about it, on one page.

A report needs only the store. After a change of a line, `mirror` writes the reports of the
affected versions to their runs in MLflow; `write_report` writes one to a folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from restitch.flows.audit import queries
from restitch.flows.audit.diff import differences_of
from restitch.flows.outcome import Outcome
from restitch.flows.promotion.snapshot import line_with_one_method
from restitch.flows.promotion.versions import members_of, open_version
from restitch.merging.errors import RestitchError
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.store.disk import explained
from restitch.tasks.publish import mirror as complete_mlflow
from restitch.tasks.report import Report, ReportInput, render
from restitch.tasks.research.mask_analysis import analyze
from restitch.tasks.research.pairs import evaluated_members, known_pairs
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

PAGE, PLOTS = "report.html", "plots"


@dataclass(frozen=True)
class ReportOutcome(Outcome):
    """The files of a report."""

    line: str
    version: int
    out: str
    files: tuple[str, ...]


class Reports:
    """The reports of a line, as it is at one moment."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @cached_property
    def state(self) -> LineState:
        """The line's state."""
        return self.ledger.state()

    @cached_property
    def acts(self) -> list[dict[str, Any]]:
        """All acts, newest first."""
        return list(queries.history(self.ledger.line, queries.HistoryFilter())["acts"])

    @cached_property
    def versions(self) -> list[dict[str, Any]]:
        """All merged versions, newest first."""
        return list(queries.versions(self.ledger.line)["versions"])

    def report(self, record: MergedRecord) -> Report:
        """The report of a merged version."""
        return render(
            ReportInput(
                version=queries.version_details(self.state, record, self.ledger.objects),
                versions=self.versions,
                changes=self._changes(record),
                acts=[act for act in self.acts if record.version in act["versions"]],
                analysis=self.analysis(record),
                pairs=self.pairs(record),
            )
        )

    def artifacts(self, version: int) -> Mapping[str, bytes]:
        """The report's files by path; no files if it cannot be made, or its version was purged."""
        if version in self.state.purged:
            return {}
        try:
            return _files(self.report(self.ledger.merged(version)))
        except RestitchError as error:
            warn(f"no report of version {version}: {error.message()}")
            return {}

    def _changes(self, record: MergedRecord) -> dict[str, Any] | None:
        """The differences from the version that was champion when this version was made."""
        made = next(
            (a for a in self.acts if a["kind"] == "merged" and record.version in a["versions"]),
            None,
        )
        before = None if made is None else made["champion"]
        if before is None or before in self.state.purged:
            return None
        return differences_of(self.ledger.objects, self.ledger.merged(before), record)

    def analysis(self, record: MergedRecord) -> dict[str, Any] | None:
        """The overlap of the masks; None if they cannot be read."""
        try:
            masks: dict[str, Any] = analyze(LineRef(self.state.spec, self.state.base), record)
        except RestitchError as error:  # the base, which is not in the store, may be away
            warn(f"the masks of version {record.version} are not compared: {error.message()}")
            return None
        return masks

    def pairs(self, record: MergedRecord) -> dict[str, Any] | None:
        """What pairs of members lose, if `restitch analyze --pairs` has measured it."""
        line = line_with_one_method(self.state, record)
        members = evaluated_members(record, members_of(self.state, record))
        try:
            return known_pairs(line, members)
        except RestitchError:  # the same as for the masks, which says it
            return None


def mirror(line: str, *, again: bool = False) -> bool:
    """Complete the projection of a line in MLflow, including reports.

    Args:
        line: the line's name.
        again: write everything again, also what is there.

    Returns:
        Whether it is complete.
    """
    reports = Reports(workspace().ledger(line, dropped=True))
    return complete_mlflow(line, reports.artifacts, again=again)


def write_report(line: str, version: str, out: Path) -> ReportOutcome:
    """Write the page and its plots to the folder `out`, or the page alone if it ends with `.html`.

    Raises:
        BadInput: there is no such version.
        Unavailable: the files cannot be written.
    """
    ledger, _, record = open_version(line, version)
    out = out.expanduser().absolute()
    files = _files(Reports(ledger).report(record))
    if out.suffix.lower() == ".html":
        files, out = {out.name: files[PAGE]}, out.parent
    for name, data in files.items():
        _write(out / name, data)
    return ReportOutcome(line, record.version, str(out), tuple(files))


def _files(report: Report) -> dict[str, bytes]:
    plots = {f"{PLOTS}/{name}": data for name, data in report.plots.items()}
    return {PAGE: report.html.encode(), **plots}


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
