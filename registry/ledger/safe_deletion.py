"""Removing objects while others work, so that no act ever counts whose objects are gone.

Whoever removes announces what (`restitch.registry.store.deletion_notice`), then swaps every head once, then looks
again at what is referred to. An act that had looked at its head before that loses its swap and
looks again; one that looks later finds the announcement, waits, and compares what it is about
to name with what is there. So either the removal sees the reference, or the act sees the
removal: neither needs the other to be quick. Where nothing was ever removed, an act costs one
look more.
"""

from contextlib import suppress

from restitch.merging.errors import Damage
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.ledger.references import Reference, of_line_state, of_manifest, of_record
from restitch.registry.store.deletion_notice import check_not_deleted, has_notice
from restitch.registry.store.objects import ObjectStore, parsed


def check_references(objects: ObjectStore, old: LineState | None, new: LineState) -> None:
    """Make sure that what a head would name and the one before did not is there, and stays.

    Raises:
        Unavailable: something was removed meanwhile, or is being removed all the time.
    """
    if not has_notice(objects.store):
        return
    before = {each.digest for each in of_line_state(old)} if old is not None else set()
    added = [each for each in of_line_state(new) if each.digest not in before]
    check_not_deleted(objects.store, {f"blobs/{each}" for each in _whole(objects, added) - before})


def _whole(objects: ObjectStore, added: list[Reference]) -> set[str]:
    """The digests of references, and of what records and lists of files name in turn."""
    digests = set()
    for each in added:
        digests.add(each.digest)
        with suppress(Damage, ValueError):  # what is gone is found to be so anyway
            if each.role == "record":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_record(parsed(MergedRecord, data, each.digest))}
            elif each.role == "manifest":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_manifest(data, each)}
    return digests
