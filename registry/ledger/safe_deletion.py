"""The check that lets `restitch gc` run while lines change: no act refers to a removed object.

The remover posts its notice (`store.deletion_notice`), then swaps the state of every line once,
then looks at the references again. An act that had read the line's state before loses its swap
and starts again; a later one finds the notice, waits, and checks that its objects exist. So
either the removal sees the reference, or the act sees the removal, however slow one of them is.
"""

from contextlib import suppress

from restitch.merging.errors import Damage
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.ledger.references import Reference, of_line_state, of_manifest, of_record
from restitch.registry.store.deletion_notice import check_not_deleted, has_notice
from restitch.registry.store.objects import ObjectStore, parsed


def check_references(objects: ObjectStore, old: LineState | None, new: LineState) -> None:
    """Make sure that the objects which a new state adds exist and stay.

    Raises:
        Unavailable: one of them was removed, or its removal did not end in time.
    """
    if not has_notice(objects.store):
        return
    before = {each.digest for each in of_line_state(old)} if old is not None else set()
    added = [each for each in of_line_state(new) if each.digest not in before]
    digests = _with_contents(objects, added) - before
    check_not_deleted(objects.store, {f"blobs/{digest}" for digest in digests})


def _with_contents(objects: ObjectStore, added: list[Reference]) -> set[str]:
    """The digests of references, and of what their records and manifests refer to."""
    digests = set()
    for each in added:
        digests.add(each.digest)
        with suppress(Damage, ValueError):  # the caller reports what is missing
            if each.role == "record":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_record(parsed(MergedRecord, data, each.digest))}
            elif each.role == "manifest":
                data = objects.read_blob(each.digest)
                digests |= {r.digest for r in of_manifest(data, each)}
    return digests
