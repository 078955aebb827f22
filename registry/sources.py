"""Where models are read: a path, the hub, or MLflow, always the same thing again.

An existing local path wins and is used in place. A hub id is pinned to its commit, and
only weights, configuration, tokenizer and processor files are fetched, into the hub's own
cache. An MLflow artifact is fetched once and kept in the store, so that it can be read
again wherever the store can, whatever becomes of it in MLflow; a local model can be copied
there likewise. Nothing that is fetched is executed, and pickles are not fetched at all.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merging.digests import digest_bytes
from merging.errors import BadInput, Damage, Unavailable
from registry.allowed import check_artifact, check_hub, check_path
from registry.home import Home
from registry.objects import ObjectStore
from registry.paths import is_there, named_path
from registry.read_cache import ReadCache
from registry.references import COPY_SCHEME as COPY_SCHEME
from registry.references import MLFLOW_SCHEMES as MLFLOW_SCHEMES
from registry.s3_settings import cache_limit
from registry.specs import is_hub_id, split_pin
from registry.store import explained

if TYPE_CHECKING:
    from mlflow import MlflowClient


# The files of a model folder that are read, its card for the licence; `*/*` because a pattern's
# `*` crosses folders.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
_UNWANTED = ("*/*", "*.fp16.*", "*.bf16.*", "*.onnx*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_CONVERT = (
    "convert it where you trust it: AutoModel.from_pretrained(ID).save_pretrained(OUT), "
    "then use the folder OUT"
)


@dataclass(frozen=True)
class Source:
    """A model that can be read.

    Attributes:
        uri: what names the same thing for ever: an absolute path, `org/name@commit`, an
            MLflow address that cannot move, or `store://DIGEST`.
        local: its folder or file on this machine.
        kind: where it comes from.
        revision: the commit, for the hub.
    """

    uri: str
    local: Path
    kind: Literal["path", "hub", "mlflow", "copy"]
    revision: str | None = None


def resolve_source(source: str | Path, home: Home) -> Source:
    """Find a model and make it readable on this machine.

    Args:
        source: a path, `org/name[@revision]`, `models:/`, `runs:/`, `mlflow-artifacts:/`, or
            `store://` for a copy.
        home: where what is fetched is kept.

    Raises:
        BadInput: it is not there, or of a kind that is not read.
        Unavailable: the server that holds it is away, or refuses.
    """
    text = str(source)
    path = named_path(text.removeprefix("file://"), None, "the model")
    if is_there(path, "the model"):
        check_path(path, "the model")
        return Source(uri=str(path.resolve()), local=path.resolve(), kind="path")
    if text.startswith(MLFLOW_SCHEMES):
        return _from_mlflow(text, home)
    if text.startswith(COPY_SCHEME):
        return _from_copy(text, home)
    if "://" not in text and is_hub_id(text):
        return _from_hub(text)
    raise BadInput(
        f"there is no model at {text}",
        expected="a folder, a hub id such as org/name, or models:/NAME/VERSION",
        found="an address of another kind" if "://" in text else "nothing at this path",
        hint="copy the model to a folder and name that" if "://" in text else "check the path",
    )


def copy_into_store(source: Source, home: Home) -> Source:
    """Keep a local model in the store, where any worker can read it; each file only once.

    Returns:
        The copy, named by its content; its `local` is still the original.

    Raises:
        BadInput: it is no folder of safetensors and no such file.
        Unavailable: the store cannot be written to.
    """
    local = source.local
    if not local.is_dir() and local.suffix != ".safetensors":
        raise BadInput(
            f"{local} cannot be copied into the store",
            expected="a folder of safetensors, or one .safetensors file",
        )
    objects = ObjectStore(home.open_store())
    manifest = _manifest(source.uri, _files_of(local), objects, move=False)
    return Source(uri=f"{COPY_SCHEME}{manifest}", local=local, kind="copy")


def pin_data(path: str) -> str:
    """A task's data with a hub id pinned to its commit; a local path stays as it is.

    Data is never copied: several hosts need local data on shared storage, at the same path.

    Raises:
        BadInput: there is no such data set or revision.
        Unavailable: the hub is away.
    """
    if is_there(Path(path), "the data") or "://" in path:
        return path
    check_hub(f"the data set {path}")
    name, revision = split_pin(path)
    if revision is not None and _is_commit(revision):
        return path
    repository = name.partition(":")[0]
    return f"{name}@{_commit(repository, revision, 'dataset')}"


def _from_hub(text: str) -> Source:
    check_hub(f"the model {text}")
    name, revision = split_pin(text)
    if revision is None or not _is_commit(revision):
        revision = _commit(name, revision, "model")
    with _hub_explained(name, revision):
        local = _snapshot(name, revision)
    if not any(local.glob("*.safetensors")):
        raise BadInput(
            f"the hub's {name} holds no safetensors",
            expected="model.safetensors, whole or in shards",
            hint=_CONVERT,
        )
    return Source(uri=f"{name}@{revision}", local=local, kind="hub", revision=revision)


def _snapshot(name: str, revision: str) -> Path:
    """The folder of a commit, from the cache without a call where it is there whole."""
    from huggingface_hub import errors, snapshot_download

    def fetch(only_cached: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                endpoint=os.environ.get("HF_ENDPOINT"),
                local_files_only=only_cached,
            )
        )

    try:
        local = fetch(only_cached=True)
        if any(local.glob("*.safetensors")):
            return local
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        pass
    return fetch(only_cached=False)


def _commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """The commit that a branch or tag of the hub points to now."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_explained(name, revision or "main"):
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            # Asked to do without the network: what the cache holds is the answer.
            return Path(
                snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
            ).name
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        found = api.repo_info(name, repo_type=kind, revision=revision).sha
        if found is None:
            raise Unavailable(f"the hub names no commit for {name}", hint="try again later")
        return str(found)


@contextmanager
def _hub_explained(name: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise Unavailable(
            f"the hub's {name} is only for those who were admitted",
            hint="ask for access on its page and set HF_TOKEN, or use a local copy",
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{name} is neither a local path nor on the hub",
            found="no such public repository, or one that your token may not read",
            hint="check the spelling; for a private one set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(
            f"the hub's {name} has no revision {revision}",
            hint="name a branch, a tag or a commit that is there, or none",
        ) from None
    except (errors.RemoteEntryNotFoundError, errors.HFValidationError) as error:
        raise BadInput(f"the hub's {name} cannot be read", found=_first_line(error)) from None
    except (
        errors.HTTPError,  # type: ignore[attr-defined]
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.IncompleteSnapshotError,
        errors.FileMetadataError,
        errors.XetDownloadError,
    ) as error:
        raise Unavailable(
            f"the hub cannot be asked for {name} at {revision}",
            found=_first_line(error),
            hint="check the network and HF_ENDPOINT and try again, or use a local copy",
        ) from None


def _from_mlflow(uri: str, home: Home) -> Source:
    objects = ObjectStore(home.open_store())
    kept = objects.lookup("source", digest_bytes(uri.encode())) if _is_fixed(uri) else None
    fixed = uri
    if kept is None:
        fixed, manifest = _fetch(uri, home, objects)
        kept = objects.publish("source", digest_bytes(fixed.encode()), manifest)
    files = json.loads(objects.read_blob(kept.blob))
    if "uri" in files:  # a stand-in that names where the model really is
        target = resolve_source(files["uri"], home)
        return Source(target.uri, target.local, target.kind, target.revision)
    return Source(uri=fixed, local=_unpacked(kept.blob, files, home, objects), kind="mlflow")


def _from_copy(uri: str, home: Home) -> Source:
    manifest = uri.removeprefix(COPY_SCHEME)
    if not _DIGEST.match(manifest):
        raise BadInput(f"{uri} names no copy", expected=f"{COPY_SCHEME} and a digest")
    cache = _cache(home)
    if not cache.use(manifest):
        objects = ObjectStore(home.open_store())
        _unpacked(manifest, json.loads(objects.read_blob(manifest)), home, objects)
    return Source(uri=uri, local=cache.root / manifest, kind="copy")


def _is_fixed(uri: str) -> bool:
    """Whether an MLflow address means the same for ever, as an alias does not."""
    rest = uri.removeprefix("models:/")
    return rest == uri or ("@" not in rest and "/" in rest)


def _fetch(uri: str, home: Home, objects: ObjectStore) -> tuple[str, str]:
    """Download an MLflow artifact into the store: its fixed address and its manifest."""
    with _downloaded(uri, home) as (fixed, got):
        return fixed, _kept(uri, got, objects)


@contextmanager
def fetched_again(uri: str, home: Home) -> Iterator[dict[str, Path]]:
    """The files that a model's source gives now, by name; gone with the context.

    Args:
        uri: a path, a hub id or an MLflow address.
        home: where what is fetched lies meanwhile.

    Raises:
        BadInput: there is no such model any more.
        Unavailable: the server that holds it is away.
    """
    if not uri.startswith(MLFLOW_SCHEMES):
        yield _wanted(_files_of(resolve_source(uri, home).local))
        return
    with _downloaded(uri, home) as (_, got):
        yield _wanted(_files_of(got if got.is_file() else _model_folder(uri, got)))


@contextmanager
def _downloaded(uri: str, home: Home) -> Iterator[tuple[str, Path]]:
    """An MLflow artifact's fixed address, and its files for the length of the context."""
    from registry.catalog import connect, mlflow_explained

    with explained(home.scratch, "write"):
        home.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="fetch-", dir=home.scratch))
    try:
        with mlflow_explained(home, missing=f"MLflow has no {uri}"):
            fixed, place = _place(client := connect(home), uri)
            check_artifact(client, place, uri, own=home.mlartifacts)
            from mlflow.artifacts import download_artifacts

            got = download_artifacts(
                artifact_uri=place, dst_path=str(folder), tracking_uri=home.mlflow_uri
            )
        yield fixed, Path(got)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(client: "MlflowClient", uri: str) -> tuple[str, str]:
    """The address of the same thing that cannot move, and where its artifacts lie.

    MLflow's own way through `models:/` asks the process's global server and not ours.
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
            f"{uri} moves from version to version",
            expected="models:/NAME/VERSION or models:/NAME@ALIAS",
        )
    fixed = "/".join((f"models:/{name}/{version}", *path))
    place = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):
        place = _place(client, place)[1]
    return fixed, "/".join((place.rstrip("/"), *path))


def _kept(uri: str, got: Path, objects: ObjectStore) -> str:
    """Put a model's files into the store; returns the digest of their manifest."""
    if not got.is_file():
        stand_in = got / "object.json"
        if stand_in.is_file() and not any(got.rglob("*.safetensors")):
            return objects.put_json({"uri": _pointed_at(uri, stand_in)})
        got = _model_folder(uri, got)
    return _manifest(uri, _files_of(got), objects, move=True)


def _model_folder(uri: str, got: Path) -> Path:
    """The folder of the weights: MLflow's own model format has them in one below."""
    folders = sorted({path.parent for path in got.rglob("*.safetensors")})
    if len(folders) > 1 and got not in folders:
        raise BadInput(
            f"{uri} holds several models",
            found=", ".join(str(folder.relative_to(got)) for folder in folders),
            hint="name the folder of one of them",
        )
    return got if got in folders or not folders else folders[0]


def _files_of(local: Path) -> dict[str, Path]:
    if local.is_dir():
        return {path.name: path for path in sorted(local.iterdir()) if path.is_file()}
    # Whatever its name, it is the folder's only one.
    return {"model.safetensors" if local.suffix == ".safetensors" else local.name: local}


def _wanted(files: dict[str, Path]) -> dict[str, Path]:
    """Those of a model's files that are read."""
    return {n: path for n, path in files.items() if any(fnmatch(n, one) for one in _WANTED)}


def _manifest(uri: str, files: dict[str, Path], objects: ObjectStore, *, move: bool) -> str:
    """Put those of a model's files that are read; returns the digest of what names them."""
    wanted = _wanted(files)
    if not any(name.endswith(".safetensors") for name in wanted):
        pickled = any(path.suffix in _PICKLES for path in files.values())
        raise BadInput(
            f"{uri} holds no safetensors",
            found=", ".join([*files][:20]) or "nothing",
            hint=_CONVERT if pickled else "name the folder that holds model.safetensors",
        )
    kept = {name: objects.put_blob(path, move=move) for name, path in wanted.items()}
    return objects.put_json({"files": kept})


def _pointed_at(uri: str, stand_in: Path) -> str:
    try:
        values = json.loads(stand_in.read_bytes())
        target = values["uri"]
    except (ValueError, KeyError, TypeError, RecursionError):
        target = None
    # A stand-in may not lead to another one, or the chain might never end.
    if not isinstance(target, str) or target.startswith(MLFLOW_SCHEMES):
        raise BadInput(
            f"{uri} holds an object.json that names no model",
            expected="a path or a hub id under 'uri'",
        )
    return target


def _unpacked(
    manifest: str, files: dict[str, dict[str, str]], home: Home, objects: ObjectStore
) -> Path:
    """A folder in the cache with the files of a manifest, complete or not there at all."""
    folder = (cache := _cache(home)).root / manifest
    if cache.use(manifest):
        return folder
    with explained(folder, "write"), cache.temporary() as building:
        building.mkdir()
        for name, blob in files["files"].items():
            if Path(name).name != name:
                raise Damage(f"the manifest {manifest} names the file {name!r}")
            path = objects.blob_path(blob)
            try:
                (building / name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, building / name)
        cache.keep(manifest, building)
    return folder


def _cache(home: Home) -> ReadCache:
    return ReadCache(home.cache / "sources", cache_limit, folders=True)


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _first_line(error: Exception) -> str:
    from registry.catalog import without_credentials

    lines = [line for line in str(error).splitlines() if line.strip()]
    return without_credentials(lines[0] if lines else type(error).__name__)[:300]
