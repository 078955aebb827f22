"""Measure the statistics that merge methods need, and store each under a digest of its inputs.

A Fisher diagonal and Gram matrices belong to one member: they depend on its delta, the calibration
rows of its task and its head. They are measured when the member is onboarded, so that a new member
needs no data of the others. Coefficients belong to a set of members and are learned again when it
changes. The last bits of all statistics differ between machines: the first one published counts,
and the recipe names its digest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.merging.files.delta import Delta, open_delta
from restitch.merging.methods.registry import Method, get_method
from restitch.merging.order import by_bytes
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.rules.merge_inputs import member_vector
from restitch.merging.statistics.entropy_coefficients import VERSION as COEFFICIENTS_VERSION
from restitch.merging.statistics.entropy_coefficients import CoefficientSettings, learn_coefficients
from restitch.merging.statistics.fisher_diagonal import VERSION as FISHER_VERSION
from restitch.merging.statistics.fisher_diagonal import mean_of, measure_fisher
from restitch.merging.statistics.gradient_grams import MOST_OUTPUTS, measure_gradient_grams
from restitch.merging.statistics.gradient_grams import VERSION as GRADIENT_GRAM_VERSION
from restitch.merging.statistics.grams import VERSION as GRAM_VERSION
from restitch.merging.statistics.grams import Layer, gram_forms, measure_grams
from restitch.merging.statistics.statistic_file import (
    COEFFICIENTS,
    FISHER,
    GRADIENT_GRAM,
    GRAM,
    new_statistic,
    write_statistic,
)
from restitch.modeling.device import device
from restitch.modeling.weights import linear_layers, restore
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import KeyRecord
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.streamed_base import streamed_base
from restitch.tasks.localizers import Calibration, OpenCalibration
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.free_memory import Part
from restitch.tasks.runtime.refs import LineRef, StatisticRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace

# The kinds of statistics, which are also their key kinds in the store.
KINDS = (FISHER, GRAM, GRADIENT_GRAM, COEFFICIENTS)

_VERSIONS = {
    FISHER: FISHER_VERSION,
    GRAM: GRAM_VERSION,
    GRADIENT_GRAM: GRADIENT_GRAM_VERSION,
    COEFFICIENTS: COEFFICIENTS_VERSION,
}


def lacks_rows(method: Method, tasks: Sequence[TaskSpec]) -> list[str]:
    """The names of the tasks that lack the train rows that a method needs."""
    if not method.needs:
        return []
    return [task.task for task in tasks if task.data is None or task.data.train is None]


def check_rows_for(method: Method, tasks: Sequence[TaskSpec]) -> None:
    """Refuse tasks that lack the train rows that a method needs.

    Raises:
        BadInput: the message names them.
    """
    lacking = lacks_rows(method, tasks)
    if lacking:
        raise BadInput(
            f"the method {method.name} needs train rows of every task",
            expected="data: train: in every task's file; labels are not used",
            found=f"none for {', '.join(lacking)}",
            hint="name a train split and register with --replace-task, or choose a method that "
            "needs no data",
        )


def statistics(line: LineRef, members: Sequence[Member]) -> dict[str, StatisticRef]:
    """The statistics that the line's method needs, by their names in a recipe.

    Raises:
        BadInput: a task has no train rows, or they cannot be used.
    """
    return {each.name: measure(line, each) for each in _measurable(line, members)}


def own_statistics(line: LineRef, member: Member) -> dict[str, StatisticRef]:
    """The statistics of one member that methods of the line need, by kind.

    Methods whose train rows the task lacks are left out; merging by such a method is an error.
    """
    methods = [get_method(one.name) for one in line.spec.method.methods]
    kinds = {kind for one in methods if not lacks_rows(one, [member.spec]) for kind in one.needs}
    return {
        kind: measure(line, Statistic(kind, (member,)))
        for kind in sorted(kinds)
        if kind != COEFFICIENTS
    }


def known_statistics(line: LineRef, members: Sequence[Member]) -> dict[str, str] | None:
    """The digests of stored statistics by name; None if any is missing."""
    method = get_method(line.spec.method.name)
    if lacks_rows(method, [member.spec for member in members]):
        return None
    space = workspace()
    digests = {}
    for each in needed(method, members):
        record = space.objects.lookup(each.kind, statistic_key(line, each, space))
        if record is None:
            return None
        digests[each.name] = record.blob
    return digests


def statistic_inputs(line: LineRef, members: Sequence[Member]) -> dict[str, str]:
    """The keys of the statistics by their names in a recipe; measures nothing.

    Raises:
        BadInput: a task has no train rows, or they cannot be used.
    """
    space = workspace()
    return {each.name: statistic_key(line, each, space) for each in _measurable(line, members)}


def _measurable(line: LineRef, members: Sequence[Member]) -> list["Statistic"]:
    method = get_method(line.spec.method.name)
    check_rows_for(method, [member.spec for member in members])
    return needed(method, members)


@dataclass(frozen=True)
class Statistic:
    """A statistic of one member or of a set of members."""

    kind: str
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """Its name in a recipe: the kind, and the task if it is of one member."""
        return self.kind if self.kind == COEFFICIENTS else f"{self.kind}/{self.members[0].task}"


def needed(method: Method, members: Sequence[Member]) -> list[Statistic]:
    """The statistics that a method needs of members."""
    ordered = tuple(sorted(members, key=lambda member: by_bytes(member.task)))
    result = []
    for kind in method.needs:
        if kind == COEFFICIENTS:
            result += [Statistic(kind, ordered)] if ordered else []
        else:
            result += [Statistic(kind, (member,)) for member in ordered]
    return result


@step("measure statistics", "{statistic.name}")
def measure(line: LineRef, statistic: Statistic) -> StatisticRef | Cached[StatisticRef]:
    """A statistic, from the store or measured now."""
    space = workspace()
    key = statistic_key(line, statistic, space)
    record = space.objects.lookup(statistic.kind, key)
    if record is not None:
        return Cached(_ref(record))
    began = time.perf_counter()
    with space.scratch() as scratch:
        file = scratch / f"{statistic.kind}.safetensors"
        rows = write_statistic_of(file, line, statistic, space)
        blob = space.objects.put_blob(file, move=True)
    maker = made_by() | {"device": device().type}
    facts = {"rows": rows, "seconds": round(time.perf_counter() - began, 3)}
    won = space.objects.publish(statistic.kind, key, blob, maker, fingerprint(device()), facts)
    return _ref(won, facts["seconds"] if won.blob == blob else None)


def statistic_key(line: LineRef, statistic: Statistic, space: Workspace) -> str:
    """The digest of all that determines a statistic.

    A worker that computes in another type may have measured it: what is published first counts.
    """
    own, *others = statistic_keys(line, statistic, space)
    if space.objects.lookup(statistic.kind, own) is None:
        for other in others:
            if space.objects.lookup(statistic.kind, other) is not None:
                return other
    return own


def statistic_keys(line: LineRef, statistic: Statistic, space: Workspace) -> tuple[str, ...]:
    """The key of a statistic for each type to compute in, this worker's first."""
    bases = open_base(line, space).in_each_type()
    return tuple(_key(line, base, statistic, space) for base in bases)


def _key(line: LineRef, base: Base, statistic: Statistic, space: Workspace) -> str:
    inputs: dict[str, Any] = {
        "statistic": [statistic.kind, _VERSIONS[statistic.kind]],
        "base": [base.ref.weights, base.ref.config],
        "family": [base.family.name, base.family.version],
        # The model is measured as the base with the delta.
        "deltas": {member.task: _delta(member) for member in statistic.members},
        "seed": line.spec.localize.seed,
        "rows": {m.task: _calibration(line, m, base, space).inputs() for m in statistic.members},
    }
    if statistic.kind == COEFFICIENTS:
        inputs["settings"] = _settings(line).to_json()
    return digest_json(inputs)


def write_statistic_of(file: Path, line: LineRef, statistic: Statistic, space: Workspace) -> int:
    """Measure a statistic and write it to a file; return the number of calibration rows."""
    base = open_base(line, space)
    paths = [space.objects.blob_path(_delta(member)) for member in statistic.members]
    deltas = [open_delta(path, base.checkpoint) for path in paths]
    origin = {"base": base.ref.weights}
    if statistic.kind != COEFFICIENTS:
        origin["delta"] = _delta(statistic.members[0])
    calibrations = [_calibration(line, member, base, space) for member in statistic.members]
    step = f"measure {statistic.name}"
    if statistic.kind == GRAM:
        (calibration,), (delta,) = calibrations, deltas
        return _write_grams(file, step, calibration, delta, origin)
    holds = _holds(statistic.kind, base, deltas)
    opened = [calibration.opened(step, holds) for calibration in calibrations]
    measured = {FISHER: _fisher, GRADIENT_GRAM: _gradient_grams, COEFFICIENTS: _coefficients}
    function = measured[statistic.kind]
    tensors, metadata = function(line, base, deltas, opened)
    write_statistic(file, statistic.kind, tensors, origin | metadata)
    return sum(len(on.rows) for on in opened)


def _holds(kind: str, base: Base, deltas: Sequence[Delta]) -> list[Part]:
    """What measuring holds in addition to the live model."""
    names = {name for delta in deltas for name in delta.names}
    coordinates = sum(base.checkpoint.info(name).numel for name in names)
    if kind == FISHER:
        return [Part("the diagonal", 4 * coordinates)]
    if kind == GRADIENT_GRAM:
        return []  # the loaded model tells the sizes of its layers
    return [Part("the task vectors", 4 * coordinates * (1 + len(deltas)))]


def _write_grams(
    file: Path, step: str, calibration: Calibration, delta: Delta, origin: Mapping[str, str]
) -> int:
    """Write the Gram matrices of a member; return the number of calibration rows.

    The model is read part by part. If it cannot be, it is loaded as a whole, and all matrices are
    in memory at once.
    """
    base, rows = calibration.base, calibration.rows()
    try:
        on = calibration.opened_on(streamed_base(base, step, file.parent), rows)
        return _grams(file, on, delta, origin)
    except BadInput as error:
        warn(f"the whole model is loaded to {step}: {error.summary}")
    on = calibration.opened_on(live_base(base, step), rows)
    size = sum(4 * layer.in_features**2 for layer in _linear(on.live, delta).values())
    live_base(base, step, [Part("the matrices", size)])
    return _grams(file, on, delta, origin)


def _grams(file: Path, on: OpenCalibration, delta: Delta, origin: Mapping[str, str]) -> int:
    layers = _linear(on.live, delta)
    grams = new_statistic(file, GRAM, gram_forms(layers), origin)

    def run(rows: Sequence[int], stored: Callable[[], None]) -> None:
        passes = [lambda row=row: on.logits(on.batch([row])) for row in rows]
        with on.live.edited(delta), working("measuring Gram matrices") as progress:
            on.live.run(passes, stored, progress)

    seen = measure_grams(layers, len(on.rows), run, grams)
    if len(seen) < len(grams):
        write_statistic(file, GRAM, {name: grams[name].clone() for name in seen}, origin)
    return len(on.rows)


def _linear(live: LiveBase, delta: Delta) -> dict[str, Layer]:
    """The linear layers whose weights a delta changes."""
    layers = linear_layers(live.model, live.parameters)
    return {name: layer for name, layer in layers.items() if name in delta}


Measured = tuple[dict[str, Tensor], dict[str, str]]


def _fisher(
    line: LineRef, _: Base, deltas: Sequence[Delta], opened: Sequence[OpenCalibration]
) -> Measured:
    (delta,), (on,) = deltas, opened
    with on.live.edited(delta), working("measuring the Fisher diagonal") as progress:
        tensors = measure_fisher(
            on.live.parameters,
            delta.names,
            len(on.rows),
            on.batch,
            on.logits,
            seed=line.spec.localize.seed,
            progress=progress,
        )
    return tensors, {"mean": repr(mean_of(tensors))}


def _gradient_grams(
    line: LineRef, base: Base, deltas: Sequence[Delta], opened: Sequence[OpenCalibration]
) -> Measured:
    (delta,), (on,) = deltas, opened
    layers = {
        name: layer
        for name, layer in _linear(on.live, delta).items()
        if isinstance(layer, nn.Linear) and layer.out_features <= MOST_OUTPUTS
    }
    size = sum(4 * layer.out_features**2 for layer in layers.values())
    live_base(base, "measure gradients", [Part("the matrices", size)])
    with on.live.edited(delta), working("measuring gradients") as progress:
        tensors = measure_gradient_grams(
            layers,
            on.live.parameters,
            len(on.rows),
            on.batch,
            on.logits,
            seed=line.spec.localize.seed,
            progress=progress,
        )
    return tensors, {}


def _coefficients(
    line: LineRef, base: Base, deltas: Sequence[Delta], opened: Sequence[OpenCalibration]
) -> Measured:
    vectors = [member_vector(base.checkpoint, delta) for delta in deltas]
    live = opened[0].live
    try:
        with working("learning coefficients") as progress:
            tensors = learn_coefficients(
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
    return tensors, {}


def _settings(line: LineRef) -> CoefficientSettings:
    given: Mapping[str, Any] = line.spec.method.settings
    return CoefficientSettings(**given, seed=line.spec.localize.seed)


def _calibration(line: LineRef, member: Member, base: Base, space: Workspace) -> Calibration:
    return Calibration(line.spec.localize, member.spec, base, member.model.model, space)


def _delta(member: Member) -> str:
    assert member.model.delta is not None, "a member has been localized"
    return member.model.delta


def _ref(record: KeyRecord, seconds: float | None = None) -> StatisticRef:
    recorded: Any = record.facts.get("seconds")
    return StatisticRef(record.blob, record.size, seconds, recorded)
