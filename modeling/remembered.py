"""What transformers said about configurations, kept in a folder for later processes.

Importing transformers takes longer than all other checks of a merge. Its answers depend on
config.json and on its version alone, so an answer is asked for once: within `remembering`, `recall`
finds it in any later process.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.files.safe_open import read_limited

MOST_CONFIG = 1 << 24
# Raise it when an answer changes for the same configuration.
_VERSION = 1
# Keys that change with every save, and no answer depends on.
_BOOKKEEPING = ("_commit_hash", "_name_or_path", "name_or_path", "transformers_version")

_folder: ContextVar[Path | None] = ContextVar("remembered", default=None)


@contextmanager
def remembering(folder: Path) -> Iterator[None]:
    """Keep answers in a folder, which is made when the first answer is kept, while a block runs."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def recall(question: str, model: Path) -> Any:
    """The answer about the configuration of a model in a folder; None if none is kept."""
    file = _file(question, model)
    if file is not None:
        with suppress(OSError, ValueError, RecursionError):
            return json.loads(file.read_text(encoding="utf-8"))
    return None


def remember(question: str, model: Path, answer: Any) -> None:
    """Keep an answer, which JSON can hold; nothing is kept outside of `remembering`."""
    file = _file(question, model)
    if file is not None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(answer), encoding="utf-8")
            new.replace(file)


def _file(question: str, model: Path) -> Path | None:
    folder = _folder.get()
    if folder is None:
        return None
    try:
        values = json.loads(read_limited(model / "config.json", MOST_CONFIG))
        config = {key: value for key, value in values.items() if key not in _BOOKKEEPING}
        asked = [_VERSION, question, version("transformers"), config]
        return folder / f"{digest_json(asked)}.json"
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # no configuration, which the question itself explains
