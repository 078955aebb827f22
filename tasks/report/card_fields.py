"""The front matter of a model card, which the hub reads: models, licences, data and results."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from restitch.modeling.licence import Licence
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.redaction import without_credentials
from restitch.registry.specs.hub_id import is_hub_id, split_pin
from restitch.registry.specs.metric import MetricName
from restitch.tasks.report.provenance import Provenance

TAGS = ("merge", "model-merging", "restitch")

# What the hub calls the use of a model, by family: of the whole model, and of one for a task.
_PIPELINES = {
    "causal-lm": ("text-generation", "text-generation"),
    "clip": ("zero-shot-image-classification", "zero-shot-image-classification"),
    "image-classifier": ("image-feature-extraction", "image-classification"),
    "masked-lm": ("fill-mask", "fill-mask"),
    "seq2seq-lm": ("text2text-generation", "text2text-generation"),
    "text-classifier": ("feature-extraction", "text-classification"),
    "text-encoder": ("feature-extraction", "feature-extraction"),
}


def card_fields(
    line_state: LineState,
    record: MergedRecord,
    origin: Provenance,
    task: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """The front matter of a version's card, or of one of its models for a task.

    Args:
        line_state: the line.
        record: the version.
        origin: its provenance.
        task: the task that the model is for.
        more: fields that replace others; None leaves one out.
    """
    fields: dict[str, Any] = {"tags": list(TAGS), "library_name": "transformers"}
    pipeline = _PIPELINES.get(line_state.spec.family)
    if line_state.spec.space is not None:
        fields["library_name"] = "peft"
    if pipeline is not None:
        fields["pipeline_tag"] = pipeline[task is not None]
    members = record.members.values()
    if models := hub_models([line_state.base.uri, *(member.uri for member in members)]):
        fields |= {"base_model": models, "base_model_relation": "merge"}
    if data := _data_sets(record):
        fields["datasets"] = data
    fields["model-index"] = model_index(record, line_state.spec.family)
    fields |= _licence_fields([origin.base_licence, *origin.licences.values()])
    fields |= more or {}
    return front_matter({key: value for key, value in fields.items() if value is not None})


def model_index(
    record: MergedRecord, family: str, measured: str = "merged model"
) -> list[dict[str, Any]] | None:
    """The results of a version in the form of the hub; None without any.

    Args:
        record: the version, with the values to show as those of the merged model.
        family: of the line.
        measured: what has these values.
    """
    results = list(_results(record, family, measured))
    return [{"name": record.line, "results": results}] if results else None


def front_matter(fields: Mapping[str, Any]) -> str:
    """Fields as the hub reads them at the beginning of a card."""
    text = yaml.safe_dump(dict(fields), sort_keys=True, allow_unicode=True)
    return f"---\n{text}---"


def hub_models(sources: Iterable[str]) -> list[str]:
    """The names of those sources that are on the hub, each once, without their commits."""
    names = (split_pin(source)[0] for source in sources)
    on_hub = (name for name in names if is_hub_id(name) and "/" in name and ":" not in name)
    return list(dict.fromkeys(on_hub))


def _data_sets(record: MergedRecord) -> list[str]:
    """The data sets on the hub that the version was measured on."""
    used = [result.data for result in record.results.values()]
    used.append(None if record.retention is None else record.retention.data)
    paths = (split_pin(data.path)[0].partition(":")[0] for data in used if data is not None)
    return hub_models(paths)


def _results(record: MergedRecord, family: str, measured: str) -> Iterator[dict[str, Any]]:
    """The measured value of each task, and what the general benchmark says."""
    kind = _PIPELINES.get(family, ("", "other"))[1]
    for task, result in record.results.items():
        if result.merged is not None:
            data = None if result.data is None else result.data.path
            metrics = [_metric(result.metric, result.merged, measured)]
            yield _result(kind, task, data, result.split, metrics)
    retention = record.retention
    if retention is not None:
        metrics = [_metric(retention.metric, retention.value, measured)]
        if retention.ratio is not None:
            metrics.append(_metric("retention", retention.ratio, f"{measured} over base"))
        data = None if retention.data is None else retention.data.path
        split = None if retention.data is None else retention.data.split
        yield _result(kind, retention.task, data, split, metrics)


def _result(
    kind: str, task: str, data: str | None, split: str | None, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    name, _ = split_pin(data or task)
    on_hub = bool(hub_models([name.partition(":")[0]]))
    where = {"name": task, "type": name.partition(":")[0] if on_hub else task}
    if on_hub and ":" in name:
        where["config"] = name.partition(":")[2]
    if split is not None and "/" not in split:
        where["split"] = split
    return {"task": {"type": kind, "name": task}, "dataset": where, "metrics": metrics}


def _metric(kind: MetricName | str, value: float, name: str) -> dict[str, Any]:
    return {"type": kind, "value": round(value, 6), "name": f"{kind}, {name}"}


def _licence_fields(all_of_them: Sequence[Licence | None]) -> dict[str, str]:
    """The licence if all are known and equal, or `other`; unknown licences are not guessed."""
    known = {licence for licence in all_of_them if licence is not None}
    if not known:
        return {}
    if len(known) > 1 or None in all_of_them or len((only := known.pop()).ids) > 1:
        return {"license": "other", "license_name": "see-licences"}
    fields = {"license": only.ids[0]}
    if only.name is not None:
        fields["license_name"] = only.name
    if only.link is not None and "://" in only.link:  # a relative link would not work here
        fields["license_link"] = without_credentials(only.link)
    return fields
