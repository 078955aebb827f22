"""Compare two stored evaluations row by row."""

import json
from typing import Literal

from restitch.modeling.evaluation import Evaluation
from restitch.modeling.significance import Paired
from restitch.registry.ledger.records import Retention, TaskResult
from restitch.registry.specs.metric import METRICS
from restitch.registry.store.objects import ObjectStore

Result = TaskResult | Retention
Verdict = Literal["better", "worse", "same"]


def compare_results(
    objects: ObjectStore, first: Result | None, second: Result | None
) -> Paired | None:
    """Compare the second result of a merged model with the first on the same rows.

    None if either was not measured, or if the rows or the metrics differ.
    """
    if first is None or second is None or first.metric != second.metric:
        return None
    if first.data is None or second.data is None or first.data.digest != second.data.digest:
        return None
    digests = first.evaluations.get("merged"), second.evaluations.get("merged")
    if None in digests:
        return None
    one, other = (read_evaluation(objects, str(digest)) for digest in digests)
    return one.rows.compare(other.rows) if one.count == other.count else None


def read_evaluation(objects: ObjectStore, digest: str) -> Evaluation:
    """A stored evaluation."""
    return Evaluation.from_json(json.loads(objects.read_blob(digest)))


def verdict_of(pairs: Paired, metric: str) -> Verdict:
    """`better` or `worse` if chance alone would rarely make the difference."""
    if not pairs.is_significant:
        return "same"
    return "better" if METRICS[metric].is_better(pairs.difference) else "worse"
