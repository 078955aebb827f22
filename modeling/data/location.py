"""Where the rows of a split lie."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """What a `path` with a split stands for.

    Attributes:
        kind: table, images, arrow or hub.
        root: the folder, or the hub id.
        files: what is read, in order; relative to `root`.
        synsets: for images, the file that says which class a synset folder is.
        split: for the hub, the split.
        config: for the hub, the configuration.
        revision: for the hub, the commit.
    """

    kind: str
    root: str
    files: tuple[str, ...] = ()
    synsets: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
