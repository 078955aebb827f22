"""Hostile images for the fuzzer, and the check of their reader.

An image is written in one of many modes and formats, with an orientation or transparency, and
perhaps damaged. What is read must be what `datasets` decodes, shown on white and in 8 bits;
anything else must be refused with an explanation.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from restitch.merging.errors import BadInput
from restitch.modeling.data.images import open_image
from tests.stress.hostile_files import damaged_bytes
from tests.stress.hostile_rows import explained

# The formats that Pillow writes, with the modes that each can hold.
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "ICO": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "PCX": ("1", "L", "P", "RGB"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
    "SGI": ("L", "RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "DDS": ("L", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "XBM": ("1",),
    "EPS": ("L", "RGB"),
}
_WITH_EXIF = ("PNG", "TIFF", "WEBP", "JPEG")
_UNKNOWN_RANGE = ("I", "F")


@dataclass(frozen=True)
class ImageFile:
    """The bytes of one image, and the mode and format that they were written with."""

    format: str
    mode: str
    data: bytes


@st.composite
def images(draw: st.DrawFn) -> ImageFile:
    """One image."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[kind]))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 256, (height, width, 4), dtype=np.uint8
    )
    settings: dict[str, Any] = {}
    if kind in _WITH_EXIF and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        settings["exif"] = exif
    if kind in ("PNG", "GIF") and mode in ("L", "P") and draw(st.booleans()):
        settings["transparency"] = int(pixels[0, 0, 0])
    if kind in ("GIF", "TIFF", "WEBP", "AVIF") and draw(st.booleans()):
        settings |= {"save_all": True, "append_images": [_image(pixels[::-1], mode)]}
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _image(pixels, mode).save(stream, format=kind, **settings)
    data = stream.getvalue()
    if draw(st.booleans()):
        data = draw(damaged_bytes(data))
    return ImageFile(kind, mode, data)


def _image(pixels: Any, mode: str) -> Image.Image:
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(pixels[..., 0].astype(dtype) * 257)
    if mode in ("LAB", "YCbCr"):
        bands = [Image.fromarray(pixels[..., band].copy()) for band in range(3)]
        return Image.merge(mode, bands)
    return Image.fromarray(pixels).convert(mode)


def check_image(file: ImageFile) -> str:
    """Read an image, and compare it with what `datasets` decodes."""
    import datasets

    try:
        read = open_image(file.data, Path(), "here")
    except BadInput as error:
        return explained(error)
    assert read.mode == "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = datasets.Image().decode_example({"bytes": file.data, "path": None})
    expected, close = _shown(decoded)
    difference = (
        np.abs(np.asarray(read, dtype=int) - expected) if read.size == decoded.size else 255
    )
    assert np.max(difference) <= close, f"{decoded} is read as {read}, {difference}"
    return "read"


def _shown(image: Any) -> tuple[Any, int]:
    """The pixels that a viewer shows, and how far others may be from them."""
    assert image.mode not in _UNKNOWN_RANGE or image.format in ("PPM", None), image
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=float)
        return np.stack([np.round(grey / 257)] * 3, axis=-1).astype(int), 1
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"), dtype=int), 0
    pixels = np.asarray(image.convert("RGBA"), dtype=float)
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(int), 1
