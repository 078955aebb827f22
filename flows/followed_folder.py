"""The folder of `restitch follow`: complete versions, and a link to the one in use.

    DIR/current      a link to the version in use, which switches in one step
    DIR/versions/7   a complete Hugging Face folder; the last two versions are kept
    DIR/follow.json  the line and the alias, and the version that was announced last

A version appears under its name only when all of its files are on the disk, with a list of them in
`.follow.json`. A process that is killed leaves a hidden file or folder, which the next one removes.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import Field, ValidationError

from restitch.flows.output_folder import appearing
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput
from restitch.registry.record import Record
from restitch.registry.store.disk import explained, locked, sync, write_durably

FORMAT = 1
CURRENT = "current"

_VERSIONS, _STATE, _FACTS, _LOCK = "versions", "follow.json", ".follow.json", ".lock"
_TEMPORARY = (
    f".{CURRENT}.*",
    f".{_STATE}.*",
    *(f"{_VERSIONS}/.*.{kind}" for kind in ("partial", "replaced", "removed")),
)
_KEPT = 2


class Followed(Record):
    """What a folder follows.

    Attributes:
        announced: the name of the version's folder after whose switch the command ran.
    """

    format: int = FORMAT
    line: str
    alias: str
    announced: str | None = None


class VersionFacts(Record):
    """A version that was written, and what tells whether its folder is still complete.

    Attributes:
        version: its number on the line.
        identity: the digests of the version's record, and of the weights and the configuration of
            the base.
        created_at: when the version was merged, UTC, ISO; `written_at`: when it was written here.
        edits: the digests of what the patch holds, by tensor.
        listing: that of the checkpoint, with the digest of each tensor.
        sizes: the bytes of each file.
    """

    version: int
    identity: tuple[str, str, str]
    created_at: str
    written_at: str
    edits: dict[str, str] = Field(default_factory=dict)
    listing: str
    sizes: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class VersionFolder:
    """A complete version in the folder."""

    path: Path
    facts: VersionFacts


class FollowedFolder:
    """The folder of a follower.

    Args:
        root: its path, which may not exist yet.
        line: the line that it follows.
        alias: `champion` or `candidate`.

    Raises:
        BadInput: something else is there.
    """

    def __init__(self, root: Path, line: str, alias: str) -> None:
        self.root = root
        self.link = root / CURRENT
        self._versions = root / _VERSIONS
        self._wanted = Followed(line=line, alias=alias)
        self._check()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone, and remove what a killed process left.

        Raises:
            BadInput: something else is there.
            Unavailable: the disk refuses.
        """
        with explained(self.root, "write"):
            self._versions.mkdir(parents=True, exist_ok=True)
            with locked(self.root / _LOCK):
                self._check()
                self._sweep()
                if not (self.root / _STATE).exists():
                    self._write_state(self._wanted)
                yield

    @property
    def current(self) -> VersionFolder | None:
        """The version in use, if its folder is complete."""
        target = self._target()
        return None if target is None else _read(target)

    @property
    def is_altered(self) -> bool:
        """True if there is a version in use, and its folder is not as it was written."""
        return self._target() is not None and self.current is None

    @property
    def announced(self) -> str | None:
        """The name of the version's folder for which the command ran last."""
        state = self._state()
        return None if state is None else state.announced

    def announce(self, name: str) -> None:
        """Remember the version's folder for which the command ran."""
        state = self._wanted.model_copy(update={"announced": name})
        self._write_state(state)

    def find(self, identity: tuple[str, str, str]) -> VersionFolder | None:
        """The complete folder of a version, if it is kept; the one in use is preferred."""
        for path in self._kept():
            found = _read(path)
            if found is not None and found.facts.identity == identity:
                return found
        return None

    def add(self, version: int, write: Callable[[Path], VersionFacts]) -> VersionFolder:
        """Make a version appear, complete and on the disk.

        Args:
            version: its number.
            write: writes all files into a folder, and returns the facts without their sizes.
        """
        name, number = str(version), 1
        while (self._versions / name).exists():
            number += 1
            name = f"{version}.{number}"
        with appearing(self._versions / name) as building:
            facts = write(building)
            files = [path for path in building.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(building)): path.stat().st_size for path in files}
            facts = facts.model_copy(update={"sizes": dict(sorted(sizes.items()))})
            for path in files:
                sync(path)
            write_durably(building / _FACTS, canonical_json(facts.to_json()))
            for path in (*(each for each in building.rglob("*") if each.is_dir()), building):
                sync(path)
        sync(self._versions)
        return VersionFolder(self._versions / name, facts)

    def switch(self, to: VersionFolder) -> None:
        """Use a version from now on, in one step; keep the one before it and no other."""
        before = self._target()
        if before is not None and before.is_dir():
            os.utime(before)  # its time tells when it was last in use
        temporary = self.root / f".{CURRENT}.{uuid4().hex[:8]}"
        temporary.symlink_to(Path(_VERSIONS, to.path.name))
        temporary.replace(self.link)
        sync(self.root)
        self._remove_old()

    def _check(self) -> None:
        """Refuse a folder of something else."""
        if self.root.is_symlink() and not self.root.exists():
            raise BadInput(f"{self.root} is a link to nothing", hint="choose another folder")
        if self.root.exists() and not self.root.is_dir():
            raise BadInput(
                f"{self.root} is not a folder",
                expected="a folder that is absent or empty",
                hint="choose another path",
            )
        state = self._state()
        if state is None:
            others = [path.name for path in _visible(self.root) if path.name != _VERSIONS]
            if others:
                raise BadInput(
                    f"{self.root} is not empty and follows no line",
                    expected="a folder that is absent or empty, or that `restitch follow` made",
                    found=", ".join(sorted(others)[:5]),
                    hint="choose another folder",
                )
        elif (state.line, state.alias) != (self._wanted.line, self._wanted.alias):
            raise BadInput(
                f"{self.root} follows the {state.alias} of line {state.line}",
                expected=f"a folder of the {self._wanted.alias} of line {self._wanted.line}",
                hint="use a folder of its own for each line and alias",
            )
        if self.link.exists() and not self.link.is_symlink():
            raise BadInput(
                f"{self.link} is not a link",
                expected=f"a link to a folder in {self._versions}",
                hint="move it away and run the command again",
            )

    def _state(self) -> Followed | None:
        path = self.root / _STATE
        try:
            return Followed.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError as error:
            raise BadInput(
                f"{path} cannot be read",
                expected="the file as `restitch follow` wrote it",
                found=f"{error.error_count()} wrong values",
                hint="remove the folder, and follow the line again",
            ) from error

    def _write_state(self, state: Followed) -> None:
        temporary = self.root / f".{_STATE}.{uuid4().hex[:8]}"
        write_durably(temporary, canonical_json(state.to_json()) + b"\n")
        temporary.replace(self.root / _STATE)
        sync(self.root)

    def _target(self) -> Path | None:
        """The folder that the link names, which may not exist."""
        return self._versions / self.link.readlink().name if self.link.is_symlink() else None

    def _kept(self) -> list[Path]:
        """The version in use first, then the others, the last used first."""
        target = self._target()
        return sorted(
            _visible(self._versions), key=lambda path: (path != target, -path.stat().st_mtime_ns)
        )

    def _remove_old(self) -> None:
        target, kept = self._target(), self._kept()
        broken = [path for path in kept if path != target and _read(path) is None]
        for path in [*[path for path in kept if path not in broken][_KEPT:], *broken]:
            hidden = path.with_name(f".{path.name}.{uuid4().hex[:8]}.removed")
            path.rename(hidden)
            _remove(hidden)

    def _sweep(self) -> None:
        """Remove what a killed process left; nobody else writes here."""
        leftovers = [path for name in _TEMPORARY for path in self.root.glob(name)]
        for path in leftovers:
            _remove(path)
        self._remove_old()


def changed_tensors(before: Mapping[str, str], after: Mapping[str, str]) -> frozenset[str]:
    """The tensors that two versions of one base edit differently."""
    return frozenset(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; what a reader on a network disk holds goes later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def _read(path: Path) -> VersionFolder | None:
    """A version, or None if its folder is not as it was written."""
    try:
        facts = VersionFacts.model_validate_json((path / _FACTS).read_bytes())
        sizes = {name: (path / name).stat().st_size for name in facts.sizes}
    except (OSError, ValidationError):
        return None
    return VersionFolder(path, facts) if sizes == facts.sizes else None
