"""The model card of an export: summary, results, members, lineage, licences and verification.

It is a pure function of the version's record and provenance. Text from others, such as reasons,
sources and licences, is escaped so that it never becomes markup.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from restitch.merging.adapters.checkpoint import WEIGHTS
from restitch.merging.digests import canonical_json
from restitch.modeling.licence import Licence
from restitch.registry.ledger.finetuned_models import State, TensorGroup
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import shortfall
from restitch.registry.ledger.records import MergedRecord, TaskResult
from restitch.registry.record import Interval
from restitch.registry.redaction import without_credentials
from restitch.registry.specs.metric import METRICS
from restitch.tasks.report.card_fields import (
    TAGS,
    card_fields,
    front_matter,
    hub_models,
    model_index,
)
from restitch.tasks.report.provenance import Provenance

# A path of this machine in a sentence; the group is its last part.
_LOCAL_PATH = re.compile(r"(?<![\w:/.~-])/(?:[^\s/`'\",;()|<>]+/)+([^\s/`'\",;()|<>]+)")
# The states of models that might have been merged.
_LEFT_OUT: tuple[State, ...] = ("registered", "waiting", "quarantined", "held", "retired", "ready")

# Keys of a record with the user, the host and the process that made something.
_PROCESSES = ("made_by", "localized_by")

Rows = Sequence[tuple[str, ...]]

_ADAPTER_COLUMNS = ("task", "metric", "merged version", "adapter", "rows")
_MARKUP = re.compile(r"([\\`*_\[\]<>|#~])")


def model_card(
    line_state: LineState,
    record: MergedRecord,
    origin: Provenance,
    task: str | None = None,
    use: str | None = None,
) -> str:
    """The README.md of an exported version, Markdown with the hub's front matter.

    Args:
        line_state: the line.
        record: the version.
        origin: its provenance.
        task: the one whose head the model has.
        use: lines of Python that load the model and ask it something.
    """
    parts = [
        card_fields(line_state, record, origin, task),
        f"# {record.line}, version {record.version}",
        _summary(line_state, record),
        _how_to_load(line_state),
        "" if task is None else f"This is the whole classifier with the head of `{task}`.",
        *_usage(use),
        "## Results",
        _results(record),
        _retention(record),
        _gates(record),
        "## Members",
        _members(record),
        "## Not merged",
        _not_merged(line_state, record),
        "## Lineage",
        _lineage(record, origin),
        "## Licences",
        _licences(line_state, record, origin),
        "## Recipe",
        _recipe(line_state, record),
        _table(("software", "version"), list(record.software.items())),
        "## How to verify it",
        _verification(_commands(record, task), line_state, origin),
    ]
    return _page(parts)


def specialist_card(
    line_state: LineState,
    record: MergedRecord,
    task: str,
    made: Mapping[str, Any],
    origin: Provenance,
    use: str | None = None,
) -> str:
    """The README.md of the specialist for one task of a merged version.

    `made` says how the specialists were made, as in `restitch.json`; `origin` has the digest of the
    specialist's weights, and `use` are lines of Python that load the model.
    """
    line, version = record.line, record.version
    command = f"restitch export {line} {version} OUT --task {task} --specialist"
    members = [
        (name, str(m.version), _source(m.uri), f"`{m.weights}`")
        for name, m in record.members.items()
    ]
    parts = [
        card_fields(line_state, record, origin, more={"model-index": None}),
        f"# {line}, version {version}: {task}",
        f"The specialist for `{task}`: {_source(line_state.base.uri)} plus those coordinates of "
        f"the multi-task vector of {len(record.members)} finetuned models that the task's mask "
        "selects. Use it for this task only.",
        _how_to_load(line_state),
        *_usage(use),
        "## Members",
        _table(("task", "version", "finetuned model", "weights"), members),
        "## Licences",
        _licences(line_state, record, origin),
        "## Recipe",
        f"All details are in `restitch.json`.\n\n```json\n{canonical_json(made).decode()}\n```",
        "## How to verify it",
        _verification(command, line_state, origin),
    ]
    return _page(parts)


def adapter_card(
    line_state: LineState,
    record: MergedRecord,
    made: Mapping[str, Any],
    origin: Provenance,
    use: str | None = None,
) -> str:
    """The README.md of a merged version as a LoRA adapter.

    Args:
        line_state: the line.
        record: the version.
        made: the outcome of the export: the share of the change that it holds, and its results.
        origin: its provenance.
        use: lines of Python that load the adapter.
    """
    own: dict[str, Any] = {"library_name": "peft", "tags": [*TAGS, "lora"]}
    own |= {"base_model": None, "base_model_relation": None}
    own["model-index"] = model_index(_as_measured(record, made), line_state.spec.family, "adapter")
    if base := hub_models([line_state.base.uri]):
        own |= {"base_model": base[0], "base_model_relation": "adapter"}
    results = [
        (task, each["metric"], *map(_number, (each["merged"], each["adapter"])), str(each["count"]))
        for task, each in (
            *made["results"].items(),
            *([("general benchmark", made["retention"])] if made["retention"] else []),
        )
    ]
    left_out = sum(made["left_out"].values())
    parts = [
        card_fields(line_state, record, origin, more=own),
        f"# {record.line}, version {record.version}, as an adapter",
        f"A LoRA adapter for {_source(line_state.base.uri)} with {made['parameters']:,} "
        f"parameters. It holds {made['kept']:.2%} of the squared norm of the version's change, "
        f"which merges {len(record.members)} finetuned models."
        + (f" It cannot hold {left_out:.2%}: biases, norms and the like." if left_out else ""),
        *_usage(use),
        *(["## Results", _table(_ADAPTER_COLUMNS, results)] if results else []),
        "## Members",
        _members(record),
        "## Licences",
        _licences(line_state, record, origin),
        "## Recipe",
        _recipe(line_state, record),
    ]
    return _page(parts)


def _as_measured(record: MergedRecord, made: Mapping[str, Any]) -> MergedRecord:
    """A version with the values that its adapter has."""
    results = {
        task: record.results[task].model_copy(update={"merged": each["adapter"]})
        for task, each in made["results"].items()
    }
    general, measured = record.retention, made["retention"]
    if general is not None and measured is not None:
        ratio = METRICS[general.metric].ratio(measured["adapter"], general.base)
        values = {"value": measured["adapter"], "ratio": ratio}
        general = general.model_copy(update=values)
    else:
        general = None
    return record.model_copy(update={"results": results, "retention": general})


def once_card(made: Mapping[str, Any]) -> str:
    """The README.md of a merge without a line; `made` is its outcome.

    Folders on the machine of the merge appear by their names alone.
    """
    settings = ", ".join(f"{key} {value}" for key, value in made["settings"].items())
    kept = ", ".join(f"{key} {value}" for key, value in made["localize"].items())
    models = [
        (task, _source(each["source"]), f"`{each['weights']}`", f"{each['outside_share']:.1%}")
        for task, each in made["models"].items()
    ]
    fields: dict[str, Any] = {"tags": list(TAGS), "library_name": "transformers"}
    sources = [made["base"]["source"], *(each["source"] for each in made["models"].values())]
    if hub := hub_models(sources):
        fields |= {"base_model": hub, "base_model_relation": "merge"}
    parts = [
        front_matter(fields),
        f"# {len(models)} models merged by {made['method']}",
        f"{_source(made['base']['source'])} with the changes of {len(models)} finetuned models, "
        f"merged by `{made['method']}` ({settings or 'no settings'}; kept of each model: {kept}) "
        f"in {made['tensors']} tensors. All other tensors are the base's.",
        _converted(made["dtype"], made["base_dtype"]),
        "## Models",
        _table(("task", "model", "weights", "change outside of the merged tensors"), models),
        "All details of the merge are in `restitch.json`.",
    ]
    return _page(parts)


def _converted(dtype: str, base_dtype: str) -> str:
    """What a merge into another type than the base's did; empty if it is the same type."""
    if dtype == base_dtype:
        return ""
    return (
        f"The weights are {dtype}, and those of the base {base_dtype}: each merged weight was "
        "computed in float32 (float64 for a base in float64) and rounded once, and each other "
        "weight of the base was rounded once."
    )


def _page(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(line_state: LineState, record: MergedRecord) -> str:
    tasks = ", ".join(record.members) or "no task"
    return (
        f"A merged model with the skills of {len(record.members)} finetuned models ({tasks}). "
        f"restitch stitched their sparse task vectors onto {_source(line_state.base.uri)}. "
        f"{record.kept:,} weights differ from the base. Created {_time(record.created_at)}."
    )


def _results(record: MergedRecord) -> str:
    rows = [
        (task, *_values(result), _interval(result.interval))
        for task, result in record.results.items()
    ]
    header = ("task", "base", "finetuned", "grafted", "merged", "normalized", "95 % interval")
    return _table(header, rows)


def _values(result: TaskResult) -> tuple[str, ...]:
    cells = []
    for name in ("base", "finetuned", "grafted", "merged", "normalized"):
        value, interval = getattr(result, name), result.intervals.get(name)
        cells.append(_number(value) + (f" ({_interval(interval)})" if interval else ""))
    if result.gain is not None and result.has_no_gain:
        cells[-1] = f"none: {result.gain.against_base}"
    return tuple(cells)


def _retention(record: MergedRecord) -> str:
    retention = record.retention
    if retention is None:
        return ""
    metric = retention.metric
    rows = [
        (f"merged, {metric}", _number(retention.value), _interval(retention.interval)),
        (f"base, {metric}", _number(retention.base), _interval(retention.base_interval)),
        ("retention", _number(retention.ratio), _interval(retention.ratio_interval)),
    ]
    return (
        f"General ability by {metric} on `{retention.task}` ({retention.count} rows): "
        f"{retention.value:.4f}, base {retention.base:.4f}, "
        f"retention {_number(retention.ratio)}.\n\n"
        + "".join(f"{note}.\n\n" for note in retention.notes)
        + _table(("general benchmark", "value", "95 % interval"), rows)
    )


def _gates(record: MergedRecord) -> str:
    rows = [
        (
            gate.gate,
            gate.task or "",
            _number(gate.value),
            f"{gate.limit:g}",
            gate.verdict if gate.passed else f"{gate.verdict} ({gate.action})",
        )
        for gate in record.gates
    ]
    losses = "\n".join(f"- {_plain(loss)}" for loss in record.losses)
    if not rows:
        return f"The line has no gates.\n\n{losses}".rstrip()
    table = _table(("gate", "task", "value", "limit", "outcome"), rows)
    return f"{table}\n\n{losses}".rstrip()


def _members(record: MergedRecord) -> str:
    rows = [
        (task, str(m.version), _source(m.uri), f"`{m.weights}`", f"`{m.mask}`", f"`{m.delta}`")
        for task, m in record.members.items()
    ]
    table = _table(("task", "version", "finetuned model", "weights", "mask", "delta"), rows)
    return f"{table}\n\n{_accounting(record)}".rstrip()


def _usage(use: str | None) -> list[str]:
    return [] if use is None else ["## Use", f"```python\n{use}```"]


def _not_merged(line_state: LineState, record: MergedRecord) -> str:
    """What of the members lies outside of the merged tensors, and which models are left out."""
    shares = [
        (task, f"{member.facts.outside_share:.2%}")
        for task, member in record.members.items()
        if member.facts.outside_share
    ]
    left_out = [
        (key.task, str(key.version), model.state, _plain(model.reason or ""))
        for key, model in line_state.in_state(*_LEFT_OUT)
        if key.task not in record.members or record.members[key.task].version != key.version
    ]
    parts = [
        "Only the tensors that the line selects are merged; all others, and heads that a finetuned "
        "model adds, are not part of the merge."
    ]
    if shares:
        head = ("task", "share of the finetuning's squared change outside of the merged tensors")
        parts.append(_table(head, shares))
    if left_out:
        parts.append("Models of the line that this version does not hold, when it was exported:")
        parts.append(_table(("task", "version", "state", "reason"), left_out))
    return "\n\n".join(parts)


def _accounting(record: MergedRecord) -> str:
    """What of the members' files is not in the merged model, or was inferred."""
    titles = (("unused", "not used"), ("from_base", "taken from the base"))
    rows = [
        (task, title, _tensors(group))
        for task, member in record.members.items()
        for key, title in titles
        if (group := getattr(member.facts, key)) is not None
    ]
    rows += [
        (task, "note", _plain(note))
        for task, member in record.members.items()
        for note in member.facts.notes
    ]
    rows += [
        (task, "shortfall", _plain(text))
        for task, member in record.members.items()
        if (text := shortfall(member.facts.recovery)) is not None
    ]
    return _table(("task", "tensors and files", "details"), rows) if rows else ""


def _tensors(group: TensorGroup) -> str:
    more = group.count - len(group.names)
    names = ", ".join(_plain(name) for name in group.names) + (f" and {more} more" if more else "")
    return f"{group.count} ({group.weights} weights, {group.share:.4%}): {names}"


def _lineage(record: MergedRecord, origin: Provenance) -> str:
    champion = (
        "there was no champion"
        if origin.parent is None
        else f"version {origin.parent} was champion"
    )
    text = f"When this version was created, {champion}."
    rows = [
        (_time(act.time), act.kind, _plain(act.actor), _plain(act.reason), f"`{act.digest[:16]}`")
        for act in origin.acts
    ]
    if not rows:
        return text
    acts = _table(("time", "act", "actor", "reason", "audit entry"), rows)
    return f"{text} Acts on it before this export:\n\n{acts}"


def _licences(line_state: LineState, record: MergedRecord, origin: Provenance) -> str:
    rows = [("base", _source(line_state.base.uri), _licence(origin.base_licence))]
    rows += [
        (task, _source(member.uri), _licence(origin.licences.get(task)))
        for task, member in record.members.items()
    ]
    return "As stated by the model cards of the base and the members.\n\n" + _table(
        ("model", "source", "licence"), rows
    )


def _recipe(line_state: LineState, record: MergedRecord) -> str:
    method = record.recipe.get("method")
    return (
        f"Recipe `{record.recipe_digest}`, patch `{record.patch}` on base "
        f"`{line_state.base.weights}`. The recipe alone determines the merged weights. "
        "All details are in `restitch.json`.\n\n"
        f"```json\n{canonical_json(method).decode()}\n```"
    )


def _commands(record: MergedRecord, task: str | None) -> str:
    line, version = record.line, record.version
    which = "" if task is None else f" --task {task}"
    return (
        f"restitch verify {line} --version {version}  # trail, digests, rebuilt patch\n"
        f"restitch export {line} {version} OUT{which}  # exports the same weights, byte for byte"
    )


def _how_to_load(line_state: LineState) -> str:
    """How to load an adapter; nothing for a whole model."""
    if line_state.spec.space is None:
        return ""
    return (
        "This folder is one (IA)³ adapter: its vectors are merged, the weights of the base are not "
        "in it. Load it with `PeftModel.from_pretrained(base, FOLDER)`."
    )


def _verification(commands: str, line_state: LineState, origin: Provenance) -> str:
    text = f"With access to the line's store:\n\n```sh\n{commands}\n```"
    if origin.weights is None:
        return text
    opened = "open(Path('.'))"
    if line_state.spec.space is not None:
        opened = f"from_files(Path('.'), {{'{WEIGHTS}': Path('{WEIGHTS}')}})"
    check = (
        'python -c "from pathlib import Path; '
        "from restitch.merging.files.checkpoint import Checkpoint; "
        f'print(Checkpoint.{opened}.digest())"'
    )
    return (
        f"{text}\n\nWithout the store, in this folder, with restitch installed:\n\n"
        f"```sh\n{check}\n```\n\nIt prints `{origin.weights}` (BLAKE3 over all tensors by name, "
        "independent of sharding)."
    )


def _licence(licence: Licence | None) -> str:
    return "unknown" if licence is None else _plain(without_credentials(str(licence)))


def _source(uri: str) -> str:
    # A folder of this machine means nothing elsewhere, so only its name is shown.
    uri = uri.rstrip("/").rpartition("/")[2] if uri.startswith("/") else uri
    # In inline code only backticks are markup, and in a table the pipe.
    text = " ".join(without_credentials(uri).split())
    return f"`{text.replace('`', '').replace('|', chr(92) + '|')}`"


def public(value: Any) -> Any:
    """A description without the places and processes of this machine."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items() if key not in _PROCESSES}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    return without_local_paths(value) if isinstance(value, str) else value


def without_local_paths(text: str) -> str:
    """A text in which a path of this machine is only the name at its end."""
    return _LOCAL_PATH.sub(lambda found: found[1], text)


def _plain(text: str) -> str:
    text = without_local_paths(text)
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _time(text: str) -> str:
    return f"{text[:19].replace('T', ' ')} UTC"


def _table(header: tuple[str, ...], rows: Rows) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
