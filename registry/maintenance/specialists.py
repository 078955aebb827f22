"""Which merged versions have specialists, of which method and by whom: read from keys alone.

`restitch.flows.research.experts` names the specialists of a version under its recipe. What a reader asks first of
them stands in the key, so that `status` and `show` open no blob; the parts are in the list that the
key names.
"""

from collections.abc import Iterable
from typing import Any

from restitch.registry.ledger.references import SPECIALISTS
from restitch.registry.store.objects import ObjectStore


def stored_specialists(objects: ObjectStore, recipes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is kept of specialists, by the recipe of the version that has them.

    Args:
        objects: the store.
        recipes: digests of the versions' recipes.

    Returns:
        For those that have any: their method with version and settings, bytes by part, when and
        by whom they were made, and the digest of their list.

    Raises:
        Damage: a key is there and unreadable.
    """
    there = {name.rpartition("/")[2] for name in objects.store.list(f"keys/{SPECIALISTS}")}
    found = {}
    for recipe in there.intersection(recipes):
        key = objects.lookup(SPECIALISTS, recipe)
        if key is not None:
            known: dict[str, Any] = {"settings": {}, "bytes": {}, "made_at": None, **key.facts}
            found[recipe] = {**known, "manifest": key.blob, "made_by": key.made_by}
    return found
