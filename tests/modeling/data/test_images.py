"""Images of every form are the same pixels, and a bad one is an error that names its row."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from restitch.merging.errors import BadInput
from restitch.modeling.data.images import MOST_PIXELS, open_image
from restitch.modeling.data.task_data import Rows, labels_of, open_split
from restitch.registry.specs.data import DataSpec
from tests.modeling.conftest import png

LABELS = ("cat", "dog")


def read(folder: Path, source: str, labels: tuple[str, ...] = LABELS) -> Rows:
    spec = DataSpec(path=str(folder), test=source, input=("image",))
    return open_split(spec, "test", labels=labels, modality="image")


def write_folder(root: Path) -> None:
    for label, seeds in (("cat", (0, 1)), ("dog", (2,))):
        (root / label).mkdir(parents=True)
        for seed in seeds:
            (root / label / f"{seed}.png").write_bytes(png(seed))


def check(rows: Rows) -> None:
    assert rows.targets.tolist() == [0, 0, 1]
    for seed in range(3):
        with Image.open(io.BytesIO(png(seed))) as image:
            assert np.array_equal(np.asarray(rows[seed].inputs[0]), np.asarray(image))


def test_each_class_can_have_a_folder(tmp_path):
    write_folder(tmp_path / "test")
    check(read(tmp_path, "test"))
    check(read(tmp_path / "test", "."))
    assert labels_of(DataSpec(path=str(tmp_path), test="test", input=("image",))) == LABELS


def test_folders_are_classes_by_name_in_any_order_of_the_labels(tmp_path):
    write_folder(tmp_path / "test")
    assert read(tmp_path, "test", ("dog", "cat")).targets.tolist() == [1, 1, 0]


def test_folders_of_other_names_are_never_classes_by_their_order(tmp_path):
    write_folder(tmp_path / "test")
    with pytest.raises(BadInput, match=r"cat/0\.png: the label is not one of the classes"):
        read(tmp_path, "test", ("Katze", "Hund"))


def test_folders_of_numbers_are_indices(tmp_path):
    write_folder(tmp_path / "test")
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "10")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "2")
    labels = tuple(f"class {i}" for i in range(11))
    assert read(tmp_path, "test", labels).targets.tolist() == [10, 10, 2]


def test_parquet_with_images_inside(tmp_path):
    images = [{"bytes": png(seed), "path": None} for seed in range(3)]
    table = pa.table({"image": images, "label": [0, 0, 1]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    check(read(tmp_path, "t.parquet"))


def test_parquet_of_an_image_feature_and_a_data_set_on_disk(tmp_path):
    import datasets

    write_folder(tmp_path / "test")
    made = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "test"), cache_dir=str(tmp_path / "cache")
    )["train"]
    made.save_to_disk(tmp_path / "disk")
    made.to_parquet(tmp_path / "t.parquet")
    check(read(tmp_path, "t.parquet"))
    check(read(tmp_path, "disk"))


def test_a_table_can_name_image_files(tmp_path):
    write_folder(tmp_path / "test")
    names = ["test/cat/0.png", "test/cat/1.png", "test/dog/2.png"]
    rows = [{"image": n, "label": c} for n, c in zip(names, [0, 0, 1], strict=True)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    check(read(tmp_path, "t.json"))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    stream = io.BytesIO()
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = Image.new("I;16", (16, 16), 300) if mode == "I;16" else image.convert(mode)
    image.save(stream, format="TIFF")
    assert open_image(stream.getvalue(), Path(), "here").mode == "RGB"


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **settings)
    return stream.getvalue()


def shown(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, Path(), "here"))


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_image_is_turned_as_its_exif_says(orientation, kind):
    import datasets

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8))
    data = encoded(image, kind, exif=exif)
    expected = datasets.Image().decode_example({"bytes": data, "path": None}).convert("RGB")
    assert expected.size == ((24, 8) if orientation < 5 else (8, 24))
    assert np.array_equal(shown(data), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    settings = {"irreversible": False} if kind == "JPEG2000" else {}
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    assert np.array_equal(shown(encoded(deep, kind, **settings))[..., 0], GREYS)


def tiff(bits: int, pixels: bytes, photometric: int = 1) -> bytes:
    """A grey TIFF of two pixels, which Pillow does not write with these bits."""
    values = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    values[279] = len(pixels)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in values.items())
    start = 8 + len(pixels) + len(pixels) % 2
    head = struct.pack("<2sHI", b"II", 42, start) + pixels.ljust(start - 8, b"\0")
    return head + struct.pack("<H", len(values)) + entries + bytes(4)


def test_twelve_bits_are_scaled_to_eight():
    assert shown(tiff(12, b"\xff\xf0\x00"))[0, :, 0].tolist() == [255, 0]
    assert shown(tiff(12, b"\x80\x00\x01"))[0, :, 0].tolist() == [128, 0]


def test_deep_greys_with_white_as_zero_are_refused():
    assert shown(tiff(16, b"\xff\xff\x00\x00"))[0, :, 0].tolist() == [255, 0]
    with pytest.raises(BadInput, match="without a guess"):
        shown(tiff(16, b"\xff\xff\x00\x00", photometric=0))


def test_a_deep_image_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    assert np.array_equal(shown(encoded(deep, exif=exif))[..., 1], np.rot90(GREYS, -1))


@pytest.mark.parametrize(
    ("dtype", "message"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")]
)
def test_pixels_without_a_fixed_range_are_refused(dtype, message):
    with pytest.raises(BadInput, match="cannot be shown without a guess") as caught:
        shown(encoded(Image.fromarray(GREYS.astype(dtype)), "TIFF"))
    assert message in str(caught.value.found)


@pytest.mark.parametrize(
    ("mode", "kind", "settings"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "TIFF", {}),
        ("RGBA", "GIF", {}),
        ("P", "PNG", {"transparency": 0}),
        ("L", "PNG", {"transparency": 0}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    ],
)
def test_transparent_pixels_are_white_and_others_stay(mode, kind, settings):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[4:] = (90, 90, 90, 255)
    image = Image.fromarray(pixels)
    if "transparency" in settings:
        image = image.convert("RGB").convert("L" if mode == "P" else mode)
    found = shown(encoded(image.convert(mode), kind, **settings))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[7, 7].tolist() == [90, 90, 90]


def test_half_transparent_pixels_are_mixed_with_white():
    pixels = np.full((2, 2, 4), 128, dtype=np.uint8)
    pixels[..., :3] = 0
    assert shown(encoded(Image.fromarray(pixels)))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_pictures_counts(kind):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **settings)
    assert shown(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"no image at all", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "PostScript"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html>not found</html>", "an HTML page"),
    ],
)
def test_what_is_no_image_is_named(data, kind):
    with pytest.raises(BadInput, match="here: the image cannot be decoded") as caught:
        shown(data)
    assert kind in str(caught.value.found)


def test_a_pointer_of_git_lfs_is_named():
    with pytest.raises(BadInput, match="here is a pointer of Git LFS"):
        shown(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def test_postscript_never_starts_another_program(monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("ran"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(BadInput, match="cannot be decoded"):
        shown(encoded(Image.fromarray(GREYS), "EPS"))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("size", [(8001, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch, size):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert size[0] * size[1] > MOST_PIXELS
    with pytest.raises(BadInput, match=r"here: the image (is too large|cannot be decoded)"):
        open_image(bomb(*size), Path(), "here")


def test_the_limit_counts_pixels(monkeypatch):
    monkeypatch.setattr("restitch.modeling.data.images.MOST_PIXELS", 20 * 16)
    assert open_image(png(0, (20, 16)), Path(), "here").size == (20, 16)
    with pytest.raises(BadInput, match="here: the image is too large") as caught:
        open_image(png(0, (21, 16)), Path(), "here")
    assert caught.value.found == "21 x 16 pixels"


@pytest.mark.parametrize("data", [b"", b"no image", png(0)[:60], png(0)[:-200], bomb(100, 100)])
def test_an_unreadable_image_names_its_row(tmp_path, data):
    table = pa.table({"image": [png(0), data], "label": [0, 1]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read(tmp_path, "t.parquet")
    assert rows[0].label == 0
    with pytest.raises(BadInput, match=r"t\.parquet row 1, column 'image': the image cannot be"):
        _ = rows[1]


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "a/../../secret.png"])
def test_a_path_never_leaves_the_data(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match="outside of the folder of the data"):
        open_image(name, tmp_path / "data", "here")


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}])
def test_a_missing_image_is_an_error(value):
    with pytest.raises(BadInput, match="here is not an image"):
        open_image(value, Path(), "here")


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(BadInput, match="here: the image cannot be read"):
        open_image("a.png", tmp_path, "here")


def test_images_outside_of_class_folders_are_an_error(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "stray.png").write_bytes(png(9))
    with pytest.raises(BadInput, match="outside of the class folders"):
        read(tmp_path, ".")
