"""Images from bytes or files, as RGB, with errors that name their row.

An image with more than `MOST_PIXELS` is refused by its header, before it is decoded: a small file
can claim a picture that fills the memory.
"""

import io
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular

MOST_PIXELS = 64_000_000  # 8000 x 8000


def open_image(value: object, root: Path, where: str) -> Any:
    """One decoded RGB image.

    Args:
        value: bytes, a path in `root`, or `{"bytes": ..., "path": ...}` as data sets
            store images.
        root: the folder of the data.
        where: file and row, for errors.

    Raises:
        BadInput: the image is missing, cannot be decoded, or is too large.
    """
    from PIL import Image

    data = image_bytes(value, root, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this limit is stricter than Pillow's warning
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                decoded = image.convert("RGB") if width * height <= MOST_PIXELS else None
    except Exception as error:  # decoders raise many kinds of errors
        raise BadInput(f"{where}: the image cannot be decoded", found=error) from error
    if decoded is None:
        raise BadInput(
            f"{where}: the image is too large",
            expected=f"at most {MOST_PIXELS:,} pixels",
            found=f"{width} x {height} pixels",
        )
    return decoded


def image_bytes(value: object, root: Path, where: str) -> bytes:
    """The encoded bytes of an image value, as `open_image` takes it."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadInput(
            f"{where} is not an image",
            expected="encoded bytes, or the path of a file",
            found=type(value).__name__,
        )
    path = PurePosixPath(value)
    if path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    if path.is_absolute() or ".." in path.parts:
        raise BadInput(
            f"{where}: the image is outside of the folder of the data",
            expected=f"a path in {root}",
            found=value,
            hint="put the images next to the table and give paths relative to it",
        )
    try:
        with open_regular(root / path) as file:
            return file.read()
    except OSError as error:
        raise BadInput(f"{where}: the image cannot be read", found=error) from error
