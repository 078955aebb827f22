"""ImageNet: OpenAI's curated class names and prompts, and the class of each synset folder.

Classes are in the order of their sorted synset ids. Some of the synsets alone do not give the
order of all, so it is never guessed: a file then gives the class of each.
"""

import ast
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

from restitch.merging.errors import BadInput

SYNSETS_FILE = "synsets.txt"

_PACKAGE = "open_clip_torch"
_METADATA = "open_clip/zero_shot_metadata.py"
_SYNSET = re.compile(r"n\d{8}")


def openai_imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1000 curated class names and the 80 prompt templates with `{}` for the name.

    They are parsed from the installed `open_clip_torch`, which is not imported: that would need
    torchvision.

    Raises:
        BadInput: the package is not installed, or its file has an unknown form.
    """
    try:
        located = importlib.metadata.distribution(_PACKAGE).locate_file(_METADATA)
        source = Path(str(located)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise BadInput(
            "the word openai stands for names and templates in the package open_clip_torch, "
            "which is not installed",
            hint=f"run pip install --no-deps {_PACKAGE}, or give files of labels and templates",
        ) from error
    return parse_metadata(source)


def parse_metadata(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parse class names and templates from the text of open_clip's `zero_shot_metadata.py`."""
    values: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    try:
        names = tuple(ast.literal_eval(values["IMAGENET_CLASSNAMES"]))
        listed = values["OPENAI_IMAGENET_TEMPLATES"]
        if not isinstance(listed, ast.List | ast.Tuple):
            raise TypeError("the templates are not a list")  # noqa: TRY301
        prompts = tuple(_template(element) for element in listed.elts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{_METADATA} of {_PACKAGE} has an unknown form",
            found=error,
            hint="give files of labels and templates",
        ) from error
    return names, prompts


def _template(node: ast.expr) -> str:
    """Turn `lambda c: f'a photo of a {c}.'` into `a photo of a {}.`."""
    if not isinstance(node, ast.Lambda) or not isinstance(node.body, ast.JoinedStr):
        raise TypeError("a template is not a lambda with one f-string")
    parts = []
    for part in node.body.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            parts.append("{}")
        else:
            raise TypeError("a template formats something other than the name")
    return "".join(parts)


def are_synsets(folders: Sequence[str]) -> bool:
    """True if all folders are named by synset ids, such as `n01440764`."""
    return bool(folders) and all(_SYNSET.fullmatch(name) for name in folders)


def synset_classes(
    folders: Sequence[str], labels: Sequence[str], file: Path | None, where: str
) -> dict[str, int]:
    """The class index of each synset folder.

    Args:
        folders: synset ids.
        labels: the names of the classes.
        file: lines `synset<TAB>name`; required if there are fewer folders than labels.
        where: the name of the data in errors.

    Raises:
        BadInput: the order is unknown, or the file does not fit the folders or labels.
    """
    if file is None:
        if len(folders) != len(labels):
            raise BadInput(
                f"{where} has {len(folders)} synset folders for {len(labels)} labels",
                expected=f"one folder per label, or a file {SYNSETS_FILE} next to the folders",
                hint=f"write {SYNSETS_FILE} with one line per folder: synset<TAB>name",
            )
        return {name: index for index, name in enumerate(sorted(folders))}
    listed = _read_synsets(file)
    missing = [name for name in folders if name not in listed]
    if missing:
        raise BadInput(f"{file} does not list all synsets of {where}", details=missing)
    if len(listed) == len(labels):
        ordered = sorted(listed)
        if [listed[synset] for synset in ordered] == list(labels):
            return {name: ordered.index(name) for name in folders}
    unknown = [f"{name}: {listed[name]}" for name in folders if listed[name] not in labels]
    if unknown:
        raise BadInput(f"{file} has names that are not among the labels", details=unknown)
    shared = [f"{name}: {listed[name]}" for name in folders if labels.count(listed[name]) > 1]
    if shared:
        raise BadInput(
            f"{file} has names that several classes share",
            details=shared,
            hint="list all synsets, in the order and with the names of the labels",
        )
    return {name: labels.index(listed[name]) for name in folders}


def _read_synsets(file: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        synset, tab, name = line.partition("\t")
        if not tab or not _SYNSET.fullmatch(synset) or synset in listed:
            raise BadInput(
                f"{file} line {number} cannot be used",
                expected="synset<TAB>name, and each synset once",
                found=line,
            )
        listed[synset] = name.strip()
    return listed
