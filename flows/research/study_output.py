"""The outcome of a study of a line: files in the user's folder, and a run in MLflow."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from restitch.flows.outcome import Outcome
from restitch.merging.digests import canonical_json, digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.mlflow.projection import StudyPart
from restitch.registry.store.disk import explained
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.workspace import actor, workspace


@dataclass(frozen=True, kw_only=True)
class StudyOutcome(Outcome):
    """The fields that all studies of a line share.

    Attributes:
        members: the version of each task's finetuned model.
    """

    line: str
    members: dict[str, int]
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    actor: str = field(default_factory=actor)


def publish_study(
    outcome: StudyOutcome,
    title: str,
    out: str | None,
    *,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Mapping[str, bytes],
    parts: Sequence[StudyPart] = (),
) -> None:
    """Write `<name>.json` and the artifacts to the folder `out`, and show them as a run in MLflow.

    Each part has a run below it.

    Raises:
        Unavailable: the folder cannot be written to. If MLflow is away, there is only a warning.
    """
    values = outcome.as_dict()
    files = {f"{name}.json": canonical_json(values), **artifacts}
    if out is not None:
        folder = Path(out)
        with explained(folder, "write to"):
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
    try:
        workspace().mlflow.show_study(
            outcome.line,
            title,
            digest=digest_json(values),
            by=outcome.actor,
            params=params,
            metrics=metrics,
            artifacts=files,
            parts=parts,
        )
    except Unavailable as error:
        warn(f"the study is not in MLflow: {error.message()}")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as comma-separated values; a value that was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
