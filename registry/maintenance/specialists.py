"""The specialists that merged versions keep, read from their keys alone.

`flows.research.experts` publishes the specialists of a version under its recipe. The key holds
what `status` and `show` print, so that they open no blob; its blob is the list of the parts.
"""

from collections.abc import Iterable
from typing import Any

from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.store.objects import ObjectStore


def stored_specialists(objects: ObjectStore, recipes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The stored specialists of versions, by the digests of their recipes.

    Returns:
        For each recipe that has specialists: their method with version and settings, bytes by
        part, when and by whom they were made, and the digest of their list.

    Raises:
        Damage: a key cannot be read.
    """
    stored = {name.rpartition("/")[2] for name in objects.store.list(f"keys/{SPECIALISTS}")}
    specialists = {}
    for recipe in stored.intersection(recipes):
        key = objects.lookup(SPECIALISTS, recipe)
        if key is not None:
            known: dict[str, Any] = {"settings": {}, "bytes": {}, "made_at": None, **key.facts}
            specialists[recipe] = {**known, "manifest": key.blob, "made_by": key.made_by}
    return specialists
