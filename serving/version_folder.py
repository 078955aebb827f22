"""The complete Hugging Face folder of a merged version: base plus patch, verified and cached.

A folder appears when it is complete. Its weights have the same bytes as those of `restitch export`.
A version of a line with a space, whose export is an adapter, is the base with that adapter on it.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from restitch.merging.adapters.vectors import VectorEdits
from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput, RestitchError, Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import open_delta
from restitch.merging.files.edits import Edits
from restitch.merging.files.export import export_weights
from restitch.merging.progress import Progress
from restitch.modeling.families.family import Family, get_family
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.sources.resolve import cached_folder, discard_folder, resolve_source
from restitch.registry.sources.vectors import ones_of, vector_space
from restitch.registry.sources.verified import assets_digest, check_assets, verified_weights
from restitch.registry.store.objects import ObjectStore
from restitch.serving.served_version import ServedVersion

# The file of a cached folder with the digest of its weights.
_MARK = "restitch.cached.json"

log = logging.getLogger("restitch")


@dataclass(frozen=True)
class ServedBase:
    """The base of a version, opened and verified."""

    folder: Path
    checkpoint: Checkpoint
    family: Family


def open_served_base(version: ServedVersion) -> ServedBase:
    """Open the base of a version and check its digests.

    Raises:
        BadInput: it is missing or has changed.
        Unavailable: its source cannot be reached.
    """
    family = get_family(version.family)
    folder = resolve_source(version.base.uri, version.home).local
    checkpoint = verified_weights(folder, version.base.weights)
    names = family.asset_files(folder) if folder.is_dir() else ()
    check_assets(version.base, assets_digest(folder, names))
    return ServedBase(folder, checkpoint, family)


def open_patch(version: ServedVersion, base: ServedBase, objects: ObjectStore) -> Edits:
    """Open the patch of a version as edits of its base's weights.

    Raises:
        Damage: it is missing or damaged.
    """
    path = objects.blob_path(version.patch)
    if version.space is None:
        return open_delta(path, base.checkpoint)
    space = vector_space(version.space, base.checkpoint, version.base.uri)
    ones = ones_of(space, version.home)
    return VectorEdits(space, ones, open_delta(path, ones))


def copy_assets(base: Path, family: Family, out: Path) -> None:
    """Copy the base's configuration, tokenizer and processor into a folder."""
    if not base.is_dir():
        return
    for name in family.asset_files(base):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, out / name)


def write_version(version: ServedVersion, out: Path, progress: Progress | None = None) -> None:
    """Write a version into an existing folder, whose appearance is up to the caller.

    Raises:
        BadInput: the base is missing or has changed.
        Damage: the patch, a head or the record is missing or damaged; nothing was written.
        Unavailable: the store or the base cannot be reached.
    """
    objects = version.open_store()
    base = open_served_base(version)
    edits = open_patch(version, base, objects)
    record = Ledger(objects, version.line).record(version.record)
    heads = {
        task: objects.read_blob(known.head)
        for task, known in version.tasks.items()
        if known.head is not None
    }
    export_weights(base.checkpoint, edits, out, progress=progress)
    copy_assets(base.folder, base.family, out)
    text = json.dumps(record.to_json(), indent=2, ensure_ascii=False)
    (out / "restitch.json").write_text(text + "\n", encoding="utf-8")
    for task, data in heads.items():
        (out / "heads").mkdir(exist_ok=True)
        (out / "heads" / f"{task}.safetensors").write_bytes(data)


def version_folder(version: ServedVersion) -> Path:
    """A complete, verified folder of a version in the cache of this process's home.

    Its weights are compared with their digest on every call; a damaged folder is written again. If
    the store cannot be reached, a folder from before is used, with a warning that states its date.

    Raises:
        BadInput: the base is missing or has changed, or the version was purged.
        Damage: the patch is damaged; nothing was written.
        Unavailable: the store cannot be reached and there is no folder, or the disk is full.
    """
    name = digest_json([version.record, version.base.to_json(), version.patch, version.family])

    def build(building: Path) -> None:
        building.mkdir()
        write_version(version, building)
        mark = {"weights": Checkpoint.open(building).digest(), "written": time.time()}
        (building / _MARK).write_text(json.dumps(mark))

    home = version.home
    cached = home.cache / "sources" / name
    written = _intact_since(cached) if cached.is_dir() else None
    if cached.is_dir() and written is None:
        log.warning("the cached folder of %s is damaged: it is written again", version.name)
        discard_folder(name, home)
    elif written is not None:
        _check_store(version, written)
    return cached_folder(name, build, home)


def _intact_since(folder: Path) -> float | None:
    """When a cached folder was written; None if its weights have changed since."""
    try:
        mark = json.loads((folder / _MARK).read_bytes())
        if Checkpoint.open(folder).digest() == mark["weights"]:
            return float(mark["written"])
    except (OSError, ValueError, KeyError, TypeError, RestitchError):
        pass
    return None


def _check_store(version: ServedVersion, written: float) -> None:
    """Warn if the store of a cached version cannot be reached, and refuse one that was purged."""
    try:
        objects = version.open_store()
        gone = not objects.store.exists(f"blobs/{version.patch}")
    except Unavailable as error:
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(written))
        log.warning("%s; the folder of %s from %s UTC is used", error.summary, version.name, date)
        return
    if gone:
        raise BadInput(
            f"the patch of {version.name} is not in the store any more",
            expected=f"blobs/{version.patch} in {version.store}",
            hint="the version may have been purged: see "
            f"`restitch history {version.line} --versions`",
        )
