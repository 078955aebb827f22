"""The report of a merged version: everything that is known of it, on one page.

It is derived from the store alone, so it can be made again at any time. Whatever changes a
line writes the reports of the versions that this was about to their runs in MLflow; `write_report`
writes one to a folder.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from restitch.flows.audit import queries
from restitch.flows.audit.diff import differences_of, weights_of
from restitch.flows.promotion.versions import find_version
from restitch.merging.errors import RestitchError
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.store.disk import explained
from restitch.tasks.publish import mirror as complete_mlflow
from restitch.tasks.report import Report, ReportInput, render
from restitch.tasks.research.mask_analysis import analyze
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

PAGE, PLOTS = "report.html", "plots"


@dataclass(frozen=True)
class ReportOutcome:
    """What was written."""

    line: str
    version: int
    out: str
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Reports:
    """The reports of a line, as it is at one moment.

    Args:
        ledger: the line.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @cached_property
    def state(self) -> LineState:
        """The line's head."""
        return self.ledger.state()

    @cached_property
    def acts(self) -> list[dict[str, Any]]:
        """All acts, newest first."""
        found: list[dict[str, Any]] = queries.history(self.ledger.line, queries.Wanted())["acts"]
        return found

    @cached_property
    def versions(self) -> list[dict[str, Any]]:
        """All merged versions, newest first."""
        found: list[dict[str, Any]] = queries.versions(self.ledger.line)["versions"]
        return found

    def report(self, version: int) -> Report:
        """The report of a merged version."""
        record = self.ledger.merged(version)
        return render(
            ReportInput(
                version=queries.whole(self.state, record, self.ledger.objects),
                versions=self.versions,
                changes=self._changes(record),
                acts=[act for act in self.acts if version in act["versions"]],
                analysis=self.analysis(record),
            )
        )

    def artifacts(self, version: int) -> Mapping[str, bytes]:
        """The report's files by path; none where it cannot be made."""
        try:
            return _files(self.report(version))
        except RestitchError as error:
            warn(f"no report of version {version}: {error.message()}")
            return {}

    def _changes(self, record: MergedRecord) -> dict[str, Any] | None:
        """What this version has otherwise than the champion of the time when it was made."""
        made = next(
            (a for a in self.acts if a["kind"] == "merged" and record.version in a["versions"]),
            None,
        )
        before = None if made is None else made["champion"]
        if before is None:
            return None
        objects, old = self.ledger.objects, self.ledger.merged(before)
        return {
            "line": record.line,
            "a": before,
            "b": record.version,
            **differences_of(objects, old, record),
            "weights": weights_of(objects, old, record),
        }

    def analysis(self, record: MergedRecord) -> dict[str, Any] | None:
        """What the masks have in common; None where they cannot be read now."""
        try:
            found: dict[str, Any] = analyze(LineRef(self.state.spec, self.state.base), record)
        except RestitchError as error:  # the base may be away; all else is in the store
            warn(f"the masks of version {record.version} are not compared: {error.message()}")
            return None
        return found


def mirror(line: str) -> bool:
    """Write to MLflow what is missing there, reports included.

    Returns:
        Whether the image is complete.
    """
    return complete_mlflow(line, Reports(workspace().ledger(line)).artifacts)


def write_report(line: str, version: str, out: Path) -> ReportOutcome:
    """Write the page and its plots.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        out: a folder, or a file that ends with `.html` for the page alone.

    Raises:
        BadInput: there is no such version.
        Unavailable: nothing can be written there.
    """
    ledger = workspace().ledger(line)
    number = find_version(ledger.state(), version)
    out = out.expanduser().absolute()
    files = _files(Reports(ledger).report(number))
    if out.suffix.lower() == ".html":
        files, out = {out.name: files[PAGE]}, out.parent
    for name, data in files.items():
        _write(out / name, data)
    return ReportOutcome(line, number, str(out), tuple(files))


def _files(report: Report) -> dict[str, bytes]:
    plots = {f"{PLOTS}/{name}": data for name, data in report.plots.items()}
    return {PAGE: report.html.encode(), **plots}


def _write(path: Path, data: bytes) -> None:
    """A file that is whole or the one before."""
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
