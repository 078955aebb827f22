"""Compare two merged versions of a line: members, settings, results, weights.

If both results were measured on the same rows, they are compared row by row, which gives the
difference an interval and a p-value.
"""

from collections import Counter
from typing import Any

from restitch.flows.audit.queries import member_changes
from restitch.merging.analysis.patches import count_differences
from restitch.merging.files.sparse import SparseFile
from restitch.merging.order import by_bytes
from restitch.modeling.tensor_location import place_of
from restitch.registry.ledger.records import MergedRecord, Retention, TaskResult, differences
from restitch.registry.ledger.versions import find_version
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.compare_results import compare_results, verdict_of
from restitch.tasks.runtime.workspace import workspace


def diff(line: str, a: str, b: str) -> dict[str, Any]:
    """Compare version `b` with version `a`.

    Raises:
        BadInput: there is no such version.
    """
    ledger = workspace(to_write=False).ledger(line, dropped=True)
    line_state = ledger.state()
    first, second = (ledger.merged(find_version(line_state, version)) for version in (a, b))
    return differences_of(ledger.objects, first, second)


def differences_of(
    objects: ObjectStore, first: MergedRecord, second: MergedRecord
) -> dict[str, Any]:
    """All differences of two versions of a line."""
    tasks = sorted({*first.results, *second.results}, key=by_bytes)
    changes = member_changes(first, second)
    results = []
    for task in tasks:
        row = _compared(objects, first.results.get(task), second.results.get(task))
        for change in ("joined", "left"):
            if task in changes[change]:
                row["verdict"] = change
        results.append({"task": task, **row})
    retention, benchmark = None, first.retention or second.retention
    if benchmark is not None:
        compared = _compared(objects, first.retention, second.retention)
        retention = {"task": benchmark.task, **compared}
    return {
        "line": first.line,
        "a": first.version,
        "b": second.version,
        "members": changes,
        "settings": _settings(first, second),
        "results": results,
        "retention": retention,
        "weights": _weights(objects, first, second),
    }


def _settings(first: MergedRecord, second: MergedRecord) -> list[list[Any]]:
    """[path, old, new] of every difference of the recipes except the members."""
    old, new = (
        {key: value for key, value in record.recipe.items() if key != "members"}
        for record in (first, second)
    )
    before, after = differences(old, new)
    paths = sorted({*before, *after})
    return [[p.lstrip("/").replace("/", "."), before.get(p), after.get(p)] for p in paths]


def _compared(
    objects: ObjectStore,
    first: TaskResult | Retention | None,
    second: TaskResult | Retention | None,
) -> dict[str, Any]:
    one, other = _value(first), _value(second)
    pairs = compare_results(objects, first, second)
    verdict: str = "unknown"
    if pairs is not None and second is not None:
        verdict = verdict_of(pairs, second.metric)
    return {
        "a": one,
        "b": other,
        "difference": None if one is None or other is None else other - one,
        "interval": None if pairs is None else {"low": pairs.low, "high": pairs.high},
        "p_value": None if pairs is None else pairs.p_value,
        "gained": None if pairs is None else pairs.gained,
        "lost": None if pairs is None else pairs.lost,
        "rows": None if pairs is None else pairs.rows,
        "verdict": verdict,
    }


def _value(result: TaskResult | Retention | None) -> float | None:
    if result is None:
        return None
    return result.value if isinstance(result, Retention) else result.merged


def _weights(objects: ObjectStore, first: MergedRecord, second: MergedRecord) -> dict[str, Any]:
    """The number of weights that differ, by layer and by component."""
    patches = [SparseFile.open(objects.blob_path(record.patch)) for record in (first, second)]
    by_tensor = count_differences(*patches)
    layers: Counter[str] = Counter()
    components: Counter[str] = Counter()
    for name, count in by_tensor.items():
        place = place_of(name)
        tower = "" if place.tower is None else f"{place.tower} "
        layers[f"{tower}{'other' if place.layer is None else place.layer}"] += count
        components[place.component] += count
    touched = {name: patch.info(name).numel for patch in patches for name in patch.names}
    return {
        "differ": sum(by_tensor.values()),
        "of": sum(touched.values()),
        "by_layer": dict(sorted(layers.items(), key=lambda item: _layer_order(item[0]))),
        "by_component": dict(sorted(components.items())),
        "by_tensor": dict(sorted(by_tensor.items(), key=lambda item: by_bytes(item[0]))),
    }


def _layer_order(label: str) -> tuple[str, int]:
    tower, _, number = label.rpartition(" ")
    return tower, int(number) if number.isdigit() else 1 << 30
