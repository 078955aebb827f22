"""The statistics that a merge method needs of its members: found once, and kept under their inputs.

A Fisher diagonal or Gram matrices belong to one member: its delta, the calibration rows of its
task, the head that reads them. They are found where it is onboarded; so whoever joins costs their
own statistics and one combination, and nobody needs the others' data again. Coefficients belong to
the whole set, and are learned anew when it changes. All are gradients or sums of products, whose
last bits differ between machines: the first that is published counts, and the recipe names its
digest.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.merging.files.sparse import SparseFile
from restitch.merging.methods.registry import Method, get_method
from restitch.merging.order import by_bytes
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.statistics.entropy_coefficients import VERSION as COEFFICIENTS_VERSION
from restitch.merging.statistics.entropy_coefficients import CoefficientSettings, learn_coefficients
from restitch.merging.statistics.fisher_diagonal import VERSION as FISHER_VERSION
from restitch.merging.statistics.fisher_diagonal import mean_of, measure_fisher
from restitch.merging.statistics.grams import VERSION as GRAM_VERSION
from restitch.merging.statistics.grams import measure_grams
from restitch.merging.statistics.statistic_file import COEFFICIENTS, FISHER, GRAM, write_statistic
from restitch.modeling.weights import linear_layers, restore
from restitch.registry.ledger.line_state import Member
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.inputs.checkpoints import Base, device, live_base, open_base
from restitch.tasks.localizers import Calibration, OpenCalibration
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, StatisticRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace

# What a store calls the keys of statistics.
KINDS = (FISHER, GRAM, COEFFICIENTS)

_VERSIONS = {FISHER: FISHER_VERSION, GRAM: GRAM_VERSION, COEFFICIENTS: COEFFICIENTS_VERSION}


def lacks_rows(method: Method, tasks: Sequence[TaskSpec]) -> list[str]:
    """The tasks without the train rows that a method needs, by name."""
    if not method.needs:
        return []
    return [task.task for task in tasks if task.data is None or task.data.train is None]


def check_rows_for(method: Method, tasks: Sequence[TaskSpec]) -> None:
    """Refuse tasks without the train rows that a method needs.

    Raises:
        BadInput: names them.
    """
    lacking = lacks_rows(method, tasks)
    if lacking:
        raise BadInput(
            f"the method {method.name} needs train rows of every task",
            expected="data: train: in every task's file; labels are not looked at",
            found=f"none for {', '.join(lacking)}",
            hint="name a train split and register with --replace-task, or choose a method that "
            "needs no data",
        )


def statistics(line: LineRef, members: Sequence[Member]) -> dict[str, StatisticRef]:
    """What the line's method needs of members, by the name that a recipe gives it.

    Raises:
        BadInput: a task has no train rows, or they cannot be used.
    """
    method = get_method(line.spec.method.name)
    check_rows_for(method, [member.spec for member in members])
    return {each.name: find(line, each) for each in needed(method, members)}


def own_statistics(line: LineRef, member: Member) -> dict[str, StatisticRef]:
    """What methods of the line need of one member alone, by kind.

    Nothing of a task without train rows: whoever merges it by such a method says so.
    """
    methods = [get_method(one.name) for one in line.spec.method.methods]
    kinds = {kind for one in methods if not lacks_rows(one, [member.spec]) for kind in one.needs}
    return {
        kind: find(line, Wanted(kind, (member,))) for kind in sorted(kinds) if kind != COEFFICIENTS
    }


def known_statistics(line: LineRef, members: Sequence[Member]) -> dict[str, str] | None:
    """The digests of what is in the store already; None where something is missing."""
    method = get_method(line.spec.method.name)
    if lacks_rows(method, [member.spec for member in members]):
        return None
    space = workspace()
    found = {}
    for each in needed(method, members):
        record = space.objects.lookup(each.kind, statistic_key(line, each, space))
        if record is None:
            return None
        found[each.name] = record.blob
    return found


def statistic_inputs(line: LineRef, members: Sequence[Member]) -> dict[str, str]:
    """What `statistics` are found from: digests by the same names, and nothing is found for them.

    Raises:
        BadInput: a task has no train rows, or they cannot be used.
    """
    method = get_method(line.spec.method.name)
    check_rows_for(method, [member.spec for member in members])
    space = workspace()
    return {each.name: statistic_key(line, each, space) for each in needed(method, members)}


@dataclass(frozen=True)
class Wanted:
    """A statistic of one member, or of all together."""

    kind: str
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """What a recipe calls it: its kind, and the task where it is of one member."""
        return self.kind if self.kind == COEFFICIENTS else f"{self.kind}/{self.members[0].task}"


def needed(method: Method, members: Sequence[Member]) -> list[Wanted]:
    """The statistics that a method needs of members."""
    ordered = tuple(sorted(members, key=lambda member: by_bytes(member.task)))
    found = []
    for kind in method.needs:
        if kind == COEFFICIENTS:
            found += [Wanted(kind, ordered)] if ordered else []
        else:
            found += [Wanted(kind, (member,)) for member in ordered]
    return found


@step("find statistics", "{wanted.name}")
def find(line: LineRef, wanted: Wanted) -> StatisticRef | Cached[StatisticRef]:
    """A statistic: from the store, or found now."""
    space = workspace()
    key = statistic_key(line, wanted, space)
    record = space.objects.lookup(wanted.kind, key)
    if record is not None:
        return Cached(_ref(record))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / f"{wanted.kind}.safetensors"
        rows = write_statistic_of(file, line, wanted, space)
        blob = space.objects.put_blob(file, move=True)
    maker = made_by() | {"device": device().type}
    facts = {"rows": rows, "seconds": round(time.perf_counter() - began, 3)}
    won = space.objects.publish(wanted.kind, key, blob, maker, fingerprint(device()), facts)
    return _ref(won, facts["seconds"] if won.blob == blob else None)


def statistic_key(line: LineRef, wanted: Wanted, space: Workspace) -> str:
    """The digest of all that determines a statistic."""
    base = open_base(line, space)
    inputs: dict[str, Any] = {
        "statistic": [wanted.kind, _VERSIONS[wanted.kind]],
        "base": [base.ref.weights, base.ref.config],
        "family": [base.family.name, base.family.version],
        # Where the model is looked at: the base with all that the delta holds.
        "deltas": {member.task: _delta(member) for member in wanted.members},
        "seed": line.spec.localize.seed,
        "rows": {m.task: _calibration(line, m, base, space).inputs() for m in wanted.members},
    }
    if wanted.kind == COEFFICIENTS:
        inputs["settings"] = _settings(line).to_json()
    return digest_json(inputs)


def write_statistic_of(file: Path, line: LineRef, wanted: Wanted, space: Workspace) -> int:
    """Find a statistic and write it to a file.

    Returns:
        How many rows there were to look at.
    """
    base = open_base(line, space)
    opened = [_calibration(line, member, base, space).opened() for member in wanted.members]
    paths = [space.objects.blob_path(_delta(member)) for member in wanted.members]
    deltas = [SparseFile.open(path, base.checkpoint) for path in paths]
    find_it = {FISHER: _fisher, GRAM: _gram, COEFFICIENTS: _coefficients}[wanted.kind]
    found, facts = find_it(line, base, deltas, opened)
    belongs = {"base": base.ref.weights}
    if wanted.kind != COEFFICIENTS:
        belongs["delta"] = _delta(wanted.members[0])
    write_statistic(file, wanted.kind, found, belongs | facts)
    return sum(len(on.rows) for on in opened)


Found = tuple[dict[str, Tensor], dict[str, str]]


def _fisher(
    line: LineRef, _: Base, deltas: Sequence[SparseFile], opened: Sequence[OpenCalibration]
) -> Found:
    (delta,), (on,) = deltas, opened
    with on.live.edited(delta), working("measuring what weights are worth") as progress:
        found = measure_fisher(
            on.live.parameters,
            delta.names,
            len(on.rows),
            on.batch,
            on.logits,
            seed=line.spec.localize.seed,
            progress=progress,
        )
    return found, {"mean": repr(mean_of(found))}


def _gram(
    _: LineRef, _base: Base, deltas: Sequence[SparseFile], opened: Sequence[OpenCalibration]
) -> Found:
    (delta,), (on,) = deltas, opened
    layers = linear_layers(on.live.model, on.live.parameters)
    chosen = {name: layer for name, layer in layers.items() if name in delta}
    with on.live.edited(delta), working("measuring the inputs of layers") as progress:
        found = measure_grams(
            chosen, len(on.rows), lambda row: on.logits(on.batch([row])), progress=progress
        )
    return found, {}


def _coefficients(
    line: LineRef, base: Base, deltas: Sequence[SparseFile], opened: Sequence[OpenCalibration]
) -> Found:
    vectors = [KeptVector(base.checkpoint, delta) for delta in deltas]
    live = live_base(base)
    try:
        with working("learning coefficients") as progress:
            found = learn_coefficients(
                live.parameters,
                base.checkpoint,
                vectors,
                [len(on.rows) for on in opened],
                lambda task, rows: opened[task].logits(opened[task].batch(rows)),
                _settings(line),
                progress=progress,
            )
    finally:
        touched = {name for vector in vectors for name in vector.names}
        restore(live.parameters, base.checkpoint, touched)
    return found, {}


def _settings(line: LineRef) -> CoefficientSettings:
    given: Mapping[str, Any] = line.spec.method.settings
    return CoefficientSettings(**given, seed=line.spec.localize.seed)


def _calibration(line: LineRef, member: Member, base: Base, space: Workspace) -> Calibration:
    return Calibration(line.spec.localize, member.spec, base, member.model.model, space)


def _delta(member: Member) -> str:
    assert member.model.delta is not None, "a member has been localized"
    return member.model.delta


def _ref(record: KeyRecord, seconds: float | None = None) -> StatisticRef:
    took: Any = record.facts.get("seconds")
    return StatisticRef(record.blob, record.size, seconds, took)
