"""Models and data sets on the hub: pinned to a commit, and fetched into the hub's own cache."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.access_policy import check_hub
from restitch.registry.redaction import first_line
from restitch.registry.sources.model_files import MODEL_FILES, SKIPPED_FILES, convert
from restitch.registry.specs.hub_id import split_pin

# What is fetched of a model, in the words of huggingface_hub.
_MODEL_FILES: dict[str, Any] = {
    "allow_patterns": list(MODEL_FILES),
    "ignore_patterns": list(SKIPPED_FILES),
}


def from_hub(text: str) -> tuple[str, str, Path]:
    """The name, the commit and the folder of a model.

    Raises:
        BadInput: the model or revision does not exist, or has no safetensors.
        Unavailable: the hub is unreachable, or refuses the request.
    """
    check_hub(f"the model {text}")
    name, revision = split_pin(text)
    if revision is None or not is_commit(revision):
        revision = commit_of(name, revision, "model")
    with _hub_explained(name, revision):
        local = _snapshot(name, revision)
    if not any(local.glob("*.safetensors")):
        raise BadInput(
            f"{name} on the hub has no safetensors",
            expected="model.safetensors, whole or in shards",
            hint=convert(path.name for path in local.iterdir()),
        )
    return name, revision, local


def _snapshot(name: str, revision: str) -> Path:
    """The folder of a commit; from the cache without a request if it is complete there."""
    from huggingface_hub import errors, snapshot_download

    fetch = partial(
        snapshot_download,
        name,
        revision=revision,
        **_MODEL_FILES,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    with suppress(errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        local = Path(fetch(local_files_only=True))
        if any(local.glob("*.safetensors")):
            return local
    return Path(fetch())


def commit_of(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """The commit that a branch or tag of the hub points to now."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_explained(name, revision or "main"):
        if _is_offline():  # the cache decides
            read = _MODEL_FILES if kind == "model" else {}
            return Path(
                snapshot_download(
                    name, repo_type=kind, revision=revision, local_files_only=True, **read
                )
            ).name
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        commit = api.repo_info(name, repo_type=kind, revision=revision).sha
        if commit is None:
            raise Unavailable(
                f"the hub returned no commit for {name}", hint="run the command again later"
            )
        return str(commit)


def sizes_on_hub(name: str, kind: Literal["model", "dataset"]) -> dict[str, int]:
    """The files that a model or data set has on the hub, with their bytes; none while offline.

    Raises:
        BadInput: the hub has no repository of this name.
        Unavailable: the hub is unreachable, or refuses the request.
    """
    from huggingface_hub import HfApi

    check_hub(f"the {kind} {name}")
    name, revision = split_pin(name)
    if _is_offline():
        _ = commit_of(name, revision, kind)  # refuses what the cache does not have
        return {}
    with _hub_explained(name, revision or "main"):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        ask = api.model_info if kind == "model" else api.dataset_info
        info = ask(name, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def config_on_hub(name: str) -> Path:
    """The folder with the configuration of a model, without its weights.

    Raises:
        BadInput: the model does not exist, or has none.
        Unavailable: the hub is unreachable, or refuses the request.
    """
    from huggingface_hub import hf_hub_download

    check_hub(f"the model {name}")
    name, revision = split_pin(name)
    with _hub_explained(name, revision or "main"):
        file = hf_hub_download(
            name, "config.json", revision=revision, endpoint=os.environ.get("HF_ENDPOINT")
        )
    return Path(file).parent


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def is_read(file: str) -> bool:
    """True for a file of a model that is fetched."""
    return any(fnmatch(file, one) for one in MODEL_FILES) and not any(
        fnmatch(file, one) for one in SKIPPED_FILES
    )


@contextmanager
def _hub_explained(name: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise Unavailable(
            f"access to {name} on the hub is restricted",
            hint="request access on its page and set HF_TOKEN, or use a local copy",
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{name} is neither a local path nor on the hub",
            found="no public repository of this name, and none that your token may read",
            hint="check the spelling; for a private repository set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(
            f"{name} on the hub has no revision {revision}",
            hint="name an existing branch, tag or commit, or none",
        ) from None
    except (errors.RemoteEntryNotFoundError, errors.HFValidationError) as error:
        raise BadInput(f"{name} on the hub cannot be read", found=first_line(error)) from None
    except (
        # The error of the library's HTTP client, which it does not export.
        errors.HTTPError,  # type: ignore[attr-defined]
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.IncompleteSnapshotError,
        errors.FileMetadataError,
        errors.XetDownloadError,
    ) as error:
        raise Unavailable(
            f"{name} is not a local path, and {revision} of it on the hub cannot be read",
            found=first_line(error),
            hint="for a local path, check its spelling; for a name on the hub, check the network "
            "and HF_ENDPOINT and run the command again, or use a local copy",
        ) from None


def is_commit(revision: str) -> bool:
    """True if a revision is a commit, which cannot move."""
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
