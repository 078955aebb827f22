"""Sources of models: a path, a bucket, the hub or MLflow, pinned to the same content.

An existing local path comes first and is used in place. A folder in a bucket is read there, or
fetched whole into the cache, as an adapter always is. A hub id is pinned to its commit, and only
weights, configuration, tokenizer and processor files are fetched, into the hub's own cache. An
MLflow artifact is fetched once and put into the store, which any worker can read; a local model can
be copied there too. Nothing that is fetched is executed, and pickles are not fetched.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from restitch.merging.digests import digest_bytes, digest_json
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.shards import holds_adapter
from restitch.registry.access_policy import check_address, check_artifact, check_hub, check_path
from restitch.registry.home import Home
from restitch.registry.ledger.references import COPY_SCHEME as COPY_SCHEME
from restitch.registry.ledger.references import MLFLOW_SCHEMES as MLFLOW_SCHEMES
from restitch.registry.ledger.references import S3_SCHEME
from restitch.registry.paths import is_there, named_path
from restitch.registry.s3.settings import cache_limit
from restitch.registry.sources.bucket import S3Folder, check_small, list_folder
from restitch.registry.sources.hub import commit_of, from_hub, is_commit
from restitch.registry.sources.model_files import (
    check_safetensors,
    files_of,
    model_folder,
    readable_files,
)
from restitch.registry.specs.hub_id import is_hub_id, split_pin
from restitch.registry.store.disk import explained
from restitch.registry.store.objects import ObjectStore
from restitch.registry.store.read_cache import ReadCache

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Source:
    """A model that can be read.

    Attributes:
        uri: the pinned address: an absolute path, `org/name@commit`, an MLflow address that
            cannot move, `s3://bucket/folder`, or `store://DIGEST`.
        local: its folder or file on this machine.
        kind: the kind of source.
        revision: the commit, for the hub.
        remote: the folder in a bucket that holds the weights, if they are not in `local`.
    """

    uri: str
    local: Path
    kind: Literal["path", "hub", "mlflow", "copy", "s3"]
    revision: str | None = None
    remote: S3Folder | None = None


# Raises if the model in a folder cannot be used; the text is its name in messages.
Check = Callable[[Path, str], object]


def resolve_source(
    source: str | Path, home: Home, *, whole: bool = True, check: Check | None = None
) -> Source:
    """Find a model and make it readable on this machine.

    Args:
        source: a path, `org/name[@revision]`, `s3://bucket/folder`, `models:/`, `runs:/`,
            `mlflow-artifacts:/`, or `store://` for a copy.
        home: the installation whose store and caches keep fetched files.
        whole: also fetch the weights from a bucket; otherwise `Source.remote` reads them.
        check: called before files are put into the store, so that nothing is left of a model that
            is refused.

    Raises:
        BadInput: it does not exist, or is not supported.
        Unavailable: its server is unreachable, or refuses the request.
    """
    text = str(source)
    if text.startswith(S3_SCHEME):
        return _from_s3(text.rstrip("/"), home, whole=whole)
    path = named_path(text.removeprefix("file://"), None, "the model")
    if is_there(path, "the model"):
        check_path(path, "the model")
        return Source(uri=str(path.resolve()), local=path.resolve(), kind="path")
    if text.startswith(MLFLOW_SCHEMES):
        return _from_mlflow(text, home, check)
    if text.startswith(COPY_SCHEME):
        return _from_copy(text, home)
    if "://" not in text and is_hub_id(text):
        name, revision, local = from_hub(text)
        return Source(uri=f"{name}@{revision}", local=local, kind="hub", revision=revision)
    raise BadInput(
        f"there is no model at {text}",
        expected="a folder, a hub id such as org/name, s3://bucket/folder, or models:/NAME/VERSION",
        found="an unsupported kind of address" if "://" in text else "nothing at this path",
        hint="copy the model to a folder and use its path" if "://" in text else "check the path",
    )


def copy_into_store(source: Source, home: Home) -> Source:
    """Copy a local model into the store, where any worker can read it.

    Returns:
        The copy, named by its content; its `local` is still the original.

    Raises:
        BadInput: it is neither a folder of safetensors nor such a file.
        Unavailable: the store cannot be written to.
    """
    local = source.local
    if not local.is_dir() and local.suffix != ".safetensors":
        raise BadInput(
            f"{local} cannot be copied into the store",
            expected="a folder of safetensors, or one .safetensors file",
        )
    objects = ObjectStore(home.open_store())
    manifest = _manifest(source.uri, files_of(local), objects, move=False)
    return Source(uri=f"{COPY_SCHEME}{manifest}", local=local, kind="copy")


def pin_data(path: str) -> str:
    """Pin a data set on the hub to its commit; a local path stays as it is.

    Data is never copied: several hosts need local data on shared storage, at the same path.

    Raises:
        BadInput: the data set or revision does not exist.
        Unavailable: the hub is unreachable.
    """
    if is_there(Path(path), "the data") or "://" in path:
        return path
    check_hub(f"the data set {path}")
    name, revision = split_pin(path)
    if revision is not None and is_commit(revision):
        return path
    repository = name.partition(":")[0]
    return f"{name}@{commit_of(repository, revision, 'dataset')}"


def _from_s3(text: str, home: Home, *, whole: bool) -> Source:
    check_address(text, "the model")
    folder = list_folder(text)
    files = readable_files(dict(folder.files))
    check_safetensors(text, files, folder.files)
    small = [name for name in files if not name.endswith(".safetensors")]
    check_small(folder, small)
    whole = whole or holds_adapter(files)
    names = sorted(files) if whole else small
    versions = [[name, files[name].size, files[name].etag] for name in names]

    def fetch(building: Path) -> None:
        building.mkdir()
        for name in names:
            folder.fetch(name, building / name)

    local = cached_folder(digest_json([text, versions]), fetch, home)
    return Source(uri=text, local=local, kind="s3", remote=None if whole else folder)


def _from_mlflow(uri: str, home: Home, check: Check | None) -> Source:
    objects = ObjectStore(home.open_store())
    key = objects.lookup("source", digest_bytes(uri.encode())) if _is_fixed(uri) else None
    fixed = uri
    if key is None:
        with _downloaded(uri, home) as (fixed, downloaded):
            manifest = _put_files(uri, downloaded, objects, check)
        key = objects.publish("source", digest_bytes(fixed.encode()), manifest)
    files = json.loads(objects.read_blob(key.blob))
    if "uri" in files:  # a placeholder with the address of the model
        return resolve_source(files["uri"], home)
    return Source(uri=fixed, local=_unpacked(key.blob, home), kind="mlflow")


def _from_copy(uri: str, home: Home) -> Source:
    manifest = uri.removeprefix(COPY_SCHEME)
    if not _DIGEST.match(manifest):
        raise BadInput(
            f"{uri} is not the address of a copy in the store",
            expected=f"{COPY_SCHEME} and a digest",
        )
    return Source(uri=uri, local=_unpacked(manifest, home), kind="copy")


def _is_fixed(uri: str) -> bool:
    """True if an MLflow address cannot move, as an alias can."""
    rest = uri.removeprefix("models:/")
    return rest == uri or ("@" not in rest and "/" in rest)


@contextmanager
def fetch_again(uri: str, home: Home) -> Iterator[dict[str, Path]]:
    """Fetch the files of a model from its source, by name, for the length of the context.

    Raises:
        BadInput: the model does not exist any more.
        Unavailable: its server is unreachable.
    """
    if not uri.startswith(MLFLOW_SCHEMES):
        yield readable_files(files_of(resolve_source(uri, home).local))
        return
    with _downloaded(uri, home) as (_, path):
        yield readable_files(files_of(path if path.is_file() else model_folder(uri, path)))


@contextmanager
def _downloaded(uri: str, home: Home) -> Iterator[tuple[str, Path]]:
    """An MLflow artifact's fixed address, and its files for the length of the context."""
    from restitch.registry.mlflow.connection import connect, mlflow_explained

    with explained(home.scratch, "write"):
        home.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="fetch-", dir=home.scratch))
    try:
        with mlflow_explained(home, missing=f"MLflow has no {uri}"):
            fixed, place = _place(client := connect(home), uri)
            check_artifact(client, place, uri, own=home.mlartifacts)
            from mlflow.artifacts import download_artifacts

            path = download_artifacts(
                artifact_uri=place, dst_path=str(folder), tracking_uri=home.mlflow_uri
            )
        yield fixed, Path(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(client: "MlflowClient", uri: str) -> tuple[str, str]:
    """The pinned address of a model in MLflow, and the location of its artifacts.

    MLflow itself resolves `models:/` by the global server of the process, not by ours.
    """
    if not uri.startswith("models:/"):
        return uri, uri
    first, *path = uri.removeprefix("models:/").strip("/").split("/")
    name, _, alias = first.partition("@")
    if alias:
        version = str(client.get_model_version_by_alias(name, alias).version)
    elif path and path[0].isdigit():
        version, *path = path
    elif not path:
        return uri, str(client.get_logged_model(name).artifact_location)
    else:
        raise BadInput(
            f"{uri} does not name a version",
            expected="models:/NAME/VERSION or models:/NAME@ALIAS",
        )
    fixed = "/".join((f"models:/{name}/{version}", *path))
    place = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):
        place = _place(client, place)[1]
    return fixed, "/".join((place.rstrip("/"), *path))


def _put_files(uri: str, downloaded: Path, objects: ObjectStore, check: Check | None) -> str:
    """Put a model's files into the store; returns the digest of their manifest."""
    if not downloaded.is_file():
        placeholder = downloaded / "object.json"
        if placeholder.is_file() and not any(downloaded.rglob("*.safetensors")):
            return objects.put_json({"uri": _pointed_at(uri, placeholder)})
        downloaded = model_folder(uri, downloaded)
    if check is not None:
        check(downloaded, uri)
    return _manifest(uri, files_of(downloaded), objects, move=True)


def _manifest(uri: str, files: dict[str, Path], objects: ObjectStore, *, move: bool) -> str:
    """Put the files of a model that are read; returns the digest of their manifest."""
    readable = readable_files(files)
    check_safetensors(uri, readable, files)
    blobs = {name: objects.put_blob(path, move=move) for name, path in readable.items()}
    return objects.put_json({"files": blobs})


def _pointed_at(uri: str, placeholder: Path) -> str:
    try:
        values = json.loads(placeholder.read_bytes())
        target = values["uri"]
    except (ValueError, KeyError, TypeError, RecursionError):
        target = None
    # A placeholder may not name another one, or the chain might never end.
    if not isinstance(target, str) or target.startswith(MLFLOW_SCHEMES):
        raise BadInput(
            f"the object.json of {uri} does not name a model",
            expected="a path or a hub id under 'uri'",
        )
    return target


def _unpacked(manifest: str, home: Home) -> Path:
    """A folder in the cache with the files of a manifest."""

    def unpack(building: Path) -> None:
        objects = ObjectStore(home.open_store())
        files = json.loads(objects.read_blob(manifest))["files"]
        building.mkdir()
        for name, blob in files.items():
            if Path(name).name != name:
                raise Damage(f"the manifest {manifest} names the file {name!r}")
            path = objects.blob_path(blob)
            try:
                (building / name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, building / name)

    return cached_folder(manifest, unpack, home)


def discard_folder(name: str, home: Home) -> None:
    """Remove a folder from this machine's cache, if it is there."""
    cache = _cache(home)
    with explained(cache.root, "write"):
        cache.discard(name)


def cached_folder(name: str, build: Callable[[Path], None], home: Home) -> Path:
    """A folder in this machine's cache, created atomically.

    Args:
        name: a digest of its content, or of its source.
        build: makes the folder at a path, and fills it.
        home: the installation.
    """
    cache = _cache(home)
    with explained(cache.root, "write"):
        return cache.get(name, build)


def _cache(home: Home) -> ReadCache:
    return ReadCache(home.cache / "sources", cache_limit, folders=True)
