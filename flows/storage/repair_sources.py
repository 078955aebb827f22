"""Sources from which a damaged object can be restored.

A `Recovery` writes its result to a file; the caller compares it with the digest of the object.
Acts and records have a copy in MLflow only. A model's file comes from the model's source, or from
a copy on this machine. All other objects are computed from their inputs.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from restitch.flows.promotion.snapshot import line_with_one_method, retention_task
from restitch.flows.promotion.versions import member_of, members_of
from restitch.flows.promotion.what_if import prepare
from restitch.flows.storage.store_check import Projection, is_complete, known_lines
from restitch.merging.digests import canonical_json, digest_file
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.ledger.ledger import state_after
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.outcomes import touched_models
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.ledger.references import COPY_SCHEME, SPECIALISTS, Reference
from restitch.registry.maintenance.inventory import Inventory
from restitch.registry.sources.resolve import fetch_again
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import evaluated
from restitch.tasks.inputs.checkpoints import list_again, open_base
from restitch.tasks.localize import write_delta
from restitch.tasks.merge import make_recipe, write_patch_of
from restitch.tasks.research.experts import write_parts
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace
from restitch.tasks.statistics import Statistic, needed, write_statistic_of

P = ParamSpec("P")
# The task, the weights, and the model whose head they use.
EvaluationInputs = tuple[TaskSpec, WeightsRef, ModelRef | None]

_NUMERIC = " (other hardware may give other bytes)"


@dataclass(frozen=True)
class Recovery:
    """One way to restore an object.

    Attributes:
        source: the inputs, in words.
        write: a function that writes the result to a new file, in a folder with enough space.
    """

    source: str
    write: Callable[[Path], object]


@dataclass(frozen=True)
class NamedStatistic:
    """A statistic that a version or a model names.

    Attributes:
        line: the line when the statistic was made.
        source: the version or model, in words.
        made_by: the process that made the version or model.
    """

    digest: str
    statistic: Statistic
    line: LineRef
    source: str
    made_by: Any


class RecoverySources:
    """Sources for the objects of one store."""

    def __init__(self, space: Workspace, inventory: Inventory, projection: Projection) -> None:
        self.space = space
        self.inventory = inventory
        self.projection = projection

    def of(self, name: str) -> Iterator[Recovery]:
        """The ways to restore an act or a blob, the most reliable first."""
        kind, _, digest = name.partition("/")
        if kind == "audit":
            yield from self._in_mlflow(digest)
            return
        references = self.inventory.references.get(digest, [])
        yield from self._copies(digest, references)
        seen = set[str]()
        for reference in references:
            for recovery in self._of_role(reference):
                if recovery.source not in seen:
                    seen.add(recovery.source)
                    yield recovery

    def _of_role(self, reference: Reference) -> Iterator[Recovery]:
        if reference.role == "record":
            return self._in_mlflow(reference.digest)
        sources = {
            "patch": self._patch,
            "delta": self._delta,
            "result": self._result,
            "statistic": self._statistic,
            "listing": self._listing,
            "manifest": self._model,
            "file": self._model,
            "experts": self._specialists,
            "expert": self._specialists,
        }
        source = sources.get(reference.role)
        return iter(()) if source is None else source(reference)

    def _in_mlflow(self, digest: str) -> Iterator[Recovery]:
        for line in known_lines(self.inventory):
            try:
                data = self.projection.copy_of(line, digest)
            except Unavailable:
                return
            if data is not None:
                yield Recovery(f"its copy in MLflow (line {line})", _with(Path.write_bytes, data))

    def _copies(self, digest: str, references: list[Reference]) -> Iterator[Recovery]:
        """Copies in this machine's cache of a bucket's objects and of unpacked models."""
        cache = self.space.home.cache
        paths = [*(cache / "store").glob(f"**/blobs/{digest}")]
        for each in references:
            if each.role == "file" and Path(each.weights).name == each.weights:
                paths += (cache / "sources").glob(f"*/{each.weights}")
        for path in paths:
            if path.is_file() and digest_file(path) == digest:
                yield Recovery("a copy in this machine's cache", partial(shutil.copyfile, path))
                return
        folder = cache / "sources" / digest
        if folder.is_dir() and any(each.role == "manifest" for each in references):
            files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
            data = canonical_json({"files": files})
            yield Recovery("the files in this machine's cache", _with(Path.write_bytes, data))

    def _patch(self, reference: Reference) -> Iterator[Recovery]:
        for record in self.inventory.records.values():
            if record.patch == reference.digest and record.line in self.inventory.line_states:
                line = _line(self.inventory.line_states[record.line])
                recipe = Recipe.from_json(record.recipe)
                yield Recovery(
                    f"the recipe of version {record.version} and the deltas of its members",
                    _with(write_patch_of, line, recipe, self.space, reference.digest),
                )
                return

    def _delta(self, reference: Reference) -> Iterator[Recovery]:
        """Localize the model again, with the line's settings of that time."""

        def made(entry: Entry) -> bool:
            return entry.digests.get("delta") == reference.digest

        for line_state, entry in self._states_after(reference.line, made):
            for task, number in touched_models(entry):
                spec, model = line_state.tasks[task].spec, line_state.tasks[task].versions[number]
                exact = (model.facts.localizer or "").startswith("dataless")
                chosen = (model.facts.recovery or {}).get("kept")
                kept = chosen if isinstance(chosen, int) else None
                yield Recovery(
                    f"the finetuned model {task} {number} at {model.model.uri}"
                    f"{'' if exact else _NUMERIC}",
                    _with(write_delta, _line(line_state), spec, model.model, self.space, kept),
                )
            return

    def _statistic(self, reference: Reference) -> Iterator[Recovery]:
        """Compute the statistic again from the members of that time."""
        for named in self.statistics():
            if named.digest == reference.digest:
                tasks = ", ".join(member.task for member in named.statistic.members)
                yield Recovery(
                    f"the deltas and train rows of {tasks}{_NUMERIC}",
                    _with(write_statistic_of, named.line, named.statistic, self.space),
                )
                return

    def statistics(self) -> Iterator[NamedStatistic]:
        """The statistics that merged versions and models name."""
        for line, line_state in self.inventory.line_states.items():
            for number, digest in line_state.versions.items():
                record = self.inventory.records.get(digest)
                if record is not None and record.statistics:
                    for then, _ in self._states_after(line, _makes_version(number)):
                        yield from _of_version(record, then)
        for then, task, number in self.localized():
            yield from _of_model(then, task, number)

    def localized(self) -> Iterator[tuple[LineState, str, int]]:
        """The models that acts localized (task and version), with the line right after the act."""
        for line in self.inventory.line_states:
            for line_state, entry in self._states_after(line, lambda act: "delta" in act.digests):
                for task, number in touched_models(entry):
                    yield line_state, task, number

    def _result(self, reference: Reference) -> Iterator[Recovery]:
        """Evaluate the same weights on the same rows."""

        def measured(entry: Entry) -> bool:
            key = (reference.task, reference.number)
            # A model that is measured again may be held for what was found.
            kinds = ("localized", "measured", "held")
            return entry.kind in kinds and key in touched_models(entry)

        made = _makes_version(reference.number) if reference.of_version else measured
        record = self._record(reference) if reference.of_version else None
        for line_state, _ in self._states_after(reference.line, made):
            inputs = _evaluation_inputs(reference, line_state, record)
            if inputs is not None:
                yield Recovery(
                    f"a new evaluation of {inputs[1].kind} on {inputs[0].task}",
                    _with(self._evaluate, line_state, inputs),
                )

    def _evaluate(self, file: Path, line_state: LineState, inputs: EvaluationInputs) -> None:
        result = evaluated(open_base(_line(line_state), self.space), *inputs, self.space)
        file.write_bytes(canonical_json(result.to_json()))

    def _listing(self, reference: Reference) -> Iterator[Recovery]:
        line_state = self.inventory.line_states.get(reference.line)
        if line_state is None:
            return
        line = _line(line_state)

        def write(file: Path) -> None:
            file.write_bytes(list_again(reference.weights, line, self.space))

        yield Recovery(f"the weights at {reference.weights}", write)

    def _specialists(self, reference: Reference) -> Iterator[Recovery]:
        """Make the specialists of a version again, with their recorded settings."""
        record, line_state = self._record(reference), self.inventory.line_states.get(reference.line)
        if record is None or line_state is None:
            return
        key = self.inventory.keys.get(f"keys/{SPECIALISTS}/{record.recipe_digest}")
        if key is None:
            return
        facts: dict[str, Any] = key.facts

        def write(file: Path) -> None:
            with self.space.scratch() as scratch:
                ready = prepare(
                    line_with_one_method(line_state, record),
                    members_of(line_state, record),
                    get_method(str(facts["method"])),
                    settings=facts["settings"],
                )
                recipe = make_recipe(ready.line, ready.members)
                values, files = write_parts(scratch, ready.line, recipe, self.space)
                if reference.digest in files:
                    shutil.copyfile(files[reference.digest], file)
                else:
                    file.write_bytes(canonical_json(values))

        yield Recovery(f"the finetuned models of version {record.version}", write)

    def _record(self, reference: Reference) -> MergedRecord | None:
        line_state = self.inventory.line_states.get(reference.line)
        digest = None if line_state is None else line_state.versions.get(reference.number)
        return None if digest is None else self.inventory.records.get(digest)

    def _model(self, reference: Reference) -> Iterator[Recovery]:
        """Read the model's source again."""
        line_state = self.inventory.line_states.get(reference.line)
        if line_state is None:
            return
        if reference.owner == "the base":
            origin = line_state.spec.base
        else:
            task, _, number = reference.owner.rpartition(" ")
            origin = line_state.tasks[task].versions[int(number)].model.uri
        if origin.startswith(COPY_SCHEME):
            return

        def write(file: Path) -> None:
            with fetch_again(origin, self.space.home) as files:
                if reference.role == "manifest":
                    digests = {name: digest_file(path) for name, path in files.items()}
                    file.write_bytes(canonical_json({"files": digests}))
                elif reference.weights in files:
                    shutil.copyfile(files[reference.weights], file)
                else:
                    raise BadInput(f"{origin} no longer has the file {reference.weights}")

        yield Recovery(f"the source {origin}, if it has not changed", write)

    def _states_after(
        self, line: str, selected: Callable[[Entry], bool]
    ) -> Iterator[tuple[LineState, Entry]]:
        """The line right after each selected act, the newest first; nothing if acts are missing."""
        trail = self.inventory.trails.get(line, [])
        if is_complete(trail):
            for index, entry in enumerate(trail):
                if selected(entry):
                    yield state_after(trail[index:][::-1]), entry


def _of_version(record: MergedRecord, line_state: LineState) -> Iterator[NamedStatistic]:
    """The statistics that a version was merged with."""
    members = []
    for member in members_of(line_state, record):
        model = member.model.model_copy(update={"delta": record.members[member.task].delta})
        members.append(member.model_copy(update={"model": model}))
    method = Recipe.from_json(record.recipe).method
    spec = line_state.spec.with_method(MethodSpec(name=method.name, settings=dict(method.settings)))
    line, source = LineRef(spec, line_state.base), f"the recipe of version {record.version}"
    for statistic in needed(get_method(method.name), members):
        digest = record.statistics.get(statistic.name)
        if digest is not None:
            yield NamedStatistic(digest, statistic, line, source, record.made_by)


def _of_model(line_state: LineState, task: str, number: int) -> Iterator[NamedStatistic]:
    """The statistics of a model that was just localized."""
    member = member_of(line_state, task, number)
    line, source = _line(line_state), f"the state of line {line_state.line} ({task} {number})"
    facts = member.model.facts
    for kind, digest in facts.statistics.items():
        statistic = Statistic(kind, (member,))
        yield NamedStatistic(digest, statistic, line, source, facts.localized_by)


def _evaluation_inputs(
    reference: Reference, line_state: LineState, record: MergedRecord | None
) -> EvaluationInputs | None:
    """The inputs of a stored evaluation; None if they are unknown."""
    name, _, retention = reference.weights.partition(" ")
    if record is None and (retention or name == "merged"):
        return None
    base, merged = WeightsRef("base"), WeightsRef("merged", "" if record is None else record.patch)
    if retention:
        spec = retention_task(line_state)
        return None if spec is None else (spec, merged if name == "merged" else base, None)
    member = None if record is None else record.members.get(reference.task)
    task = line_state.tasks.get(reference.task)
    number = reference.number if member is None else member.version
    if task is None or number not in task.versions:
        return None
    model = task.versions[number]
    ref, delta = model.model, model.delta if member is None else member.delta
    weights = {
        "merged": merged,
        "grafted": WeightsRef("grafted", str(delta)),
        "finetuned": WeightsRef("finetuned", ref.weights, ref.uri),
        "localizable": WeightsRef("localizable", ref.weights, ref.uri),
    }
    return task.spec, weights.get(name, base), ref


def _makes_version(number: int) -> Callable[[Entry], bool]:
    return lambda entry: f"/versions/{number}" in entry.after


def _line(line_state: LineState) -> LineRef:
    return LineRef(line_state.spec, line_state.base)


def _with(
    write: Callable[Concatenate[Path, P], object], *args: P.args, **kwargs: P.kwargs
) -> Callable[[Path], object]:
    """A function of a file, with its other arguments."""
    return lambda file: write(file, *args, **kwargs)
