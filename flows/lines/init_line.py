"""Make a line from its file, or bring an existing one to what its file says now."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.methods.registry import get_method, method_names, resolve_settings
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.families.family import family_names, get_family
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.sources.resolve import COPY_SCHEME
from restitch.registry.specs.files import load_line
from restitch.registry.specs.line import LineSpec, line_changes
from restitch.registry.specs.method import MethodSpec, TournamentSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base, describe_model, open_base
from restitch.tasks.inputs.task_data import check_rows, resolve_task
from restitch.tasks.method_selection import check_benchmark
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import actor, workspace
from restitch.tasks.statistics import check_rows_for


@dataclass(frozen=True)
class InitOutcome:
    """What `init` did.

    Attributes:
        created: whether the line is new.
        changes: what it changed on an existing line, as key, old value, new value.
        localizable: how many tensors masks may select from, and how many coordinates.
    """

    line: str
    created: bool
    changes: tuple[tuple[str, Any, Any], ...]
    base: str
    base_digest: str
    localizable: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def init_line(file: Path) -> InitOutcome:
    """Make or update a line.

    Raises:
        BadInput: the file, its base or its benchmark cannot be used, or it changes what is fixed.
    """
    space = workspace()
    spec = load_line(file)
    family = get_family(spec.family)
    spec = spec.with_method(_resolved(spec.method))
    ledger = Ledger(space.objects, spec.line)
    old = ledger.find()
    if old is not None:
        spec = spec.with_pins_of(old.spec)
        if spec.base == old.base.uri:  # a copy by its own address, where the original is gone
            spec = spec.with_base(old.spec.base)
    changes: list[tuple[str, Any, Any]] = []
    if old is None:
        base = describe_model(spec.base, family, space, whole=True)
        # A copy's own address would not be in the line file when that is read again.
        if not base.uri.startswith(COPY_SCHEME):
            spec = spec.with_base(base.uri)
    else:
        line_changes(old.spec, spec)  # what is fixed, before anything is read
        base = old.base
    opened = open_base(LineRef(spec, base), space)
    _check_fit(spec, opened)
    if isinstance(spec.retention, TaskSpec):
        benchmark = resolve_task(spec.retention, family)
        check_rows(benchmark, family, space)
        spec = spec.with_retention(benchmark)
    if isinstance(spec.method, TournamentSpec) and not isinstance(spec.retention, str):
        check_benchmark(spec.line, spec.method.objective, spec.retention, family)
    if old is None:
        ledger.create(spec, base, actor(), f"line {spec.line} on {base.uri}")
    else:
        changes = line_changes(old.spec, spec)
        taking_part = [member.spec for member in old.members]
        for one in spec.method.methods:
            check_rows_for(get_method(one.name), taking_part)
        _configure(ledger, spec, changes)
    mirror(spec.line)
    return InitOutcome(
        spec.line,
        old is None,
        tuple(changes),
        base.uri,
        base.weights,
        {
            "tensors": len(opened.names),
            "coordinates": sum(opened.checkpoint.info(name).numel for name in opened.names),
        },
    )


def _check_fit(spec: LineSpec, base: Base) -> None:
    """Refuse a base of another family, and settings that the method would refuse later."""
    wrong = base.family.config_differences(base.folder, base.folder)
    if wrong:
        raise BadInput(
            f"the base {base.ref.uri} is not of family {spec.family}",
            details=wrong,
            hint=f"choose a family that fits: {', '.join(family_names())}",
        )
    try:
        TaskVector(base.checkpoint, base.checkpoint, base.names).check_finite()
    except CannotJoin as error:
        raise BadInput(
            f"the base {base.ref.uri} has weights that are no numbers",
            expected=error.expected,
            found=error.found,
            details=error.details,
            hint="take another copy of the base",
        ) from error
    chosen = spec.method.methods
    for one in chosen:
        get_method(one.name)(base.checkpoint, (), **one.settings)  # merges nothing
    _check_alike(chosen)
    method = get_method(chosen[0].name)
    if method.whole and (spec.localize.mode, spec.localize.density) != ("dataless", 1.0):
        raise BadInput(
            f"the method {method.name} needs whole task vectors, and the line would not keep them",
            expected="localize: {mode: dataless, density: 1}",
            found=f"localize: {{mode: {spec.localize.mode}, density: {spec.localize.density}}}",
            hint="leave `localize` out, or choose a method that merges sparse deltas: "
            + ", ".join(name for name in method_names() if not get_method(name).whole),
        )


def _resolved(method: MethodSpec | TournamentSpec) -> MethodSpec | TournamentSpec:
    """The same with the defaults of all settings filled in.

    Raises:
        BadInput: there is no such method or setting, or contestants are the same.
    """
    found = [
        MethodSpec(name=one.name, settings=resolve_settings(one.name, one.settings))
        for one in method.methods
    ]
    if isinstance(method, MethodSpec):
        return found[0]
    for place, one in enumerate(found):
        if one in found[:place]:
            raise BadInput(
                f"the tournament has {one.name} twice with the same settings",
                expected="contestants that differ",
                found=one.settings,
                hint="leave one of them out: what is not set has its default",
            )
    return method.model_copy(update={"tournament": tuple(found)})


def _check_alike(chosen: tuple[MethodSpec, ...]) -> None:
    """Refuse a tournament of methods that need other deltas."""
    methods = [get_method(one.name) for one in chosen]
    whole = sorted({method.name for method in methods if method.whole})
    sparse = sorted({method.name for method in methods if not method.whole})
    if whole and sparse:
        raise BadInput(
            "a tournament has methods that need other deltas of the members",
            expected="contestants that all merge whole task vectors, or all sparse deltas",
            found=f"whole task vectors: {', '.join(whole)}; sparse deltas: {', '.join(sparse)}",
            hint="leave one of the groups out; `restitch compare` measures both beside each other",
        )


def _configure(ledger: Ledger, spec: LineSpec, changes: list[tuple[str, Any, Any]]) -> None:
    def change(line_state: LineState) -> LineState | None:
        return None if line_state.spec == spec else line_state.with_spec(spec)

    if changes:
        text = "; ".join(f"{key}: {old} -> {new}" for key, old, new in changes)
        ledger.act("configured", actor(), text, change)
