"""Decide by a file's name what it is: a table, an image, hidden, or no data.

The suffixes are fixed, so that the rows of a folder do not depend on the installed Pillow. Every
file that is not read is counted, and `left_out` names the files for the user.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from restitch.merging.errors import BadInput, shortlist

TABLE_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv")
COMPRESSIONS = (".bz2", ".gz", ".xz", ".zst")
_OTHER_PACKING = (".7z", ".br", ".lz4", ".rar", ".tar", ".tgz", ".z", ".zip")

# All suffixes of the formats that Pillow decodes.
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".fit"),
    *(".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".gif", ".icb", ".icns", ".ico", ".iim"),
    *(".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx"),
    *(".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr"),
    *(".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp"),
    *(".xbm", ".xpm"),
)
# Pictures that are refused: Pillow does not decode them, or runs another program to draw them.
UNREADABLE_IMAGES = (
    *(".arw", ".bufr", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".exr", ".grib", ".hdr", ".heic"),
    *(".heif", ".jxl", ".jxr", ".mpeg", ".mpg", ".nef", ".orf", ".ps", ".raf", ".raw", ".rw2"),
    *(".svg", ".svgz", ".wmf"),
)
_SYSTEM_NAMES = {"__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "thumbs.db"}


def is_hidden(name: str) -> bool:
    """True if a file, or one of the folders in its relative path, is no data by its name."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in parts)


def table_kind(name: str) -> str | None:
    """The suffix of a table's format, without its compression; None if it is no table."""
    suffix = _last_suffix(_unpacked(name))
    return suffix if suffix in TABLE_SUFFIXES else None


def table_stem(name: str) -> str:
    """The name of a table without the suffixes of its format and compression."""
    return PurePosixPath(_unpacked(name)).stem


def compression(name: str) -> str | None:
    """The suffix of a compression; None without one."""
    suffix = _last_suffix(name)
    return suffix if suffix in COMPRESSIONS else None


def is_image(name: str) -> bool:
    """True if a file is an image by its suffix."""
    return _last_suffix(name) in IMAGE_SUFFIXES


def is_unreadable_image(name: str) -> bool:
    """True if a file is a picture of a kind that is refused."""
    return _last_suffix(name) in UNREADABLE_IMAGES


def check_table_name(file: Path) -> None:
    """Refuse a file that is no table by its name.

    Raises:
        BadInput: its suffix is unknown, or it is packed in a way that is not read.
    """
    kind, packing = table_kind(file.name), compression(file.name)
    if kind in (".arrow", ".parquet") and packing is not None:
        raise BadInput(
            f"{file} is a compressed {kind} file", hint="unpack it: it is compressed inside"
        )
    if kind is not None:
        return
    hint = "scripts of data sets are never run" if file.suffix == ".py" else None
    if file.suffix.lower() in (*COMPRESSIONS, *_OTHER_PACKING):
        hint = f"unpack it; of packed files, text tables in {', '.join(COMPRESSIONS)} are read"
    raise BadInput(
        f"{file} is not in a known format", expected=", ".join(TABLE_SUFFIXES), hint=hint
    )


def walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """All files below a folder as relative path, and whether each is hidden; links are followed.

    Raises:
        BadInput: a folder cannot be read, or is a link to a folder above it.
    """

    def refuse(error: OSError) -> None:
        if not is_hidden(os.path.relpath(error.filename, folder)):
            raise BadInput(f"{error.filename} cannot be read", found=error.strerror) from error

    for top, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        inside = Path(top).relative_to(folder)
        links = [name for name in folders if (folder / inside / name).is_symlink()]
        for name in links:
            if is_hidden(str(inside / name)):
                folders.remove(name)
            else:
                _check_link(folder, inside / name)
        for name in files:
            relative = (inside / name).as_posix()
            yield relative, is_hidden(relative)


def _check_link(folder: Path, name: Path) -> None:
    """Refuse a link to a folder that holds it: the walk would not end."""
    above = {(folder / parent).resolve() for parent in name.parents}
    if (folder / name).resolve() in above:
        raise BadInput(f"{folder / name} is a link to a folder above it", hint="remove the link")


def check_regular(folder: Path, names: Iterable[str]) -> None:
    """Refuse broken links, pipes and names that are not UTF-8 among files that are read."""
    for name in names:
        place = folder / name
        if printable(name) != name and not _is_utf8(name):
            raise BadInput(f"the name of {folder / printable(name)} is not UTF-8", hint="rename it")
        if not place.is_file():
            what = "a broken link" if place.is_symlink() else "not a regular file"
            raise BadInput(f"{place} is {what}", hint="repair or remove it")


def left_out(folder: Path, hidden: Sequence[str], others: Sequence[str], what: str) -> list[str]:
    """The sentences about files that are not read; none if there are no such files.

    Args:
        folder: the folder of a split.
        hidden: the files that are hidden by their name.
        others: the other files.
        what: what the other files are not.
    """
    parts = []
    if hidden:
        parts.append(f"{_count(hidden, 'hidden file')} ({shortened(hidden)})")
    if others:
        verb = "is" if len(others) == 1 else "are"
        parts.append(f"{_count(others, 'file')} that {verb} {what} ({shortened(others)})")
    return [f"left out of {folder}: {', '.join(parts)}"] if parts else []


def shortened(names: Sequence[str]) -> str:
    """The first names, and the number of the others, in characters that can be shown."""
    return shortlist([printable(name) for name in names])


def printable(text: str) -> str:
    """The text with escapes in place of characters that cannot be shown or stored."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _last_suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _unpacked(name: str) -> str:
    return name[: -len(packing)] if (packing := compression(name)) else name
