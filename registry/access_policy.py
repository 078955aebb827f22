"""The folders and hosts that a process may read models and data from.

`RESTITCH_ALLOWED_ROOTS` lists folders, separated by `:`, and `RESTITCH_ALLOWED_HOSTS` hosts and
buckets, separated by commas (`huggingface.co, s3://models`). An unset or empty variable limits
nothing. A model or data set elsewhere is refused: symbolic links are resolved first, also those
in its folder, and the real path is checked again when a file is open (`files.safe_open`). The
store, the caches and the tracking server are always allowed, but not what they point to.
"""

import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import watch

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOTS_VARIABLE = "RESTITCH_ALLOWED_ROOTS"
HOSTS_VARIABLE = "RESTITCH_ALLOWED_HOSTS"

_HUB = "https://huggingface.co"


class AccessDenied(BadInput):
    """The access policy of this process forbids to read it."""


def check_path(path: Path, subject: str, *, own: Path | None = None) -> None:
    """Refuse a file or folder outside of the allowed folders, and links in it that lead outside.

    A folder of the installation itself, `own`, is always allowed.

    Raises:
        AccessDenied: it lies outside.
    """
    if not os.environ.get(ROOTS_VARIABLE):
        return
    for place in chain([path], _links(path)):
        _check_real(_real(place), subject, own, place)
    # A link may be created or changed between this check and the reading.
    for place in (path, _real(path)):
        watch(place, partial(_check_real, subject=subject, own=own))


def _check_real(real: Path, subject: str, own: Path | None, place: Path | None = None) -> None:
    listed = os.environ.get(ROOTS_VARIABLE)
    if not listed:
        return
    roots = [_real(Path(root).expanduser()) for root in listed.split(os.pathsep) if root]
    roots += [] if own is None else [_real(own)]
    if not any(real.is_relative_to(root) for root in roots):
        raise AccessDenied(
            f"{subject} lies outside of the allowed folders: {place or real}",
            expected=f"a path below {listed} ({ROOTS_VARIABLE})",
            found=real,
            hint=f"move it there, or add its folder to {ROOTS_VARIABLE}",
        )


def check_host(host: str, subject: str) -> None:
    """Refuse a host, or a bucket such as `s3://NAME`, that is not listed.

    Raises:
        AccessDenied: it is not listed.
    """
    listed = os.environ.get(HOSTS_VARIABLE)
    if not listed:
        return
    if host.lower() not in [name.strip().lower() for name in listed.split(",")]:
        raise AccessDenied(
            f"{subject} is on a host that is not allowed",
            expected=f"one of {listed} ({HOSTS_VARIABLE})",
            found=host,
            hint=f"add {host} to {HOSTS_VARIABLE}, or use a copy in an allowed place",
        )


def check_hub(subject: str) -> None:
    """Refuse a model or data set on the hub unless the hub's host is listed."""
    check_host(urlsplit(os.environ.get("HF_ENDPOINT") or _HUB).hostname or "", subject)


def check_address(address: str, subject: str, *, own: Path | None = None) -> None:
    """Refuse a path or an address that is not allowed; raises like `check_path`."""
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError as error:
        raise BadInput(f"{subject} has an invalid address", found=error) from error
    if parts.scheme in ("", "file"):
        place = unquote(parts.path) if parts.scheme else address
        check_path(Path(place), subject, own=own)
    elif parts.scheme in ("http", "https"):
        check_host(host or "", subject)
    elif parts.scheme != "mlflow-artifacts":  # those come through the tracking server
        check_host(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", subject)


def check_artifact(client: "MlflowClient", place: str, subject: str, *, own: Path) -> None:
    """Refuse artifacts of MLflow outside of the allowed places; a run stands for its folder."""
    if place.startswith("runs:/"):
        run, _, path = place.removeprefix("runs:/").strip("/").partition("/")
        place = f"{client.get_run(run).info.artifact_uri}/{path}"
    check_address(place, subject, own=own)


def _links(path: Path) -> Iterator[Path]:
    """All links in a folder, and in the folders that they lead to."""
    waiting, seen = [path], set[Path]()
    while waiting:
        for folder, folders, files in os.walk(waiting.pop()):
            for name in (*folders, *files):
                place = Path(folder, name)
                if place.is_symlink():
                    yield place
                    real = _real(place)
                    if real not in seen and real.is_dir():
                        seen.add(real)
                        waiting.append(real)


def _real(path: Path) -> Path:
    # Path.resolve raises for a link to itself; nothing can be read through one.
    return Path(os.path.realpath(path))
