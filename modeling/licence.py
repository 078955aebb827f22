"""Read the licence of a model folder from the YAML front matter of its README.md.

The file is not trusted: only its beginning is read, only the texts of three keys are used, and
anything unusual counts as no licence. Nothing is guessed from other files or from the network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from restitch.merging.errors import BadInput
from restitch.merging.files.safe_open import open_regular

CARD = "README.md"
MAX_BYTES = 64 << 10
_MAX_EVENTS = 5_000
_MAX_DEPTH = 20
_MAX_TEXT = 300

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}\Z")
_LINK = re.compile(r"(https?://[!-~]+|[A-Za-z0-9][\w./-]*)\Z", re.ASCII)


@dataclass(frozen=True)
class Licence:
    """A licence as the model's owner states it.

    Attributes:
        ids: the hub's identifiers, such as `apache-2.0` or `other`; all of them apply.
        name: the name of an `other` licence.
        link: the address of its text, or a file next to the card.
    """

    ids: tuple[str, ...]
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        """The licence in one line."""
        return ", ".join((*self.ids, *(text for text in (self.name, self.link) if text)))


def read_licence(path: Path) -> Licence | None:
    """The licence that a model folder, or a card itself, states, or None."""
    card = path / CARD if path.is_dir() else path
    if not card.is_file():  # reading a pipe or a device might never end
        return None
    try:
        with open_regular(card) as file:
            data = file.read(MAX_BYTES)
        # The limit may cut a character in the text after the front matter.
        return _stated(_front_matter(data.decode("utf-8-sig", errors="replace")))
    except (OSError, yaml.YAMLError, ValueError, BadInput):
        return None


def _front_matter(text: str) -> str:
    first, *lines = text.splitlines() or [""]
    if first.rstrip() != "---":
        raise ValueError("a card without front matter")
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if not ends:
        raise ValueError("front matter without an end")
    return "\n".join(lines[: ends[0]])


def _stated(text: str) -> Licence | None:
    _measure(text)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return None
    keys: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value.startswith("license"):
            if key.value in keys:
                return None  # stated twice: ambiguous
            keys[key.value] = value
    ids = _ids(keys.get("license"))
    if not ids:
        return None
    name, link = _text(keys.get("license_name")), _text(keys.get("license_link"))
    return Licence(ids, name, link if link and _LINK.match(link) else None)


def _measure(text: str) -> None:
    """Refuse front matter that is large, deep, or has aliases."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH or number > _MAX_EVENTS:
            raise ValueError("front matter that is too large or has aliases")


def _ids(node: yaml.Node | None) -> tuple[str, ...]:
    listed = isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq"
    nodes = node.value if listed and node is not None else [node]
    texts = [_text(one) for one in nodes]
    ids = [text for text in texts if text is not None and _ID.match(text)]
    # One unreadable identifier makes the whole statement unknown.
    return tuple(sorted(set(ids))) if len(ids) == len(texts) else ()


def _text(node: yaml.Node | None) -> str | None:
    """A text of one line, or None for anything else."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        return None
    text: str = node.value.strip()
    return text if text.isprintable() and 0 < len(text) <= _MAX_TEXT else None
