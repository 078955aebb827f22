"""The model card of an export: what it is, what is in it, what it scored, how to check it."""

from collections.abc import Sequence
from typing import Any

import yaml

from registry.head import Head
from registry.history import MergedRecord, TaskResult

Rows = Sequence[tuple[str, ...]]


def model_card(head: Head, record: MergedRecord) -> str:
    """The README.md of an exported version, Markdown with the hub's front matter."""
    parts = [
        _front_matter(head),
        f"# {record.line}, version {record.version}",
        _summary(head, record),
        "## Results",
        _results(record),
        _retention(record),
        "## Members",
        _table(
            ("task", "version", "finetuned model", "weights", "delta"),
            [
                (task, str(m.version), f"`{m.uri}`", f"`{m.weights[:16]}`", f"`{m.delta[:16]}`")
                for task, m in record.members.items()
            ],
        ),
        "## Recipe",
        f"Recipe `{record.recipe_digest}`, patch `{record.patch}` on base "
        f"`{head.base.weights}`. The merged weights are a function of the recipe alone: "
        f"`restitch export {record.line} {record.version} OUT` writes them again, byte for byte. "
        "All details are in `restitch.json`.",
        _settings(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(head: Head) -> str:
    fields: dict[str, Any] = {"tags": ["model-merging", "restitch"]}
    if not head.base.uri.startswith("/"):
        fields["base_model"] = head.base.uri.partition("@")[0]
    return "---\n" + yaml.safe_dump(fields, sort_keys=True) + "---"


def _summary(head: Head, record: MergedRecord) -> str:
    tasks = ", ".join(record.members) or "no task"
    return (
        f"A merged model that holds the skills of {len(record.members)} finetuned models "
        f"({tasks}), stitched from their sparse masks onto `{head.base.uri}` by restitch. "
        f"{record.kept:,} weights differ from the base. Made {record.created_at[:19]} UTC."
    )


def _results(record: MergedRecord) -> str:
    rows = [
        (task, *(_number(value) for value in _values(result)), _interval(result))
        for task, result in record.results.items()
    ]
    head = ("task", "base", "finetuned", "grafted", "merged", "normalized", "95 % interval")
    return _table(head, rows)


def _values(result: TaskResult) -> tuple[float | None, ...]:
    return (result.base, result.finetuned, result.grafted, result.merged, result.normalized)


def _retention(record: MergedRecord) -> str:
    kept = record.retention
    if kept is None:
        return ""
    return (
        f"Zero-shot top-1 on `{kept.task}` ({kept.count} rows): {kept.top1:.4f}, "
        f"base {kept.base_top1:.4f}, retention {kept.ratio:.4f}."
    )


def _settings(record: MergedRecord) -> str:
    return _table(("software", "version"), list(record.software.items()))


def _table(head: tuple[str, ...], rows: Rows) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(result: TaskResult) -> str:
    if result.interval is None:
        return ""
    return f"{result.interval.low:.4f} to {result.interval.high:.4f}"
