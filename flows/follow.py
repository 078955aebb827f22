"""Keep a Hugging Face folder at the champion of a line.

    the line's state --> the champion's patch --> the shards that change; the others are links
    --> a complete folder --> the link `current` switches --> a command runs

A look that fails, or a process that is killed, leaves `current` as it was.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from restitch.flows.export import ExportedModel, open_export
from restitch.flows.followed_folder import (
    FollowedFolder,
    VersionFacts,
    VersionFolder,
    changed_tensors,
)
from restitch.flows.outcome import Outcome
from restitch.merging.errors import RestitchError, Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.export import Previous
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.versions import find_version
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.workspace import workspace

Alias = Literal["champion", "candidate"]
_STDERR = 2

Action = Literal["exported", "updated", "switched", "unchanged"]

E = TypeVar("E", bound=RestitchError)


@dataclass(frozen=True)
class FollowOutcome(Outcome):
    """The folder after one look at the line.

    Attributes:
        version: the version in use.
        previous: the one that was in use before the look.
        action: `exported` wrote everything; `updated` wrote only what changed; `switched` took a
            version that was still there; `unchanged`.
        current: the link to the folder of the version.
        folder: the name of that folder.
        created_at: when the version was merged, UTC, ISO.
        written: the files that were written; `taken` has those of the version before it.
        bytes_written: of these files.
        patch_bytes: the bytes of the patch that was read; 0 if none was.
        seconds: the time that the look took, without the command.
        command: whether the command ran.
    """

    line: str
    alias: str
    version: int
    previous: int | None
    action: Action
    current: str
    folder: str
    created_at: str
    written: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    bytes_written: int = 0
    patch_bytes: int = 0
    seconds: float = 0.0
    command: bool = False


def follow_once(
    line: str, folder: Path, *, alias: Alias = "champion", command: str | None = None
) -> FollowOutcome:
    """Bring a folder to the version of an alias.

    Args:
        line: the line's name.
        folder: a folder that is absent or empty, or that follows the same line and alias.
        alias: `champion` or `candidate`.
        command: a shell command to run after the switch.

    Raises:
        BadInput: there is no such line or version, or the folder holds something else.
        Unavailable: the store or the disk is not available, or the command failed.
        Damage: the patch is damaged.
    """
    place = FollowedFolder(folder.expanduser().absolute(), line, alias)
    try:
        if place.current is None:  # before a folder is made
            find_version(_line_state(place, line), alias)
        with place.locked():
            found = _look(place, _line_state(place, line), alias)
    except RestitchError as error:
        raise _with_date(error, place) from error
    if command is None or place.announced == found.folder:
        return found
    _run(command, found)
    with place.locked():
        place.announce(found.folder)
    return replace(found, command=True)


def follow(
    line: str,
    folder: Path,
    *,
    alias: Alias = "champion",
    command: str | None = None,
    every: float = 60.0,
) -> Iterator[FollowOutcome]:
    """Keep a folder at the version of an alias; yield the first look and each change.

    A store that cannot be reached after the first look is a warning: `current` stays.

    Args:
        line: the line's name.
        folder: a folder that is absent or empty, or that follows the same line and alias.
        alias: `champion` or `candidate`.
        command: a shell command to run after each switch.
        every: the seconds between two looks.

    Raises:
        BadInput: there is no such line or version, or the folder holds something else.
        Unavailable: the store or the disk is not available at the first look.
        Damage: the patch is damaged.
    """
    yield follow_once(line, folder, alias=alias, command=command)
    trouble = False
    while True:
        time.sleep(every)
        try:
            found = follow_once(line, folder, alias=alias, command=command)
        except Unavailable as error:
            if not trouble:
                warn(f"{error}\n  looking again every {every:g} seconds")
            trouble = True
            continue
        if trouble:
            say(f"line {line} can be read again")
        trouble = False
        if found.action != "unchanged" or found.command:
            yield found


def _line_state(place: FollowedFolder, line: str) -> LineState:
    """The state of the line.

    Raises:
        BadInput: there is no such line, or it was dropped.
        Unavailable: the store is not available, or the line was there before.
    """
    space = workspace()
    if place.current is not None and Ledger(space.objects, line).find() is None:
        raise Unavailable(
            f"the store {space.objects.store.address} does not have line {line} any more",
            expected="the line that the folder follows",
            hint="check RESTITCH_HOME and RESTITCH_STORE, and that the store is mounted",
        )
    return space.ledger(line).state()


def _look(place: FollowedFolder, line_state: LineState, alias: Alias) -> FollowOutcome:
    started = time.monotonic()
    before = place.current
    version = line_state.champion if alias == "champion" else line_state.candidate
    if version is None and before is not None:
        version = before.facts.version  # there is no candidate any more
    if version is None:
        version = find_version(line_state, alias)
    update = _updated(place, before, line_state, version)
    facts = update.now.facts
    return FollowOutcome(
        line=line_state.line,
        alias=alias,
        version=version,
        previous=None if before is None else before.facts.version,
        action=update.action,
        current=str(place.link),
        folder=update.now.path.name,
        created_at=facts.created_at,
        written=update.written,
        taken=update.taken,
        bytes_written=sum(facts.sizes[name] for name in update.written),
        patch_bytes=update.patch_bytes,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Update:
    """What a look did; the fields are those of `FollowOutcome`."""

    action: Action
    now: VersionFolder
    written: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    patch_bytes: int = 0


def _updated(
    place: FollowedFolder, before: VersionFolder | None, line_state: LineState, version: int
) -> _Update:
    """Bring the folder to a version."""
    identity = (line_state.versions[version], line_state.base.weights, line_state.base.config)
    if before is not None and before.facts.identity == identity:
        return _Update("unchanged", before)
    if place.is_altered:
        warn(f"{place.link} does not hold all files that were written: it is written again")
    kept = place.find(identity)
    if kept is not None:
        place.switch(kept)
        return _Update("switched", kept)
    model = open_export(line_state.line, str(version))
    taken: tuple[str, ...] = ()

    def write(folder: Path) -> VersionFacts:
        nonlocal taken
        facts, taken = _write(model, folder, identity, before)
        return facts

    now = place.add(version, write)
    place.switch(now)
    return _Update(
        "exported" if before is None else "updated",
        now,
        tuple(name for name in now.facts.sizes if name not in taken),
        taken,
        model.record.patch_bytes,
    )


def _write(
    model: ExportedModel,
    folder: Path,
    identity: tuple[str, str, str],
    before: VersionFolder | None,
) -> tuple[VersionFacts, tuple[str, ...]]:
    """Write a version into a folder; return its facts, and the files taken from the one before."""
    title, edits = f"version {model.record.version}", model.edit_digests()
    previous = None
    if before is not None and before.facts.identity[1:] == identity[1:]:
        previous = Previous(before.path, changed_tensors(before.facts.edits, edits))
    made, taken = model.write(folder, title=title, previous=previous)
    if before is not None and not _is_as_before(made, taken, before):
        warn(f"the weights in {before.path} were changed on the disk: all are written again")
        for name in taken:
            (folder / name).unlink()
        made, taken = model.write(folder, title=title)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = VersionFacts(
        version=model.record.version,
        identity=identity,
        created_at=model.record.created_at,
        written_at=now,
        edits=edits,
        listing=made.listing().decode(),
    )
    return facts, taken


def _is_as_before(made: Checkpoint, taken: tuple[str, ...], before: VersionFolder) -> bool:
    """True if the tensors in the files that were taken have the digests of when they were written.

    It is how a file is found that somebody edited, which its size does not show.
    """
    known = frozenset(before.facts.listing.splitlines())
    lines = dict(zip(made.names, made.listing().decode().splitlines(), strict=True))
    return all(lines[name] in known for file in taken for name in made.shards[file])


def _run(command: str, found: FollowOutcome) -> None:
    """Run the user's command after a switch.

    Raises:
        Unavailable: it failed; the next look runs it again.
    """
    variables = {
        "RESTITCH_LINE": found.line,
        "RESTITCH_VERSION": str(found.version),
        "RESTITCH_FOLDER": found.current,
    }
    environment = {**os.environ, **variables}
    # Standard output belongs to the result.
    done = subprocess.run(command, shell=True, env=environment, stdout=_STDERR, check=False)
    if done.returncode:
        raise Unavailable(
            f"the command after the switch to version {found.version} of line {found.line} failed",
            expected="exit code 0",
            found=f"exit code {done.returncode}: {command}",
            hint="correct the command; the next look runs it again. The folder is switched",
        )


def _with_date(error: E, place: FollowedFolder) -> E:
    """The error with the version that stays in use, and its date."""
    now = place.current
    if now is None:
        return error
    made, written = _minute(now.facts.created_at), _minute(now.facts.written_at)
    stays = (
        f"{place.link} stays at version {now.facts.version}, merged {made} and written here"
        f" {written}"
    )
    return type(error)(
        error.summary,
        expected=error.expected,
        found=error.found,
        hint=error.hint,
        details=(stays, *error.details),
    )


def _minute(text: str) -> str:
    return f"{text[:16].replace('T', ' ')} UTC"
