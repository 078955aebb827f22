"""Put the folder of a model on the hub, in one commit.

What the hub already holds of the files is not sent again, so an interrupted upload continues where
it was. A repository with another model is replaced only on request.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.access_policy import check_hub
from restitch.registry.redaction import first_line

# The file of an export that names its line.
DESCRIPTION = "restitch.json"
# The file of an adapter, by which libraries tell it from a whole model.
ADAPTER = "adapter_config.json"
# What an earlier export may have left that a new one does not write.
_REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "heads/*",
    "config.json",
    ADAPTER,
)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".h5")
# The hub's answers to a name that it does not take.
_REFUSED = (400, 403, 404, 409, 422)


def check_repository(
    name: str, line: str, *, private: bool, overwrite: bool, adapter: bool = False
) -> None:
    """Refuse a repository that a model of a line cannot or should not be put into.

    Args:
        name: `owner/name`.
        line: the name of the line.
        private: the repository must be private.
        overwrite: it may hold another model.
        adapter: the model is an adapter.

    Raises:
        BadInput: the name is not valid, or the repository is public or holds another model.
        Unavailable: the hub cannot be reached, or needs a token.
    """
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils._validators import validate_repo_id

    check_hub(f"the model {name}")
    with _explained(name):
        validate_repo_id(name)
        if name.count("/") != 1:
            raise errors.HFValidationError("a name has one slash, as in OWNER/NAME")
        try:
            found = _api().repo_info(name)
        except errors.RepositoryNotFoundError:
            return
        if private and not found.private:
            raise BadInput(
                f"{name} on the hub is public",
                expected="a private repository, or a name that is free",
                hint="make it private on its page, choose another name, or leave out --private",
            )
        files = [one.rfilename for one in found.siblings or ()]
        if overwrite or not any(file.endswith(_WEIGHTS) for file in files):
            return
        stated: Any = {}
        if DESCRIPTION in files:
            with TemporaryDirectory() as cache:
                path = hf_hub_download(
                    name, DESCRIPTION, revision=found.sha, endpoint=_endpoint(), cache_dir=cache
                )
                stated = _json(Path(path))
    if not isinstance(stated, dict) or stated.get("line") != line:
        raise BadInput(
            f"{name} on the hub holds another model",
            expected=f"a name that is free, or a model of line {line}",
            found=f"{len(files)} files, of which none says that it is one",
            hint="choose another name, or replace the model in it with --overwrite",
        )
    if adapter != (ADAPTER in files):
        kinds = ("whole models", "adapters")
        raise BadInput(
            f"{name} on the hub holds {kinds[not adapter]} of line {line}",
            expected=f"a name that is free, or {kinds[adapter]} of the line",
            hint="choose another name, or replace the model in it with --overwrite",
        )


def upload(folder: Path, name: str, message: str, *, private: bool) -> str:
    """Put all files of a folder into a repository in one commit; return the commit's address.

    Args:
        folder: the model.
        name: `owner/name`; it is created if it does not exist.
        message: of the commit.
        private: create a private repository.

    Raises:
        BadInput: the hub refuses the name.
        Unavailable: the hub cannot be reached, or needs a token.
    """
    with _explained(name):
        _api().create_repo(name, private=private or None, exist_ok=True)
        commit = _api().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(_REPLACED),
        )
    return str(commit.commit_url)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint())


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextmanager
def _explained(name: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise BadInput(
            f"{name!r} is no name for a model on the hub",
            expected="OWNER/NAME of letters, digits, '-', '_' and '.'",
            found=first_line(error),
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _REFUSED:
            raise BadInput(
                f"the hub refuses {name}",
                expected="a name whose owner your token may write to",
                found=first_line(error),
                hint="check the owner and the name, and that the token in HF_TOKEN can write",
            ) from None
        raise _away(name, error) from None
    except (
        # The error of the library's HTTP client, which it does not export.
        errors.HTTPError,  # type: ignore[attr-defined]
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.XetDownloadError,
        ConnectionError,
        RuntimeError,  # of the upload of one large file
    ) as error:
        raise _away(name, error) from None


def _away(name: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"cannot write {name} to the hub",
        found=first_line(error),
        hint="check the network, HF_ENDPOINT and HF_TOKEN, and run the command again: it continues",
    )
