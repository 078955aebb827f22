"""Where a study of a line is put: a folder of the user's, and a run in MLflow.

What it found is printed and returned without either, and is made again from the store.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.registry.store.disk import explained
from restitch.tasks.runtime.console import warn
from restitch.tasks.runtime.workspace import workspace


def write_study(out: str | None, artifacts: Mapping[str, bytes]) -> None:
    """Write the files of a study to a folder, where one is named.

    Raises:
        Unavailable: it cannot be written to.
    """
    if out is None:
        return
    folder = Path(out)
    with explained(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in artifacts.items():
            (folder / name).write_bytes(data)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table of comma-separated values; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def log_study(
    found: Mapping[str, Any],
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Mapping[str, bytes],
) -> None:
    """Show a study as a run in MLflow; where that is away, it is said and nothing else."""
    try:
        workspace().catalog.show_study(
            str(found["line"]),
            name,
            digest=digest_json(found),
            by=str(found["actor"]),
            params=params,
            metrics=metrics,
            artifacts=artifacts,
        )
    except Unavailable as error:
        warn(f"the study is not in MLflow: {error.message()}")
