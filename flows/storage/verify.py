"""Is a line what its record says? The trail, every object, and each merged version rebuilt.

Everything is looked at, so that one damaged object does not hide another; what is found is
told, and nothing is changed. What the store alone cannot show, such as a trail that somebody
has rewritten whole or cut short, is compared with the acts that MLflow keeps.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from restitch.flows.promotion.versions import find_version
from restitch.merging.digests import canonical_json
from restitch.merging.errors import BadInput, Damage, GateFailed, RestitchError, Unavailable
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry, MergedRecord, replay, state_of
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.merge import is_reproducible, rebuild
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, workspace

_LOOKS = 20
_DIGEST = re.compile(r"[0-9a-f]{8,64}\Z")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        kind: damage, or a note: odd, and with an innocent explanation.
        subject: what it is about, as "version 3" or "audit entry 7".
    """

    kind: Literal["damage", "note"]
    subject: str
    text: str


@dataclass(frozen=True)
class Claim:
    """Whether an object is in merged versions.

    Attributes:
        asked: as the user named it.
        digests: what was looked for, with what each is.
        absent_from: the versions that do not hold it; each was rebuilt without it.
        present_in: those that do.
    """

    asked: str
    digests: dict[str, str]
    absent_from: tuple[int, ...]
    present_in: tuple[int, ...]


@dataclass
class Verification:
    """What was looked at, and what was found.

    Attributes:
        acts: audit entries whose chain holds.
        versions: the merged versions that were looked at.
        rebuilt: those whose recipe gave the very bytes that are stored.
        objects: digests that were compared with what is stored under them.
        mlflow: whether the trail could be compared with MLflow.
    """

    line: str
    acts: int = 0
    versions: list[int] = field(default_factory=list)
    rebuilt: list[int] = field(default_factory=list)
    objects: int = 0
    mlflow: bool = False
    findings: list[Finding] = field(default_factory=list)
    claim: Claim | None = None

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not any(found.kind == "damage" for found in self.findings)

    @property
    def exit_code(self) -> int:
        """0, that of damage, or that of a claim that does not hold."""
        if not self.intact:
            return Damage.exit_code
        return GateFailed.exit_code if self.claim is not None and self.claim.present_in else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "intact": self.intact}

    def damaged(self, subject: str, problem: RestitchError | str) -> None:
        """Note damage."""
        text = problem if isinstance(problem, str) else problem.message()
        self.findings.append(Finding("damage", subject, text))


def verify(line: str, version: str | None = None, without: str | None = None) -> Verification:
    """Compare a line with its record.

    Args:
        line: the line's name.
        version: look at this merged version alone; all of them by default.
        without: a digest, its beginning, a task or `task/version`: show that it is in none of
            the versions that are looked at.

    Raises:
        BadInput: there is no such line, version, model or digest.
    """
    space = workspace()
    ledger = space.ledger(line)
    found = Verification(line)
    # Before the trail is read: whatever is there by now must be in it, though the line goes on.
    shown, stored = _acts_in_mlflow(space, line, found), list(ledger.objects.store.list("audit"))
    line_state, trail = _check_trail(ledger, found)
    found.versions += (
        sorted(line_state.versions) if version is None else [find_version(line_state, version)]
    )
    wanted = None if without is None else _wanted(ledger, line_state, without)
    _look_beside_the_trail(ledger, trail, stored, shown, found)
    objects = _Objects(space.objects, found)
    _check_members(line_state, objects)
    _check_versions(ledger, line_state, trail, objects, found)
    found.objects = len(objects.seen)
    if wanted is not None:
        found.claim = _claim(ledger, found, str(without), wanted)
    return found


def _check_trail(ledger: Ledger, found: Verification) -> tuple[LineState, list[Entry]]:
    """The head and the acts that led to it, oldest first, as far as their chain holds."""
    line_state, newest_first = _at_one_moment(ledger, found)
    found.acts = len(newest_first)
    trail = newest_first[::-1]
    if found.intact and canonical_json(replay(trail)) != canonical_json(state_of(line_state)):
        found.damaged(
            "the head",
            f"lines/{ledger.line}/head.json says something else than the acts that led to it: "
            + _first_difference(replay(trail), state_of(line_state)),
        )
    return line_state, trail


def _at_one_moment(ledger: Ledger, found: Verification) -> tuple[LineState, list[Entry]]:
    """A head with its own trail, newest first, of a line that may go on meanwhile."""
    for _ in range(_LOOKS):
        line_state, acts = ledger.state(), list[Entry]()
        try:
            acts.extend(ledger.entries())
        except Damage as error:
            found.damaged("the audit trail", error)
            return line_state, acts
        if ledger.state().entry == line_state.entry:
            return line_state, acts
    raise Unavailable(
        f"line {ledger.line} is being changed all the time",
        found=f"another act during each of {_LOOKS} looks",
        hint="run the same command again",
    )


def _look_beside_the_trail(
    ledger: Ledger,
    trail: list[Entry],
    stored: list[str],
    shown: dict[str, str],
    found: Verification,
) -> None:
    """Acts that are not in the trail: what MLflow shows must be, what the store holds may be."""
    linked = {entry.digest for entry in trail}
    for name in stored if found.intact else ():
        digest = name.rpartition("/")[2]
        entry = None if digest in linked else _entry_of(ledger, name)
        if entry is not None:
            text = (
                f"says that it is act {entry.sequence} ({entry.kind} by {entry.actor}), and is not "
                "in the trail: left by a process that lost a race or was killed, or put there"
            )
            found.findings.append(Finding("note", f"audit entry {digest[:16]}", text))
    for digest, name in sorted(shown.items(), key=lambda item: item[1]):
        if digest not in linked:
            found.damaged(
                f"act {name}", f"MLflow shows it (entry {digest}), and it is not in the trail"
            )


def _entry_of(ledger: Ledger, name: str) -> Entry | None:
    """An entry of this line; None where it is another line's or cannot be read."""
    try:
        entry = Entry.model_validate_json(ledger.objects.store.read(name))
    except ValueError:
        return None
    return entry if entry.line == ledger.line else None


def _first_difference(one: Any, other: Any, path: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{path}/{key}")
    return f"{path} is {str(other)[:80]}, and by the acts {str(one)[:80]}"


def _acts_in_mlflow(space: Workspace, line: str, found: Verification) -> dict[str, str]:
    """The acts that MLflow shows, by digest: nobody can take one out of the trail and of it."""
    try:
        shown = space.mlflow.acts_shown(line)
    except Unavailable as error:
        text = f"MLflow cannot be asked, so a trail cut short would not show: {error.summary}"
        found.findings.append(Finding("note", "MLflow", text))
        return {}
    found.mlflow = True
    return shown


class _Objects:
    """Blobs, each compared once with the digest that it is stored under."""

    def __init__(self, objects: ObjectStore, found: Verification) -> None:
        self.objects, self.found = objects, found
        self.seen: dict[str, bool] = {}

    def check(self, subject: str, digests: Iterable[str]) -> bool:
        """Whether all of them are what they should be; damage is noted once for each."""
        wrong = [digest for digest in digests if not self._check(subject, digest)]
        return not wrong

    def _check(self, subject: str, digest: str) -> bool:
        if digest not in self.seen:
            self.seen[digest] = True
            try:
                self.objects.blob_path(digest)
            except Damage as error:
                self.seen[digest] = False
                self.found.damaged(subject, error)
        return self.seen[digest]


def _check_members(line_state: LineState, objects: _Objects) -> None:
    for key, model in line_state.in_state("ready", "held", "replaced", "retired"):
        objects.check(f"the delta of {key}", filter(None, [model.delta]))
        objects.check(f"the statistics of {key}", model.facts.statistics.values())


def _check_versions(
    ledger: Ledger,
    line_state: LineState,
    trail: list[Entry],
    objects: _Objects,
    found: Verification,
) -> None:
    made = {
        pointer.rpartition("/")[2]: entry
        for entry in trail
        for pointer in entry.after
        if re.match(r"/versions/\d+\Z", pointer)
    }
    with working(f"verifying {len(found.versions)} versions") as progress:
        for done, number in enumerate(found.versions):
            progress(done, len(found.versions))
            subject = f"version {number}"
            try:
                record = ledger.merged(number)
                recipe = Recipe.from_json(record.recipe)
            except Damage as error:
                found.damaged(subject, error)
                continue
            problems = _contradictions(line_state, number, record, recipe, made.get(str(number)))
            for problem in problems:
                found.damaged(subject, problem)
            evidence = [d for r in record.results.values() for d in r.evaluations.values()]
            if record.retention is not None:
                evidence += record.retention.evaluations.values()
            whole = objects.check(f"{subject}, its patch", [record.patch])
            objects.check(f"{subject}, its results", [*evidence, *record.files.values()])
            deltas = [member.delta for member in recipe.members]
            read = objects.check(f"{subject}, its deltas", deltas)
            read &= objects.check(f"{subject}, its statistics", record.statistics.values())
            if read and not problems:
                _rebuild(line_state, recipe, record, whole, found)


def _contradictions(
    line_state: LineState, number: int, record: MergedRecord, recipe: Recipe, made: Entry | None
) -> list[str]:
    """What a version's record says against itself, its line or the act that made it."""
    listed = {m.task: (m.model, m.mask, m.delta) for m in recipe.members}
    recorded = {t: (m.weights, m.mask, m.delta) for t, m in record.members.items()}
    held = {
        "its record is of another line or version": (record.line, record.version)
        == (line_state.line, number),
        "its recipe has another digest than its record says": recipe.digest()
        == record.recipe_digest,
        "its recipe has other members than its record": listed == recorded,
        "its recipe is on another base than its line": recipe.base.weights
        == line_state.base.weights,
        "no act of the trail made it from this recipe and patch": made is not None
        and (made.digests.get("recipe"), made.digests.get("patch"))
        == (record.recipe_digest, record.patch),
    }
    return [problem for problem, holds in held.items() if not holds]


def _rebuild(
    line_state: LineState, recipe: Recipe, record: MergedRecord, whole: bool, found: Verification
) -> None:
    """Make a version anew from its recipe and compare the bytes."""
    subject = f"version {record.version}"
    method = get_method(recipe.method.name)
    if method.version != recipe.method.version:
        text = (
            f"was made by {method.name} {recipe.method.version}, and this restitch has "
            f"{method.version}: it is not rebuilt"
        )
        found.findings.append(Finding("note", subject, text))
        return
    try:
        made = rebuild(
            LineRef(line_state.spec, line_state.base), recipe, record.patch if whole else None
        )
    except RestitchError as error:
        found.damaged(subject, error)
        return
    if made.digest != record.patch:
        text = f"its recipe gives {made.digest}, and its record says {record.patch}"
        if _made_elsewhere(recipe):
            note = f"was made with another torch, device or number of threads: {text}"
            if made.difference is not None:
                note += f"; no weight differs by more than {made.difference:.1e} of the largest"
            found.findings.append(Finding("note", subject, note))
        else:
            found.damaged(subject, text)
    elif whole:
        found.rebuilt.append(record.version)
    else:
        say(f"{subject}: its recipe gives the bytes that its record names")


def _made_elsewhere(recipe: Recipe) -> bool:
    """Whether a patch may come out otherwise here: its method is numeric, and it was made so."""
    record = workspace().objects.lookup("patch", recipe.digest())
    return record is not None and not is_reproducible(recipe, record)


def _wanted(ledger: Ledger, line_state: LineState, asked: str) -> dict[str, str]:
    """The digests that a user means, with what each is."""
    task, _, number = asked.partition("/")
    if task in line_state.tasks:
        models = line_state.tasks[task].versions
        if number and (not number.isdigit() or int(number) not in models):
            raise BadInput(
                f"task {task} has no model {number}", found=f"models {', '.join(map(str, models))}"
            )
        some = {int(number): models[int(number)]} if number else models
        return {m.model.weights: f"{task} {n}" for n, m in some.items()}
    if not _DIGEST.match(asked):
        raise BadInput(
            f"{asked!r} is neither a task of line {line_state.line} nor a digest",
            expected="a task, task/version, or 8 to 64 hexadecimal digits",
            found=f"tasks: {', '.join(sorted(line_state.tasks)) or 'none'}",
        )
    known = _known_digests(ledger, line_state)
    found = {digest: what for digest, what in known.items() if digest.startswith(asked)}
    if len(found) > 1:
        raise BadInput(f"{asked} is the beginning of several digests", details=list(found))
    # What the line has never seen is in none of its versions either.
    return found or ({asked: "unknown to the line"} if len(asked) == 64 else _unknown(asked))


def _unknown(asked: str) -> dict[str, str]:
    raise BadInput(
        f"no digest on the line begins with {asked}",
        hint="give all 64 digits to ask for one that the line has never seen",
    )


def _known_digests(ledger: Ledger, line_state: LineState) -> dict[str, str]:
    known = {}
    for name, task in line_state.tasks.items():
        for number, model in task.versions.items():
            known[model.model.weights] = f"{name} {number}"
            known |= {d: f"the mask of {name} {number}" for d in [model.mask] if d}
            known |= {d: f"the delta of {name} {number}" for d in [model.delta] if d}
    for record in ledger.history():
        for name, member in record.members.items():
            what = f"{name} {member.version}"
            known |= {member.mask: f"the mask of {what}", member.delta: f"the delta of {what}"}
            known[member.weights] = what
    return known


def _claim(ledger: Ledger, found: Verification, asked: str, wanted: dict[str, str]) -> Claim:
    present, absent = [], []
    for number in found.versions:
        record = ledger.merged(number)
        inside = {d for m in record.members.values() for d in (m.weights, m.mask, m.delta)}
        if inside & wanted.keys():
            present.append(number)
        elif number in found.rebuilt:
            absent.append(number)
    return Claim(asked, wanted, tuple(absent), tuple(present))
