"""Artifacts in Prefect: a Markdown summary per run, and progress bars of long steps.

All that they show is in the store, so a failure to write one is only a warning in the log. Outside
of flow runs, summaries are not written.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from restitch.merging.errors import shortlist
from restitch.merging.progress import Progress
from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.measurements import (
    Acceptance,
    Gain,
    ResultRef,
    compared,
    decisions,
    density_word,
    unexpected,
)
from restitch.tasks.runtime.console import Reporter
from restitch.tasks.runtime.events import this_run

SHOW_AFTER_SECONDS, UPDATE_SECONDS = 2.0, 1.0

log = logging.getLogger("restitch")


def show_onboarded(outcome: Mapping[str, Any]) -> None:
    """Summarize an onboarding: the model's state, its mask and its results."""
    if this_run() is None:
        return
    facts = outcome["facts"]
    rows = [("state", outcome["state"])]
    if outcome["reason"]:
        rows.append(("reason", outcome["reason"]))
    if "density" in facts:
        rows += [
            ("localizer", facts["localizer"]),
            (
                density_word(facts["localizer"]),
                f"{facts['density']:.4%} ({facts['kept']} of {facts['coordinates']})",
            ),
            ("delta", f"{facts['delta_bytes']} bytes"),
            ("change outside of localizable tensors", f"{facts['outside_share']:.2%}"),
        ]
    if "statistics" in facts:
        kinds = ", ".join(facts["statistics"])
        cost = f"{facts['statistics_bytes']} bytes in {facts['statistics_seconds']} s"
        rows.append(("statistics", f"{kinds}: {cost}"))
    for key, title in (("unused", "not used"), ("from_base", "taken from the base")):
        if group := facts.get(key):
            names = shortlist(group["names"])
            rows.append((title, f"{group['count']} tensors ({group['share']:.2%}): {names}"))
    rows += [("note", note) for note in facts.get("notes", ())]
    by = facts.get("localized_by") or {}
    rows += [(name, str(value)) for name, value in by.items()]
    text = f"# {outcome['line']}: {outcome['task']} version {outcome['version']}\n\n"
    text += table(("field", "value"), rows)
    results = facts.get("results", {})
    if "gain" in facts:
        measured = {name: ResultRef.model_validate(one) for name, one in results.items()}
        gain = Gain.model_validate(facts["gain"])
        text += f"\n\nThe model is {gain.verdict} than the base: {compared(gain, measured)}."
        if "accepted" in facts:
            accepted = {k: Acceptance.model_validate(one) for k, one in facts["accepted"].items()}
            text += f"\n\nDecided by people: {decisions(accepted)}."
        if contradiction := unexpected(facts.get("expected"), measured["finetuned"]):
            text += f"\n\nNot as expected: {contradiction}."
    if results:
        text += "\n\n" + table(
            ("weights", "accuracy", "95 %", "rows"),
            [
                (name, f"{r['value']:.4f}", f"{r['low']:.4f} to {r['high']:.4f}", str(r["count"]))
                for name, r in results.items()
            ],
        )
    _markdown(f"onboard-{outcome['line']}-{outcome['task']}", text, "outcome of the onboarding")


def show_remerged(outcome: Mapping[str, Any], link: str | None) -> None:
    """Summarize a remerge: the champion, results by task, retention, gates and held models."""
    if this_run() is None:
        return
    line, record = outcome["line"], outcome["record"]
    text = f"# {line}: {outcome['action']}, champion {outcome['champion'] or 'none'}\n\n"
    if record is not None:
        members = ", ".join(f"{task} {m['version']}" for task, m in record["members"].items())
        text += f"Version {record['version']}: {members}."
        text += f" [Its run in MLflow]({link}).\n\n" if link else "\n\n"
        text += _results(record)
        outcomes = [GateOutcome.model_validate(gate) for gate in record["gates"]]
        gates = [f"- {gate.verdict}: {gate.note}" for gate in outcomes]
        text += "\n\n" + ("\n".join(gates) or "No gates.")
    more = [f"- held {model}: {'; '.join(reasons)}" for model, reasons in outcome["held"].items()]
    more += [f"- no new mask of {model}: {why}" for model, why in outcome["missing"].items()]
    more += [f"- warning: {warning}" for warning in outcome["warnings"]]
    _markdown(f"remerge-{line}", text + "\n\n" + "\n".join(more), "outcome of the remerge")


def _results(record: Mapping[str, Any]) -> str:
    rows = [
        (task, *(_number(r[k]) for k in ("base", "finetuned", "grafted", "merged")), _normalized(r))
        for task, r in record["results"].items()
    ]
    text = table(("task", "base", "finetuned", "grafted", "merged", "normalized"), rows)
    retention = record["retention"]
    if retention is not None:
        text += (
            f"\n\nRetention on {retention['task']}: {retention['metric']} {retention['value']:.4f},"
            f" base {retention['base']:.4f}, ratio {_number(retention['ratio']) or 'unknown'}"
            f"{_interval(retention['ratio_interval'])} ({retention['count']} rows)."
        )
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def _interval(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f" (95 %: {interval['low']:.4f} to {interval['high']:.4f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _normalized(result: Mapping[str, Any]) -> str:
    gain = result["gain"]
    without = gain is not None and gain["verdict"] != "better"
    return f"{gain['verdict']} than the base" if without else _number(result["normalized"])


def _markdown(key: str, text: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    try:
        # Names may have underscores, keys must not.
        create_markdown_artifact(text, key=key.replace("_", "-"), description=description)
    except Exception as error:  # the store has all that it would show
        log.warning("could not write the artifact %s: %s", key, error)


class RunReporter(Reporter):
    """Writes to the run's log, and shows long work as progress artifacts; workers install it."""

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """Show a progress artifact once the work has taken two seconds."""
        log.info("%s", title)
        began = shown_at = time.monotonic()
        bar: Any = None

        def report(done: int, total: int) -> None:
            nonlocal bar, shown_at
            now = time.monotonic()
            if now - began < SHOW_AFTER_SECONDS or now - shown_at < UPDATE_SECONDS:
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
    except Exception as error:  # the store has all that it would show
        log.warning("could not show the progress of %s: %s", title, error)
    return bar
