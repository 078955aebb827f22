"""Models and data sets on the hub: pinned to a commit, and fetched into the hub's own cache."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.access_policy import check_hub
from restitch.registry.redaction import without_credentials
from restitch.registry.sources.model_files import CONVERT, UNWANTED, WANTED
from restitch.registry.specs.task import split_pin


def from_hub(text: str) -> tuple[str, str, Path]:
    """The name, the commit and the folder of a model.

    Raises:
        BadInput: there is no such model or revision, or no safetensors in it.
        Unavailable: the hub is away, or refuses.
    """
    check_hub(f"the model {text}")
    name, revision = split_pin(text)
    if revision is None or not is_commit(revision):
        revision = commit_of(name, revision, "model")
    with _hub_explained(name, revision):
        local = _snapshot(name, revision)
    if not any(local.glob("*.safetensors")):
        raise BadInput(
            f"the hub's {name} holds no safetensors",
            expected="model.safetensors, whole or in shards",
            hint=CONVERT,
        )
    return name, revision, local


def _snapshot(name: str, revision: str) -> Path:
    """The folder of a commit, from the cache without a call where it is there whole."""
    from huggingface_hub import errors, snapshot_download

    def fetch(only_cached: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
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


def commit_of(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
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
        # That of whichever client the hub's library has inside; it is exported nowhere.
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


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which cannot move."""
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return without_credentials(lines[0] if lines else type(error).__name__)[:300]
