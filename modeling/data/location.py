"""The place of a split's rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """The files, or the data set on the hub, behind a `path` and a split.

    Attributes:
        kind: table, images, arrow or hub.
        root: the folder, or the hub id.
        files: the files to read, in order; relative to `root`.
        listed: for a table that lists the images of its folder, these images.
        notes: sentences about files that are left out.
        synsets: for images, the file that gives the class of each synset folder.
        split: for the hub, the split.
        config: for the hub, the configuration.
        revision: for the hub, the commit.
    """

    kind: str
    root: str
    files: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    synsets: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
