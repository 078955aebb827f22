"""The provenance of an exported version: its lineage in the audit trail, and licences.

Licences are read from files at hand: a local folder, a copy in the store, or the hub's cache. The
hub and MLflow are never queried, so other licences are unknown.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, RestitchError
from restitch.modeling.licence import CARD, Licence, read_licence
from restitch.registry.access_policy import check_path
from restitch.registry.ledger.outcomes import merges_about, touched_merges
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.sources.resolve import COPY_SCHEME, MLFLOW_SCHEMES
from restitch.registry.specs.hub_id import is_hub_id, split_pin
from restitch.registry.store.objects import ObjectStore


@dataclass(frozen=True)
class Provenance:
    """Facts for the model card that are not in the record of the version.

    Attributes:
        parent: the champion when the version was made.
        acts: the acts about the version, oldest first.
        base_licence: None if unknown.
        licences: of the members by task; None if unknown.
        weights: the digest of the exported checkpoint.
    """

    parent: int | None = None
    acts: tuple[Entry, ...] = ()
    base_licence: Licence | None = None
    licences: Mapping[str, Licence | None] = field(default_factory=dict)
    weights: str | None = None


def provenance(
    base: str,
    record: MergedRecord,
    newest_first: Iterable[Entry],
    objects: ObjectStore,
    weights: str,
) -> Provenance:
    """Look up the provenance of a version in the line's audit trail, `newest_first`."""
    parent, acts = lineage(record.version, newest_first)
    licences = {task: licence_of(m.uri, objects) for task, m in record.members.items()}
    return Provenance(parent, acts, licence_of(base, objects), licences, weights)


def lineage(version: int, newest_first: Iterable[Entry]) -> tuple[int | None, tuple[Entry, ...]]:
    """The champion when a version was made, and the acts about the version, oldest first."""
    acts: list[Entry] = []
    made = False
    for entry in newest_first:
        if made and "/champion" in entry.after:
            before = entry.after["/champion"]
            return before if isinstance(before, int) else None, tuple(reversed(acts))
        if version in merges_about(entry):
            acts.append(entry)
        made = made or version in touched_merges(entry)
    return None, tuple(reversed(acts))


def licence_of(source: str, objects: ObjectStore) -> Licence | None:
    """The licence that a resolved source states, if its files are at hand."""
    if source.startswith("/"):
        # A card next to a single file may belong to something else.
        try:
            check_path(Path(source), "the model")
        except BadInput:
            return None
        return read_licence(Path(source)) if Path(source).is_dir() else None
    if source.startswith((COPY_SCHEME, *MLFLOW_SCHEMES)):
        try:
            return _in_store(source, objects)
        except (RestitchError, ValueError, KeyError, TypeError, AttributeError):
            return None  # a damaged copy is reported elsewhere, not by its licence
    name, revision = split_pin(source)
    if revision is None or not is_hub_id(name):
        return None
    return _in_hub_cache(name, revision)


def _in_store(source: str, objects: ObjectStore) -> Licence | None:
    manifest = source.removeprefix(COPY_SCHEME)
    if manifest == source:
        record = objects.lookup("source", digest_bytes(source.encode()))
        if record is None:
            return None
        manifest = record.blob
    files = json.loads(objects.read_blob(manifest))
    if CARD not in files["files"]:
        return None
    return read_licence(objects.blob_path(files["files"][CARD]))


def _in_hub_cache(name: str, revision: str) -> Licence | None:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        card = try_to_load_from_cache(name, CARD, revision=revision)
    except (errors.HFValidationError, OSError):
        return None
    return read_licence(Path(card)) if isinstance(card, str) else None
