"""The folder of an export: it appears complete or not at all, and replaces only a model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from restitch.merging.errors import BadInput
from restitch.registry.store.disk import explained

# A folder without any of them is not the folder of a model.
_CONFIGS = ("config.json", "adapter_config.json")


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a folder that would lose something.

    Raises:
        BadInput: `out` is not free, and must not be replaced.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(
            f"{out} is not a folder",
            expected="a folder that is absent or empty",
            hint="choose another path",
        )
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise BadInput(
            f"{out} is not empty",
            expected="a folder that is absent or empty",
            hint="choose another folder, or replace the model in it with --overwrite",
        )
    if not any((out / name).exists() for name in _CONFIGS):
        raise BadInput(
            f"{out} is not replaced: it does not look like the folder of a model",
            expected=f"a folder with {' or '.join(_CONFIGS)}",
            hint="remove the folder yourself, or choose another one",
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, which replaces it when everything is written."""
    folder = out.parent / f".{out.name}.{uuid4().hex[:8]}.partial"
    try:
        with explained(out, "write"):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            yield folder
        if out.exists() and any(out.iterdir()):
            old = folder.with_suffix(".replaced")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
