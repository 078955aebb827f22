"""What a run leaves in Prefect for people to read: Markdown per run, progress of long steps.

Outside of a flow run nothing happens. Artifacts are for the eye: whatever they say is in
the store, so an artifact that cannot be written is only a line in the log.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from restitch.merging.progress import Progress, ignore
from restitch.tasks.runtime.console import LogReporter
from restitch.tasks.runtime.events import this_run

# Work that is done sooner needs no bar; and a bar that moves every second is enough.
SHOW_AFTER_SECONDS, EVERY_SECONDS = 2.0, 1.0

log = logging.getLogger("restitch")


def show_onboarded(found: Mapping[str, Any]) -> None:
    """The table of an onboarding: state, grafted accuracy, density, size of the delta."""
    if this_run() is None:
        return
    facts = found["facts"]
    rows = [("state", found["state"])]
    if found["reason"]:
        rows.append(("reason", found["reason"]))
    if "density" in facts:
        rows += [
            ("localizer", facts["localizer"]),
            ("density", f"{facts['density']:.4%} ({facts['kept']} of {facts['coordinates']})"),
            ("delta", f"{facts['delta_bytes']} bytes"),
            ("changed outside of masks", f"{facts['outside_share']:.2%}"),
        ]
    if "statistics" in facts:
        kinds = ", ".join(facts["statistics"])
        took = f"{facts['statistics_bytes']} bytes in {facts['statistics_seconds']} s"
        rows.append(("statistics", f"{kinds}: {took}"))
    by = facts.get("localized_by") or {}
    rows += [(name, str(value)) for name, value in by.items()]
    text = f"# {found['line']}: {found['task']} version {found['version']}\n\n"
    text += table(("what", "value"), rows)
    results = facts.get("results", {})
    if results:
        text += "\n\n" + table(
            ("weights", "accuracy", "95 %", "rows"),
            [
                (name, f"{r['value']:.4f}", f"{r['low']:.4f} to {r['high']:.4f}", str(r["count"]))
                for name, r in results.items()
            ],
        )
    _markdown(f"onboard-{found['line']}-{found['task']}", text, "what became of the model")


def show_remerged(found: Mapping[str, Any], link: str | None) -> None:
    """The table of a remerge: what changed, every task, retention, gates."""
    if this_run() is None:
        return
    line, record = found["line"], found["record"]
    text = f"# {line}: {found['action']}, champion {found['champion'] or 'none'}\n\n"
    if record is not None:
        members = ", ".join(f"{task} {m['version']}" for task, m in record["members"].items())
        text += f"Version {record['version']}: {members}."
        text += f" [Its run in MLflow]({link}).\n\n" if link else "\n\n"
        text += _results(record)
        gates = [f"- {'passed' if g['passed'] else 'FAILED'}: {g['note']}" for g in record["gates"]]
        text += "\n\n" + ("\n".join(gates) or "No gates.")
    held = [f"- held {model}: {'; '.join(why)}" for model, why in found["held"].items()]
    _markdown(f"remerge-{line}", text + "\n\n" + "\n".join(held), "what the remerge did")


def _results(record: Mapping[str, Any]) -> str:
    rows = [
        (task, *(_number(r[k]) for k in ("base", "finetuned", "grafted", "merged", "normalized")))
        for task, r in record["results"].items()
    ]
    text = table(("task", "base", "finetuned", "grafted", "merged", "normalized"), rows)
    kept = record["retention"]
    if kept is not None:
        text += (
            f"\n\nRetention on {kept['task']}: top-1 {kept['top1']:.4f}, base "
            f"{kept['base_top1']:.4f}, ratio {kept['ratio']:.4f}"
            f"{_ends(kept['ratio_interval'])} ({kept['count']} rows)."
        )
    return text


def table(line_state: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [line_state, ["---"] * len(line_state), *rows]
    return "\n".join(
        "| " + " | ".join(one.replace("|", "\\|").replace("\n", " ") for one in line) + " |"
        for line in lines
    )


def _ends(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f" (95 %: {interval['low']:.4f} to {interval['high']:.4f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _markdown(key: str, text: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    try:
        # Names have underscores, keys must not.
        create_markdown_artifact(text, key=key.replace("_", "-"), description=description)
    except Exception as error:  # nothing is lost with it
        log.warning("the artifact %s was not written: %s", key, error)


class RunReporter(LogReporter):
    """Writes to the log of the run, and shows long work as a progress artifact."""

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """A bar in Prefect once the work has taken two seconds."""
        if this_run() is None:
            yield ignore
            return
        log.info("%s", title)
        began = shown_at = time.monotonic()
        bar: Any = None

        def report(done: int, total: int) -> None:
            nonlocal bar, shown_at
            now = time.monotonic()
            if now - began < SHOW_AFTER_SECONDS or now - shown_at < EVERY_SECONDS:
                return
            shown_at = now
            bar = _progress(bar, title, 100 * done / max(total, 1))

        yield report
        if bar is not None:
            _progress(bar, title, 100.0)


def _progress(bar: Any, title: str, percent: float) -> Any:
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    try:
        if bar is None:
            return create_progress_artifact(percent, description=title)
        update_progress_artifact(bar, percent)
    except Exception as error:  # nothing is lost with it
        log.warning("the progress of %s was not shown: %s", title, error)
    return bar
