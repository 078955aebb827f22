"""BLAKE3 digests of bytes, of files and of canonical JSON.

The same content has the same digest on every machine and in every process: JSON is
written with sorted keys and without blanks, text is UTF-8, and a number that JSON
cannot hold (NaN, infinity) is refused. Files are read in blocks, in bounded memory.
"""

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

_BLOCK = 1 << 22


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """The digest of bytes: 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def canonical_json(obj: object) -> bytes:
    """The JSON text of an object from which its digest is computed."""
    text = json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def digest_json(obj: object) -> str:
    """The digest of an object's canonical JSON."""
    return digest_bytes(canonical_json(obj))


def digest_file(path: Path) -> str:
    """The digest of a file's bytes, in bounded memory."""
    hasher: Any = blake3()
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return str(hasher.hexdigest())
