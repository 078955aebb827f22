"""Verify a line: its audit trail, every object that it names, and each merged version rebuilt.

A verification changes nothing and does not stop at the first damage. The store alone cannot show
that the whole trail was rewritten or cut short, so the trail is compared with the acts in MLflow
as well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from restitch.flows.outcome import Outcome
from restitch.flows.storage.store_check import trail_contradiction
from restitch.merging.errors import BadInput, Damage, GateFailed, RestitchError, Unavailable
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.ledger.versions import find_version
from restitch.tasks.merge import is_reproducible, rebuild
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

LINE_STATE = "the line's state"

_ATTEMPTS = 20
_DIGEST = re.compile(r"[0-9a-f]{8,64}\Z")


@dataclass(frozen=True)
class Finding:
    """A problem, or something unusual.

    Attributes:
        kind: damage, or a note on something that may have a harmless cause.
        subject: such as "version 3" or "audit entry 7".
    """

    kind: Literal["damage", "note"]
    subject: str
    text: str


@dataclass(frozen=True)
class Claim:
    """The merged versions that hold an object, and those that do not.

    Attributes:
        asked: the object as the user named it.
        digests: the digests that were looked for, each with its meaning.
        absent_from: versions without it; each was rebuilt without it.
        present_in: versions with it.
    """

    asked: str
    digests: dict[str, str]
    absent_from: tuple[int, ...]
    present_in: tuple[int, ...]


@dataclass
class Verification(Outcome):
    """The result for one line.

    Attributes:
        acts: audit entries in an unbroken chain.
        versions: the merged versions that were verified.
        rebuilt: versions whose recipe gave exactly the stored bytes.
        purged: versions whose weights were removed on purpose; only their records are compared.
        objects: blobs that were compared with their digests.
        mlflow: whether the trail was compared with MLflow.
    """

    line: str
    acts: int = 0
    versions: list[int] = field(default_factory=list)
    rebuilt: list[int] = field(default_factory=list)
    purged: list[int] = field(default_factory=list)
    objects: int = 0
    mlflow: bool = False
    findings: list[Finding] = field(default_factory=list)
    claim: Claim | None = None

    @property
    def intact(self) -> bool:
        """True if nothing is damaged."""
        return not any(finding.kind == "damage" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0, or the code of damage, or the code of a claim that does not hold."""
        if not self.intact:
            return Damage.exit_code
        return GateFailed.exit_code if self.claim is not None and self.claim.present_in else 0

    def as_dict(self) -> dict[str, Any]:
        """The fields and `intact` as plain JSON values."""
        return {**super().as_dict(), "intact": self.intact}

    def damaged(self, subject: str, problem: RestitchError | str) -> None:
        """Add damage."""
        text = problem if isinstance(problem, str) else problem.message()
        self.findings.append(Finding("damage", subject, text))

    def note(self, subject: str, text: str) -> None:
        """Add a note."""
        self.findings.append(Finding("note", subject, text))


def verify(line: str, version: str | None = None, without: str | None = None) -> Verification:
    """Compare a line with its record.

    Args:
        line: the line's name.
        version: verify only this merged version; by default all.
        without: a digest, the beginning of one, a task or `task/version`: show that none of the
            verified versions holds it.

    Raises:
        BadInput: there is no such line, version, model or digest.
    """
    return _Verifier(line).run(version, without)


class _Verifier:
    """One verification of one line."""

    def __init__(self, line: str) -> None:
        self.space = workspace()
        self.ledger: Ledger = self.space.ledger(line, dropped=True)
        self.result = Verification(line)
        self.compared: dict[str, bool] = {}

    def run(self, version: str | None, without: str | None) -> Verification:
        result = self.result
        # Read before the trail: the line may change, and its trail must hold all that exists now.
        shown, stored = self._acts_in_mlflow(), list(self.ledger.objects.store.list("audit"))
        line_state, trail = self._check_trail()
        result.versions += (
            sorted(line_state.versions) if version is None else [find_version(line_state, version)]
        )
        digests = None if without is None else _requested(self.ledger, line_state, without)
        self._check_outside_the_trail(trail, stored, shown)
        self._check_members(line_state)
        self._check_versions(line_state, trail)
        result.objects = len(self.compared)
        if digests is not None:
            result.claim = self._claim(str(without), digests)
        return result

    def _acts_in_mlflow(self) -> dict[str, str]:
        """The acts that MLflow shows, by digest."""
        try:
            shown = self.space.mlflow.acts_shown(self.ledger.line)
        except Unavailable as error:
            text = f"unavailable, so a trail cut short would go unnoticed: {error.summary}"
            self.result.note("MLflow", text)
            return {}
        self.result.mlflow = True
        return shown

    def _check_trail(self) -> tuple[LineState, list[Entry]]:
        """The line's state and the acts that led to it, oldest first, up to a break."""
        line_state, newest_first = self._read_at_one_moment()
        self.result.acts = len(newest_first)
        trail = newest_first[::-1]
        problem = trail_contradiction(line_state, trail) if self.result.intact else None
        if problem is not None:
            self.result.damaged(LINE_STATE, f"lines/{self.ledger.line}/head.json: {problem}")
        return line_state, trail

    def _read_at_one_moment(self) -> tuple[LineState, list[Entry]]:
        """The state and its trail, newest first, while others may change the line."""
        for _ in range(_ATTEMPTS):
            line_state, acts = self.ledger.state(), list[Entry]()
            try:
                acts.extend(self.ledger.entries())
            except Damage as error:
                self.result.damaged("the audit trail", error)
                return line_state, acts
            if self.ledger.state().entry == line_state.entry:
                return line_state, acts
        raise Unavailable(
            f"gave up after {_ATTEMPTS} attempts: line {self.ledger.line} kept changing",
            hint="run the same command again",
        )

    def _check_outside_the_trail(
        self, trail: list[Entry], stored: list[str], shown: dict[str, str]
    ) -> None:
        """Report acts outside of the trail: damage if MLflow shows them, a note otherwise."""
        linked = {entry.digest for entry in trail}
        for name in stored if self.result.intact else ():
            digest = name.rpartition("/")[2]
            entry = None if digest in linked else self._entry(name)
            if entry is not None:
                self.result.note(
                    f"audit entry {digest[:16]}",
                    f"claims to be act {entry.sequence} ({entry.kind} by {entry.actor}), but is "
                    "not in the trail: it comes from a process that lost a race or was killed, or "
                    "it was added by hand",
                )
        for digest, name in sorted(shown.items(), key=lambda item: item[1]):
            if digest not in linked:
                text = f"MLflow shows it (entry {digest}), but it is not in the trail"
                self.result.damaged(f"act {name}", text)

    def _entry(self, name: str) -> Entry | None:
        """An entry of this line; None if it cannot be read or belongs to another line."""
        try:
            entry = Entry.model_validate_json(self.ledger.objects.store.read(name))
        except ValueError:
            return None
        return entry if entry.line == self.ledger.line else None

    def _compare(self, subject: str, digests: Iterable[str]) -> bool:
        """Compare blobs with their digests, each once; True if all are intact."""
        damaged = [digest for digest in digests if not self._is_intact(subject, digest)]
        return not damaged

    def _is_intact(self, subject: str, digest: str) -> bool:
        if digest not in self.compared:
            self.compared[digest] = True
            try:
                self.space.objects.blob_path(digest)
            except Damage as error:
                self.compared[digest] = False
                self.result.damaged(subject, error)
        return self.compared[digest]

    def _check_members(self, line_state: LineState) -> None:
        for key, model in line_state.in_state("ready", "held", "replaced", "retired", "forgotten"):
            if model.facts.purged is not None:
                self.result.note(str(key), f"purged {model.facts.purged}")
                continue
            self._compare(f"the delta of {key}", filter(None, [model.delta]))
            self._compare(f"the statistics of {key}", model.facts.statistics.values())

    def _check_versions(self, line_state: LineState, trail: list[Entry]) -> None:
        versions = self.result.versions
        with working(f"verifying {len(versions)} versions") as progress:
            for done, number in enumerate(versions):
                progress(done, len(versions))
                made = next((act for act in trail if f"/versions/{number}" in act.after), None)
                try:
                    self._check_version(line_state, number, made)
                except Damage as error:
                    self.result.damaged(f"version {number}", error)

    def _check_version(self, line_state: LineState, number: int, made: Entry | None) -> None:
        """Check a version's record and blobs, and rebuild it if its inputs are intact.

        Raises:
            Damage: its record cannot be read.
        """
        subject = f"version {number}"
        record = self.ledger.merged(number)
        recipe = Recipe.from_json(record.recipe)
        problems = _contradictions(line_state, number, record, recipe, made)
        for problem in problems:
            self.result.damaged(subject, problem)
        if number in line_state.purged:
            self.result.purged.append(number)
            self.result.note(subject, f"purged {line_state.purged[number]}")
            return
        results = [d for r in record.results.values() for d in r.evaluations.values()]
        if record.retention is not None:
            results += record.retention.evaluations.values()
        has_patch = self._compare(f"{subject}, its patch", [record.patch])
        self._compare(f"{subject}, its results", [*results, *record.files.values()])
        deltas = [member.delta for member in recipe.members]
        has_inputs = self._compare(f"{subject}, its deltas", deltas)
        has_inputs &= self._compare(f"{subject}, its statistics", record.statistics.values())
        if has_inputs and not problems:
            self._rebuild(line_state, recipe, record, has_patch)

    def _rebuild(
        self, line_state: LineState, recipe: Recipe, record: MergedRecord, has_patch: bool
    ) -> None:
        """Make a version again from its recipe and compare the bytes."""
        subject, used = f"version {record.version}", recipe.method
        method = get_method(used.name)
        if method.version != used.version:
            text = (
                f"is not rebuilt: it was made by {used.name} {used.version}, and this restitch "
                f"has {used.name} {method.version}"
            )
            self.result.note(subject, text)
            return
        line = LineRef(line_state.spec, line_state.base)
        try:
            made = rebuild(line, recipe, record.patch, stored=has_patch)
        except RestitchError as error:
            self.result.damaged(subject, error)
            return
        if made.digest != record.patch:
            text = f"its recipe gives patch {made.digest}, but its record names {record.patch}"
            if self._made_elsewhere(recipe):
                text = f"was made with another torch, device or number of threads: {text}"
                if made.difference is not None:
                    text += f"; weights differ by at most {made.difference:.1e} of the largest"
                self.result.note(subject, text)
            else:
                self.result.damaged(subject, text)
        elif has_patch:
            self.result.rebuilt.append(record.version)
        else:
            say(f"{subject}: its recipe gives the bytes that its record names")

    def _made_elsewhere(self, recipe: Recipe) -> bool:
        """True if the method is numeric and ran in an environment that may give other bytes."""
        record = self.space.objects.lookup("patch", recipe.digest())
        return record is not None and not is_reproducible(recipe, record, self.space)

    def _claim(self, asked: str, digests: dict[str, str]) -> Claim:
        present, absent = [], []
        for number in self.result.versions:
            members = self.ledger.merged(number).members.values()
            inside = {d for m in members for d in (m.weights, m.mask, m.delta)}
            if inside & digests.keys():
                present.append(number)
            elif number in self.result.rebuilt:
                absent.append(number)
        return Claim(asked, digests, tuple(absent), tuple(present))


def _contradictions(
    line_state: LineState, number: int, record: MergedRecord, recipe: Recipe, made: Entry | None
) -> list[str]:
    """Contradictions of a version's record with itself, its line, or the act that made it."""
    listed = {m.task: (m.model, m.mask, m.delta) for m in recipe.members}
    recorded = {t: (m.weights, m.mask, m.delta) for t, m in record.members.items()}
    checks = {
        "its record belongs to another line or version": (record.line, record.version)
        == (line_state.line, number),
        "its recipe does not have the digest in its record": recipe.digest()
        == record.recipe_digest,
        "its recipe has other members than its record": listed == recorded,
        "its recipe has another base than its line": recipe.base.weights == line_state.base.weights,
        "no act in the trail made it from this recipe and patch": made is not None
        and (made.digests.get("recipe"), made.digests.get("patch"))
        == (record.recipe_digest, record.patch),
    }
    return [problem for problem, holds in checks.items() if not holds]


def _requested(ledger: Ledger, line_state: LineState, asked: str) -> dict[str, str]:
    """The digests that a user means, each with its meaning."""
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
    matches = {digest: meaning for digest, meaning in known.items() if digest.startswith(asked)}
    if len(matches) > 1:
        raise BadInput(f"several digests begin with {asked}", details=list(matches))
    if not matches and len(asked) < 64:
        raise BadInput(
            f"no digest on the line begins with {asked}",
            hint="to ask for a digest that the line has never seen, give all 64 digits",
        )
    # A digest that the line has never seen is in none of its versions either.
    return matches or {asked: "unknown to the line"}


def _known_digests(ledger: Ledger, line_state: LineState) -> dict[str, str]:
    known = {}
    for name, task in line_state.tasks.items():
        for number, model in task.versions.items():
            known[model.model.weights] = f"{name} {number}"
            known |= {d: f"the mask of {name} {number}" for d in [model.mask] if d}
            known |= {d: f"the delta of {name} {number}" for d in [model.delta] if d}
    for record in ledger.history():
        for name, member in record.members.items():
            owner = f"{name} {member.version}"
            known |= {member.mask: f"the mask of {owner}", member.delta: f"the delta of {owner}"}
            known[member.weights] = owner
    return known
