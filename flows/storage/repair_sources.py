"""From what a damaged object can be made again.

A `Way` writes what should be the object to a file, and says in words from what; whether it
is the object is for the caller to compare. An act or the record of a version is only there
where MLflow has kept a copy, a model's file where its source or a copy on this machine is.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from restitch.flows.promotion.snapshot import line_with_one_method, retention_task
from restitch.flows.promotion.versions import members_of
from restitch.flows.promotion.what_if import prepare
from restitch.flows.storage.store_check import Image
from restitch.merging.digests import canonical_json, digest_file
from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.methods.registry import get_method
from restitch.merging.recipe import Recipe
from restitch.registry.ledger.ledger import state_after
from restitch.registry.ledger.line_state import LineState, Member, ModelRef
from restitch.registry.ledger.outcomes import touched_models
from restitch.registry.ledger.records import Entry, MergedRecord
from restitch.registry.ledger.references import COPY_SCHEME, MLFLOW_SCHEMES, SPECIALISTS, Reference
from restitch.registry.maintenance.inventory import Inventory
from restitch.registry.sources.resolve import fetch_again, resolve_source
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.evaluate import evaluated
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.inputs.remote_weights import list_remote
from restitch.tasks.localize import write_delta
from restitch.tasks.merge import make_recipe, write_patch_of
from restitch.tasks.research.experts import write_parts
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace
from restitch.tasks.statistics import Statistic, needed, write_statistic_of


@dataclass(frozen=True)
class Recovery:
    """One way to make an object again.

    Attributes:
        source: from what, in words.
        write: writes it to a file that is not there yet, in a folder with room.
    """

    source: str
    write: Callable[[Path], None]


class Remedies:
    """The ways to make what is damaged in a store again.

    Args:
        space: the store, and where models and data are read.
        found: what the store holds.
        image: of the lines in MLflow.
    """

    def __init__(self, space: Workspace, found: Inventory, image: Image) -> None:
        self.space = space
        self.image = image
        self.found = found

    def of_entry(self, digest: str) -> Iterator[Recovery]:
        """The ways to an act."""
        yield from self._in_mlflow(digest)

    def of_blob(self, digest: str) -> Iterator[Recovery]:
        """The ways to a blob, the surest first."""
        references = self.found.references.get(digest, [])
        yield from self._copies(digest, references)
        seen = set[str]()
        for each in references:
            for way in self._of(each):
                if way.source not in seen:
                    seen.add(way.source)
                    yield way

    def _of(self, each: Reference) -> Iterator[Recovery]:
        if each.role == "record":
            yield from self._in_mlflow(each.digest)
        elif each.role == "patch":
            yield from self._patch(each)
        elif each.role == "delta":
            yield from self._delta(each)
        elif each.role == "result":
            yield from self._result(each)
        elif each.role == "statistic":
            yield from self._statistic(each)
        elif each.role == "listing":
            yield Recovery(
                f"the weights at {each.weights}", partial(_list, each.weights, self.space)
            )
        elif each.role in ("manifest", "file"):
            yield from self._model(each)
        elif each.role in ("experts", "expert"):
            yield from self._experts(each)

    def _in_mlflow(self, digest: str) -> Iterator[Recovery]:
        lines = {*self.found.line_states, *(entry.line for entry in self.found.entries.values())}
        for line in sorted(lines):
            try:
                data = self.image.copy_of(line, digest)
            except Unavailable:
                return
            if data is not None:
                yield Recovery(f"the copy in MLflow's image of line {line}", partial(_write, data))

    def _copies(self, digest: str, references: list[Reference]) -> Iterator[Recovery]:
        """Copies on this machine: of a bucket's objects, and of models that were unpacked."""
        cache = self.space.home.cache
        places = [*(cache / "store").glob(f"**/blobs/{digest}")]
        for each in references:
            if each.role == "file" and Path(each.weights).name == each.weights:
                places += (cache / "sources").glob(f"*/{each.weights}")
        for path in places:
            if path.is_file() and digest_file(path) == digest:
                yield Recovery("a copy in this machine's cache", partial(_copy, path))
                return
        for each in references:
            folder = cache / "sources" / digest
            if each.role == "manifest" and folder.is_dir():
                files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
                data = canonical_json({"files": files})
                yield Recovery("the files in this machine's cache", partial(_write, data))
                return

    def _patch(self, each: Reference) -> Iterator[Recovery]:
        for record in self.found.records.values():
            if record.patch == each.digest and record.line in self.found.line_states:
                line = _line(self.found.line_states[record.line])
                recipe = Recipe.from_json(record.recipe)
                yield Recovery(
                    f"the recipe of version {record.version} and the deltas of its members",
                    partial(_write_patch, line, recipe, self.space),
                )
                return

    def _delta(self, each: Reference) -> Iterator[Recovery]:
        """By localizing the model as it was localized then."""
        for line_state, entry in self._after(
            each.line, lambda e: e.digests.get("delta") == each.digest
        ):
            for task, number in touched_models(entry):
                model = line_state.tasks[task].versions[number]
                spec = line_state.tasks[task].spec
                localizer = model.facts.localizer or ""
                numeric = "" if localizer.startswith("dataless") else " (its mask is numeric)"
                yield Recovery(
                    f"the finetuned model {task} {number} at {model.model.uri}{numeric}",
                    partial(_write_delta, _line(line_state), spec, model.model, self.space),
                )
            return

    def statistics(self) -> Iterator["Known"]:
        """What merged versions and models name, with the line as it was for them."""
        yield from self._of_versions()
        for line in self.found.line_states:
            for then, entry in self._after(line, lambda e: e.kind == "localized"):
                yield from _of_localized(then, touched_models(entry))

    def _of_versions(self) -> Iterator["Known"]:
        for line, line_state in self.found.line_states.items():
            for number, digest in line_state.versions.items():
                record = self.found.records.get(digest)
                if record is None or not record.statistics:
                    continue
                made = partial(_made_version, f"/versions/{number}")
                for then, _ in self._after(line, made):
                    yield from _of_version(record, then)

    def _statistic(self, each: Reference) -> Iterator[Recovery]:
        """By looking at the members again as they were then: the same bytes on a like machine."""
        for known in self.statistics():
            if known.digest == each.digest:
                tasks = ", ".join(member.task for member in known.statistic.members)
                yield Recovery(
                    f"the deltas and train rows of {tasks} (it is numeric)",
                    partial(_write_statistic, known.line, known.statistic, self.space),
                )
                return

    def _result(self, each: Reference) -> Iterator[Recovery]:
        """By evaluating the same weights on the same rows."""
        pointer = f"/versions/{each.number}"

        def made(entry: Entry) -> bool:
            if each.of_version:
                return _made_version(pointer, entry)
            touched = (each.task, each.number) in touched_models(entry)
            return touched and entry.kind == "localized"

        record = self._record(each) if each.of_version else None
        for line_state, _ in self._after(each.line, made):
            found = _weights(each, line_state, record)
            if found is not None:
                spec, weights, model = found

                yield Recovery(
                    f"evaluating {weights.kind} on {spec.task} again",
                    partial(self._evaluate, line_state, spec, weights, model),
                )

    def _experts(self, each: Reference) -> Iterator[Recovery]:
        """By making the specialists of a version again, as they were made then."""
        record, line_state = self._record(each), self.found.line_states.get(each.line)
        key = (
            None
            if record is None
            else self.found.keys.get(f"keys/{SPECIALISTS}/{record.recipe_digest}")
        )
        if record is None or line_state is None or key is None:
            return

        def write(file: Path) -> None:
            with self.space.scratch() as scratch:
                facts: dict[str, Any] = key.facts
                chosen = get_method(str(facts["method"]))
                ready = prepare(
                    line_with_one_method(line_state, record),
                    members_of(line_state, record),
                    chosen,
                    settings=facts["settings"],
                )
                recipe = make_recipe(ready.line, ready.members)
                values, files = write_parts(scratch, ready.line, recipe, self.space)
                if each.digest in files:
                    _copy(files[each.digest], file)
                else:
                    file.write_bytes(canonical_json(values))

        yield Recovery(f"the finetuned models of version {record.version}", write)

    def _evaluate(
        self,
        line_state: LineState,
        spec: TaskSpec,
        weights: WeightsRef,
        model: ModelRef | None,
        file: Path,
    ) -> None:
        base = open_base(_line(line_state), self.space)
        result = evaluated(base, spec, weights, model, self.space)
        file.write_bytes(canonical_json(result.to_json()))

    def _record(self, each: Reference) -> MergedRecord | None:
        line_state = self.found.line_states.get(each.line)
        digest = None if line_state is None else line_state.versions.get(each.number)
        return None if digest is None else self.found.records.get(digest)

    def _model(self, each: Reference) -> Iterator[Recovery]:
        """From where the model came, as far as that is known."""
        line_state = self.found.line_states.get(each.line)
        if line_state is None:
            return
        if each.owner == "the base":
            origin = line_state.spec.base
        else:
            task, _, number = each.owner.rpartition(" ")
            origin = line_state.tasks[task].versions[int(number)].model.uri
        if origin.startswith(COPY_SCHEME):
            return

        def write(file: Path) -> None:
            with fetch_again(origin, self.space.home) as files:
                if each.role == "manifest":
                    digests = {name: digest_file(path) for name, path in files.items()}
                    file.write_bytes(canonical_json({"files": digests}))
                elif each.weights in files:
                    _copy(files[each.weights], file)
                else:
                    raise BadInput(f"{origin} has no file {each.weights} any more")

        kind = "MLflow's" if origin.startswith(MLFLOW_SCHEMES) else "the source"
        yield Recovery(f"{kind} {origin}, where that has not changed", write)

    def _after(
        self, line: str, wanted: Callable[[Entry], bool]
    ) -> Iterator[tuple[LineState, Entry]]:
        """The line right after the acts that are wanted, the newest first."""
        trail = self.found.trails.get(line, [])
        if not trail or trail[-1].previous is not None:
            return  # the beginning is not there
        for at, entry in enumerate(trail):
            if wanted(entry):
                yield state_after(trail[at:][::-1]), entry


@dataclass(frozen=True)
class Known:
    """A statistic that something names.

    Attributes:
        line: as it was when that was made.
        source: what names it, in words.
        made_by: who made that.
    """

    digest: str
    statistic: Statistic
    line: LineRef
    source: str
    made_by: Any


def _of_version(record: MergedRecord, line_state: LineState) -> Iterator[Known]:
    """The statistics that a version was merged with."""
    members = []
    for task, kept in record.members.items():
        known = line_state.tasks[task]
        model = known.versions[kept.version].model_copy(update={"delta": kept.delta})
        members.append(Member(task=task, version=kept.version, spec=known.spec, model=model))
    method = Recipe.from_json(record.recipe).method
    spec = line_state.spec.with_method(MethodSpec(name=method.name, settings=dict(method.settings)))
    source = f"the recipe of version {record.version}"
    for statistic in needed(get_method(method.name), members):
        digest = record.statistics.get(statistic.name)
        if digest is not None:
            yield Known(digest, statistic, LineRef(spec, line_state.base), source, record.made_by)


def _of_localized(line_state: LineState, models: Iterable[tuple[str, int]]) -> Iterator[Known]:
    """The statistics of models that an act has just localized."""
    for task, number in models:
        spec, model = line_state.tasks[task].spec, line_state.tasks[task].versions[number]
        member = Member(task=task, version=number, spec=spec, model=model)
        for kind, digest in model.facts.statistics.items():
            source = f"what the line says of {task} {number}"
            maker = model.facts.localized_by
            yield Known(digest, Statistic(kind, (member,)), _line(line_state), source, maker)


def _weights(
    each: Reference, line_state: LineState, record: MergedRecord | None
) -> tuple[TaskSpec, WeightsRef, ModelRef | None] | None:
    """What was evaluated: on which task, which weights, and whose head they wore."""
    name, _, retention = each.weights.partition(" ")
    if retention:
        spec = retention_task(line_state)
        if spec is None or record is None:
            return None
        merged = WeightsRef("merged", record.patch)
        return spec, merged if name == "merged" else WeightsRef("base"), None
    member = None if record is None else record.members.get(each.task)
    task = line_state.tasks.get(each.task)
    number = each.number if member is None else member.version
    if task is None or number not in task.versions:
        return None
    model = task.versions[number]
    ref = model.model
    if name == "merged":
        if record is None:
            return None
        weights = WeightsRef("merged", record.patch)
    elif name == "grafted":
        delta = model.delta if member is None else member.delta
        weights = WeightsRef("grafted", str(delta))
    elif name == "finetuned":
        weights = WeightsRef("finetuned", ref.weights, ref.uri)
    elif name == "localizable":
        weights = WeightsRef("localizable", ref.weights, ref.uri)
    else:
        weights = WeightsRef("base")
    return task.spec, weights, ref


def _made_version(pointer: str, entry: Entry) -> bool:
    return pointer in entry.after


def _line(line_state: LineState) -> LineRef:
    return LineRef(line_state.spec, line_state.base)


def _write_patch(line: LineRef, recipe: Recipe, space: Workspace, file: Path) -> None:
    write_patch_of(file, line, recipe, space)


def _write_delta(
    line: LineRef, task: TaskSpec, model: ModelRef, space: Workspace, file: Path
) -> None:
    write_delta(file, line, task, model, space)


def _write_statistic(line: LineRef, statistic: Statistic, space: Workspace, file: Path) -> None:
    write_statistic_of(file, line, statistic, space)


def _list(uri: str, space: Workspace, file: Path) -> None:
    source = resolve_source(uri, space.home, whole=False)
    file.write_bytes(list_remote(source, space).listing())


def _write(data: bytes, file: Path) -> None:
    file.write_bytes(data)


def _copy(source: Path, file: Path) -> None:
    shutil.copyfile(source, file)
