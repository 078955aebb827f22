"""Decide what a `path` and a split mean.

A split is a file, several files by a pattern, shards, a folder of tables or images, a split of a
data set on disk or on the hub. Reading and the digest both use the same `Location`, so a key always
identifies the bytes that were read. A file that is not read is named in the location's notes.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular
from restitch.modeling.data.file_kinds import (
    TABLE_SUFFIXES,
    check_regular,
    check_table_name,
    compression,
    is_hidden,
    is_image,
    is_unreadable_image,
    left_out,
    printable,
    shortened,
    table_kind,
    table_stem,
    walk,
)
from restitch.modeling.data.imagenet import SYNSETS_FILE
from restitch.modeling.data.location import Location

_SHARD = re.compile(r"-(\d+)(?:-of-(\d+))?")
# Names that `datasets` takes for splits: files of two splits are not one split.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_LISTING = "metadata"  # the table that describes the images of its folder


def locate(path: str, source: str, *, revision: str | None = None) -> Location:
    """Decide what a `path` and a split mean; an existing local path wins.

    Raises:
        BadInput: there is nothing of that name; lists what there is.
    """
    root = Path(path)
    if not root.exists():
        from restitch.modeling.data.hub import locate_on_hub

        return locate_on_hub(path, source, revision=revision)
    if root.is_file():
        raise BadInput(
            f"the path of the data, {path}, is a file",
            expected="a folder",
            hint=f"set path: {root.parent} and name {root.name} as train, validation or test",
        )
    target = root / source
    if target.is_file():
        check_table_name(target)
        return Location("table", str(target.parent), (target.name,))
    if target.is_dir():
        return _locate_folder(target, root)
    if target.exists() or target.is_symlink():
        check_regular(root, [source])
    files = _split_files(root, source)
    if files:
        return Location("table", str(root), tuple(files))
    raise BadInput(
        f"there is no file, folder or split {source!r} in {path}",
        found=_content(root),
        hint="set train:, validation: or test: to one of these names",
    )


def _split_files(root: Path, source: str) -> list[str]:
    """The files of a split in a folder: of its name, its shards, or those of a pattern."""
    if any(sign in source for sign in "*?[") and ".." not in PurePosixPath(source).parts:
        found = [place.relative_to(root).as_posix() for place in root.glob(source.lstrip("/"))]
        files = sorted(name for name in found if not is_hidden(name) and not (root / name).is_dir())
        for name in files:
            check_table_name(root / name)
    else:
        names = sorted(entry.name for entry in root.iterdir() if not is_hidden(entry.name))
        files = [name for name in names if table_kind(name) and _is_of_split(name, source)]
        _check_shards(root, source, files)
    check_regular(root, files)
    kinds = {(table_kind(name), compression(name)) for name in files}
    if len(kinds) > 1:
        raise BadInput(
            f"{source!r} in {root} is ambiguous",
            found=", ".join(files),
            hint="give the whole name of the file",
        )
    return files


def _is_of_split(name: str, split: str) -> bool:
    """True for `train` and for a shard of it, `train-00000-of-00002`."""
    stem = table_stem(name)
    return stem == split or (
        stem.startswith(split) and _SHARD.fullmatch(stem.removeprefix(split)) is not None
    )


def _check_shards(root: Path, split: str, files: Sequence[str]) -> None:
    """Refuse a split of which a shard is missing, or that is there twice."""
    shards = [_SHARD.fullmatch(table_stem(name).removeprefix(split)) for name in files]
    counts = {None if shard is None else shard[2] for shard in shards}
    if len(counts) > 1:
        raise BadInput(
            f"{split!r} in {root} is ambiguous",
            expected="one file, or all shards of one split",
            found=shortened(files),
            hint="give the whole name of the file, or remove the old files",
        )
    numbers = sorted(int(shard[1]) for shard in shards if shard is not None)
    count = int(next(iter(counts), None) or 0)
    if count and numbers != list(range(count)):
        missing = [f"{number:05d}" for number in range(count) if number not in numbers]
        raise BadInput(
            f"{split!r} in {root} does not have all of its {count} shards",
            found=f"missing: {shortened(missing) or 'none'}; there: {shortened(files)}",
            hint="fetch the missing files",
        )


def _locate_folder(folder: Path, root: Path) -> Location:
    if (folder / "state.json").is_file():
        return Location("arrow", str(folder), _saved_files(folder))
    names = list(walk(folder))
    hidden = sorted(name for name, is_no_data in names if is_no_data)
    files = sorted(name for name, is_no_data in names if not is_no_data)
    images = [name for name in files if is_image(name)]
    tables = [name for name in files if table_kind(name) and "/" not in name]
    listing = [name for name in tables if table_stem(name) == _LISTING]
    if images and not listing:
        return _locate_images(folder, root, files, hidden)
    if images:
        # One row for each image, in the form of `datasets`.
        tables = listing
    check_regular(folder, tables)
    kinds = {(table_kind(name), compression(name)) for name in tables}
    if len(kinds) == 1:
        for name in tables:
            check_table_name(folder / name)
        _check_one_split(folder, tables)
        known = {*tables, *images}
        others = [name for name in files if name not in known]
        notes = left_out(folder, hidden, others, "not read")
        return Location(
            "table", str(folder), tuple(tables), listed=tuple(images), notes=tuple(notes)
        )
    scripts = any(name.endswith(".py") for name in files)
    raise BadInput(
        f"{folder} does not hold data in a known form",
        expected=f"images in folders of classes, or one kind of {', '.join(TABLE_SUFFIXES)}",
        found=_suffixes(files) or _content(folder),
        hint="scripts of data sets are never run; save the rows as a file" if scripts else None,
    )


def _locate_images(folder: Path, root: Path, files: Sequence[str], hidden: list[str]) -> Location:
    """Images in folders of classes."""
    images = [name for name in files if is_image(name)]
    unreadable = [name for name in files if is_unreadable_image(name)]
    if unreadable:
        raise BadInput(
            f"{folder} has {len(unreadable)} images of a kind that is not read",
            found=shortened(unreadable),
            hint="save them as PNG or JPEG, or move them elsewhere",
        )
    check_regular(folder, images)
    places = (folder / SYNSETS_FILE, root / SYNSETS_FILE)
    synsets = next((str(file) for file in places if file.is_file()), None)
    read = {*images, SYNSETS_FILE}
    others = [name for name in files if name not in read]
    notes = left_out(folder, hidden, others, "no images by their names")
    return Location("images", str(folder), tuple(images), notes=tuple(notes), synsets=synsets)


def _saved_files(folder: Path) -> tuple[str, ...]:
    """The files of a split that `datasets` saved, in the order of its rows.

    The digest covers them and not state.json, whose fingerprint changes without the rows.
    """
    state = folder / "state.json"
    try:
        with open_regular(state) as file:
            content = json.loads(file.read().decode("utf-8"))
        names = tuple(str(entry["filename"]) for entry in content["_data_files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{state} cannot be read", found=error) from error
    if content.get("_indices_data_files") or not names:
        raise BadInput(
            f"{folder} is a data set with an index over its rows, or without rows",
            hint="save it again after flatten_indices()",
        )
    if any(Path(name).name != name for name in names):
        raise BadInput(f"{state} names files outside of its folder")
    check_regular(folder, names)
    return names


def _check_one_split(folder: Path, tables: Sequence[str]) -> None:
    """Refuse to read files of several splits as one."""
    stems = [_SHARD.split(table_stem(name))[0].lower() for name in tables]
    if len({_SPLITS[stem] for stem in stems if stem in _SPLITS}) > 1:
        raise BadInput(
            f"{folder} has files of several splits",
            found=shortened(tables),
            hint="name one of them as train, validation or test",
        )


def _suffixes(files: Sequence[str]) -> str:
    """The kinds of files in a folder of folders, with their numbers."""
    if not any("/" in name for name in files):
        return ""
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in files)
    return ", ".join(f"{count} files of {printable(kind)}" for kind, count in counts.most_common(5))


def _content(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return shortened(names) or "nothing"
