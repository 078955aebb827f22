"""Compare two stored evaluations row by row."""

import json

from restitch.modeling.significance import Paired, compare_rows, rows_of
from restitch.registry.ledger.records import Retention, TaskResult
from restitch.registry.store.objects import ObjectStore

Result = TaskResult | Retention


def compare_results(
    objects: ObjectStore, first: Result | None, second: Result | None
) -> Paired | None:
    """Compare the second result of a merged model with the first on the same rows.

    None if either was not measured, if the rows differ, or if the metric is not accuracy.
    """
    if first is None or second is None:
        return None
    if first.data is None or second.data is None or not _is_share(first, second):
        return None
    if first.data.digest != second.data.digest:
        return None
    digests = first.evaluations.get("merged"), second.evaluations.get("merged")
    if None in digests:
        return None
    one, other = (rows_of(json.loads(objects.read_blob(str(digest)))) for digest in digests)
    return compare_rows(one, other) if len(one) == len(other) else None


def _is_share(*results: Result) -> bool:
    return all(isinstance(r, Retention) or r.metric == "accuracy" for r in results)
