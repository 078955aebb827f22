"""Images from bytes or files as a viewer shows them, as RGB, with errors that name their row.

A viewer turns an image as its EXIF orientation says, scales deep greys to 8 bits, and shows
transparent pixels on white. Of several pictures in a file, the first one counts. Pixels that have
no fixed range (floating-point numbers, 32-bit integers) are refused. An image with more than
`MOST_PIXELS` is refused by its header, before it is decoded: a small file can claim a picture that
fills the memory.
"""

import io
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.data.text_files import check_pointer

MOST_PIXELS = 64_000_000  # 8000 x 8000

# All formats of Pillow but those that it does not decode, or draws with another program.
_FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF"),
    *("ICNS", "ICO", "IM", "IMT", "IPTC", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX"),
    *("PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP"),
    *("XBM", "XPM", "XVTHUMB"),
)
# Kinds of pictures that are refused, by bytes near the start of the file.
_REFUSED_KINDS = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"<svg", "SVG"),
    (b"ftyphei", "HEIF"),
    (b"ftypmif1", "HEIF"),
    (b"JXL \r\n", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"<html", "an HTML page"),
    (b"<!DOCTYPE", "an HTML page"),
)
_WHITE = (255, 255, 255, 255)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def open_image(value: object, root: Path, where: str) -> Any:
    """One decoded RGB image.

    Args:
        value: bytes, a path in `root`, or `{"bytes": ..., "path": ...}` as data sets
            store images.
        root: the folder of the data.
        where: file and row, for errors.

    Raises:
        BadInput: the image is missing, cannot be decoded or shown, or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    data = image_bytes(value, root, where)
    check_pointer(where, data)
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this limit is stricter than Pillow's warning
            with Image.open(io.BytesIO(data), formats=formats) as image:
                width, height = image.size
                small = width * height <= MOST_PIXELS
                decoded = _shown(image, where) if small else None
    except BadInput:
        raise
    except Exception as error:  # decoders raise many kinds of errors
        unknown = isinstance(error, UnidentifiedImageError)
        raise BadInput(
            f"{where}: the image cannot be decoded",
            found=_kind(data) if unknown else repr(error),
            hint="replace the image, or save it again as PNG or JPEG",
        ) from error
    if decoded is None:
        raise BadInput(
            f"{where}: the image is too large",
            expected=f"at most {MOST_PIXELS:,} pixels",
            found=f"{width} x {height} pixels",
        )
    return decoded


def _shown(image: Any, where: str) -> Any:
    """The image as a viewer shows it."""
    from PIL import ExifTags, Image

    depth = _depth(image, where)
    image.load()
    turn = _turns().get(image.getexif().get(ExifTags.Base.Orientation))
    upright = image if turn is None else image.transpose(turn)
    if depth is not None:
        most = 2**depth - 1
        pixels = (np.asarray(upright).astype(np.int64) * 255 + most // 2) // most
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    upright = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", upright.size, _WHITE), upright).convert("RGB")


def _turns() -> dict[object, Any]:
    """What turns an image upright, by its EXIF orientation."""
    from PIL import Image

    turn = Image.Transpose
    return {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }


def _kind(data: bytes) -> str:
    """What a file is that is none of the images that are read."""
    start = data[:256]
    found = (f"it is {kind}" for magic, kind in _REFUSED_KINDS if magic in start)
    return next(found, "no image of a known format" if data else "an empty file")


def _depth(image: Any, where: str) -> int | None:
    """The bits of a grey value; None for modes that Pillow converts to RGB itself.

    Raises:
        BadInput: the range of the pixels is unknown.
    """
    mode = str(image.mode)
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        tags = getattr(image, "tag_v2", {})
        if "transparency" in image.info or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise _refused(where, "16-bit grey with a transparent value, or with white as zero")
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        return int(bits[0] if isinstance(bits, tuple) else bits)
    if mode == "I":
        raise _refused(where, "32-bit integers")
    if mode == "F":
        raise _refused(where, "floating-point numbers")
    return None


def _refused(where: str, pixels: str) -> BadInput:
    return BadInput(
        f"{where}: the image cannot be shown without a guess",
        expected="8 or 16 bits for each value",
        found=f"pixels are {pixels}",
        hint="save it as 8-bit RGB, scaled as it should be seen",
    )


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
    path = named_file(value, root)
    if path is None:
        raise BadInput(
            f"{where}: the image is outside of the folder of the data",
            expected=f"a path in {root}",
            found=repr(value),
            hint="put the images next to the table and give paths relative to it",
        )
    try:
        with open_regular(root / path) as file:
            return file.read()
    except (OSError, UnicodeEncodeError) as error:
        raise BadInput(f"{where}: the image cannot be read", found=error) from error


def named_file(name: str, root: Path) -> PurePosixPath | None:
    """The path of a file that a row names, relative to the folder of the data.

    None if it leads outside.
    """
    path = PurePosixPath(name)
    if path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    return None if path.is_absolute() or ".." in path.parts else path
