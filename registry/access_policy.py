"""What a process may read that others name: folders and hosts, by the environment.

`RESTITCH_ALLOWED_ROOTS` lists folders (with `:` between them), `RESTITCH_ALLOWED_HOSTS` hosts
and buckets (`huggingface.co, s3://models`, with commas). What is unset or empty limits
nothing. Otherwise a model or data set elsewhere is refused wherever it would be opened, with
symbolic links resolved first, also those in its folder, and again by where it really is once
it is open (`restitch.merging.files.safe_open`). The store, the caches and the
tracking server are the deployment's own choice and always allowed, not what they point to.
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
    """It may not be read here, which says nothing about it: elsewhere, or later, it may be."""


def check_path(path: Path, what: str, *, own: Path | None = None) -> None:
    """Refuse a file or folder outside of the allowed roots, and links in it that lead out.

    Args:
        path: what is going to be read.
        what: what to call it in an error.
        own: a folder of the installation itself, allowed in any case.

    Raises:
        AccessDenied: it lies elsewhere.
    """
    listed = os.environ.get(ROOTS_VARIABLE)
    if not listed:
        return
    for place in chain([path], _links(path)):
        _check_real(_real(place), what, own, place)
    # A link may come, or be turned, between this look and the reading.
    for place in (path, _real(path)):
        watch(place, partial(_check_real, what=what, own=own))


def _check_real(real: Path, what: str, own: Path | None, place: Path | None = None) -> None:
    listed = os.environ.get(ROOTS_VARIABLE)
    if not listed:
        return
    roots = [_real(Path(root).expanduser()) for root in listed.split(os.pathsep) if root]
    roots += [] if own is None else [_real(own)]
    if not any(real.is_relative_to(root) for root in roots):
        raise AccessDenied(
            f"{what} lies outside of what may be read here: {place or real}",
            expected=f"a place below {listed} ({ROOTS_VARIABLE})",
            found=real,
            hint=f"move it there, or let its folder stand in {ROOTS_VARIABLE}",
        )


def check_host(host: str, what: str) -> None:
    """Refuse a host or a bucket, as `s3://NAME`, that is not listed.

    Raises:
        AccessDenied: it is not.
    """
    listed = os.environ.get(HOSTS_VARIABLE)
    if not listed:
        return
    if host.lower() not in [name.strip().lower() for name in listed.split(",")]:
        raise AccessDenied(
            f"{what} is on a host that may not be read here",
            expected=f"one of {listed} ({HOSTS_VARIABLE})",
            found=host,
            hint=f"let {host} stand in {HOSTS_VARIABLE}, or use a copy that may be read",
        )


def check_hub(what: str) -> None:
    """Refuse what is on the hub unless the hub's own host is listed."""
    check_host(urlsplit(os.environ.get("HF_ENDPOINT") or _HUB).hostname or "", what)


def check_address(address: str, what: str, *, own: Path | None = None) -> None:
    """Refuse a path or an address that is not allowed; raises like the others."""
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError as error:
        raise BadInput(f"{what} has no address that can be read", found=error) from error
    if parts.scheme in ("", "file"):
        place = unquote(parts.path) if parts.scheme else address
        check_path(Path(place), what, own=own)
    elif parts.scheme in ("http", "https"):
        check_host(host or "", what)
    elif parts.scheme != "mlflow-artifacts":  # those come through the tracking server
        check_host(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", what)


def check_artifact(client: "MlflowClient", place: str, what: str, *, own: Path) -> None:
    """Refuse artifacts of MLflow that lie where is not allowed; a run stands for its folder."""
    if place.startswith("runs:/"):
        run, _, path = place.removeprefix("runs:/").strip("/").partition("/")
        place = f"{client.get_run(run).info.artifact_uri}/{path}"
    check_address(place, what, own=own)


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
    # Path.resolve raises for a link that leads to itself; nothing can be read by that one.
    return Path(os.path.realpath(path))
