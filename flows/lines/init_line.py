"""Make a line from its file, or update an existing line from its changed file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from restitch.flows.audit.report import mirror
from restitch.flows.outcome import Outcome
from restitch.merging.errors import BadInput, CannotJoin, shortlist
from restitch.merging.files.checkpoint import FLOATING
from restitch.merging.files.comparison import wrapped_names
from restitch.merging.files.plain_weights import described, is_buffer
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.subspace import NAME as SUBSPACE
from restitch.merging.methods.registry import Method, get_method, method_names, resolve_settings
from restitch.merging.ranking.task_vector import check_finite
from restitch.modeling.families.family import family_names, get_family
from restitch.modeling.family_choice import check_base, proposal
from restitch.modeling.kinds import model_kind
from restitch.registry.gates.registry import GATES
from restitch.registry.ledger.finetuned_models import Removal
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.sources.resolve import COPY_SCHEME, resolve_source
from restitch.registry.specs.files import NoFamily, NoMethod, line_of, load_line
from restitch.registry.specs.in_words import changed
from restitch.registry.specs.line import LineSpec, line_changes
from restitch.registry.specs.method import MethodSpec, TournamentSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.adapter_vectors import with_modules
from restitch.tasks.inputs.checkpoints import Base, describe_model, open_base
from restitch.tasks.inputs.heads import check_own_head, with_labels
from restitch.tasks.inputs.live_base import check_compute
from restitch.tasks.inputs.reported_rows import check_some_are_left
from restitch.tasks.inputs.task_data import (
    check_fits,
    check_rows,
    evaluation_split,
    resolve_task,
)
from restitch.tasks.method_selection import check_benchmark
from restitch.tasks.runtime.console import say, warn
from restitch.tasks.runtime.delivery import problems, services
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.schedules import check_schedule
from restitch.tasks.runtime.workspace import Workspace, actor, workspace
from restitch.tasks.statistics import check_rows_for

# Methods for a line file that names none; see docs/results/llm.md, subspaces.md and images.md.
_SPARSE = "localize-and-stitch"
_FOR_LANGUAGE = ("tsv-m", "task-arithmetic")
_BEST = "tsv-m"
_SUBSPACE = "localize: {mode: subspace}"
_FOR_IMAGES = "localize: {mode: subspace, rank: 0.167}"


@dataclass(frozen=True)
class InitOutcome(Outcome):
    """The result of `init`.

    Attributes:
        created: whether the line is new.
        again: whether it was dropped, and starts again.
        changes: the changes of an existing line, as key, old value, new value.
        localizable: the numbers of localizable tensors and coordinates.
    """

    line: str
    created: bool
    again: bool
    changes: tuple[tuple[str, Any, Any], ...]
    base: str
    base_digest: str
    localizable: dict[str, int]


def init_line(file: Path | Mapping[str, Any]) -> InitOutcome:
    """Make or update a line.

    Args:
        file: the line file, or its keys.

    Raises:
        BadInput: the file, its schedule, its base or its benchmark cannot be used, it names no
            family or one that does not take the base, a gate could never be measured, or the base
            or family of an existing line would change.
    """
    space = workspace()
    spec = _load(file, space)
    check_schedule(spec.schedule, str(file) if isinstance(file, Path) else "the line")
    _check_gates(spec)
    family = get_family(spec.family)
    check_compute(family, spec.compute)
    spec = spec.with_method(_resolved(spec.method))
    ledger = Ledger(space.objects, spec.line)
    old = ledger.find()
    if old is not None:
        spec = spec.with_pins_of(old.spec)
        if spec.base == old.base.uri:  # the address of the copy, because the original is gone
            spec = spec.with_base(old.spec.base)
    changes: list[tuple[str, Any, Any]] = []
    if old is None:
        base = describe_model(spec.base, family, space, whole=True)
        # The line file names the original and not its copy.
        if not base.uri.startswith(COPY_SCHEME):
            spec = spec.with_base(base.uri)
    else:
        base = old.base
    spec = with_modules(spec, base.uri, space.home)
    if old is not None:
        line_changes(old.spec, spec)  # refuses changes that are not allowed
    opened = open_base(LineRef(spec, base), space)
    if old is not None:
        _warn_of_another_kind(opened)
    for note in opened.weights.notes:
        say(f"the base: {note}")
    _check_fit(spec, opened)
    if isinstance(spec.retention, str):
        check_own_head(spec.retention, None, opened)
    if isinstance(spec.retention, TaskSpec):
        described = with_labels(spec.retention, None, family, base.uri, space)
        benchmark = resolve_task(described, family)
        remember = check_rows(benchmark, family, space)
        check_fits(benchmark, opened)
        check_own_head(benchmark.task, benchmark, opened)
        remember()
        spec = spec.with_retention(benchmark)
    if isinstance(spec.method, TournamentSpec) and not isinstance(spec.retention, str):
        check_benchmark(spec.line, spec.method.objective, spec.retention, family)
        if spec.method.objective.asks_retention and spec.retention is not None:
            check_some_are_left(spec.retention, family)
    if old is None:
        ledger.create(spec, base, actor(), f"line {spec.line} on {base.uri}")
    else:
        changes = line_changes(old.spec, spec)
        taking_part = [member.spec for member in old.members]
        for one in spec.method.methods:
            check_rows_for(get_method(one.name), taking_part)
        _configure(ledger, spec, changes, old.dropped)
    if spec.notify:
        for problem in problems(services()):
            warn(f"{spec.line} asks for notifications, but {problem}")
    mirror(spec.line)
    return InitOutcome(
        spec.line,
        old is None,
        old is not None and old.dropped is not None,
        tuple(changes),
        base.uri,
        base.weights,
        {
            "tensors": len(opened.names),
            "coordinates": sum(opened.checkpoint.info(name).numel for name in opened.names),
        },
    )


def _load(file: Path | Mapping[str, Any], space: Workspace) -> LineSpec:
    """Read the line; if it names no family or no method, propose one.

    Neither is filled in. A family cannot change later, and with more families or other measurements
    the same file would mean another line.
    """
    load = partial(load_line, file) if isinstance(file, Path) else partial(line_of, file)
    try:
        return load()
    except NoMethod as error:
        raise BadInput(
            error.summary,
            expected="the merge method of the line",
            hint=_proposed_method(load(method=_SPARSE).family),
        ) from error
    except NoFamily as error:
        spec = load("none", _SPARSE)
        line = Ledger(space.objects, spec.line).find()
        if line is not None:
            raise BadInput(
                error.summary,
                found=f"line {spec.line} exists, with the family {line.spec.family}",
                hint=f"add this line to the file: `family: {line.spec.family}`",
            ) from error
        base = resolve_source(spec.base, space.home, whole=False)
        try:
            model = model_kind(base.local)
        except BadInput as unreadable:
            renamed = unreadable.renamed(str(base.local), base.uri)
            raise BadInput(
                error.summary,
                expected="a base that says what it is, or its family",
                found=f"{renamed.summary}: {renamed.found or renamed.hint}",
                hint=f"add `family: NAME` to the file, one of {', '.join(family_names())}",
            ) from error
        raise BadInput(
            error.summary,
            expected="the family of the base",
            found=f"the base {base.uri} is {model}",
            hint=proposal(model, base.local, "add this line to the file: {}"),
        ) from error


def _proposed_method(family: str) -> str:
    """The lines to add for the method, by what was best on a line of this family."""
    chosen = get_family(family)
    method, kept = f"method: {_BEST}", _SUBSPACE
    if chosen.reads_prompts:
        method = f"method: {{tournament: [{', '.join(_FOR_LANGUAGE)}]}}"
    if chosen.modality == "image":
        kept = _FOR_IMAGES
    return (
        f"add these lines to the file: `{method}` and `{kept}`, which reached the most on"
        f" lines of such models, in few bytes; or the one line `method: {_SPARSE}`, which reached"
        " less, and whose weights are the same bytes on every machine"
    )


def _check_gates(spec: LineSpec) -> None:
    """Refuse gates that can never be measured, because the line has no benchmark for them."""
    benchmark = spec.retention
    # A task of the line may be described, or get its data, later.
    if isinstance(benchmark, str) or (benchmark is not None and evaluation_split(benchmark)):
        return
    gates = [name for name in spec.gates.limits if GATES[name].needs_benchmark]
    if gates:
        raise BadInput(
            f"line {spec.line}: {', '.join(gates)} can never be measured",
            expected="retention: a general benchmark with rows to evaluate on",
            found="no retention" if benchmark is None else f"no test rows in {benchmark.task}",
            hint="name a task file with data under `retention`, or remove the gate; a gate that is "
            "not measured blocks every version",
        )


def _warn_of_another_kind(base: Base) -> None:
    """Say that the base of an existing line is one that its family no longer takes."""
    try:
        check_base(base.family, base.folder, base.ref.uri)
    except BadInput as error:
        warn(f"{error.summary}: found {error.found}; the line works as before")


def _check_fit(spec: LineSpec, base: Base) -> None:
    """Refuse a base of another family, and settings that the method cannot merge with."""
    differences = base.family.config_differences(base.folder, base.folder)
    if differences:
        raise BadInput(
            f"the base {base.ref.uri} is not of family {spec.family}",
            details=differences,
            hint=f"choose the family of the base: {', '.join(family_names())}",
        )
    if spec.space is not None and base.family.task_heads is not None:
        raise BadInput(
            f"a line of family {spec.family} cannot merge the vectors of adapters",
            expected="a family without heads in its finetuned models",
            found=f"space, with family: {spec.family}",
            hint="leave out `space`: the line then merges the weights that the adapters give",
        )
    _check_tensors(base)
    try:
        check_finite(base.weights)
    except CannotJoin as error:
        raise BadInput(
            f"the base {base.ref.uri} has weights that are not finite",
            expected=error.expected,
            found=error.found,
            details=error.details,
            hint="use an undamaged copy of the base",
        ) from error
    _check_density(spec, base)
    chosen = spec.method.methods
    for one in chosen:
        get_method(one.name)(base.checkpoint, (), **one.settings)  # a merge without members
    _check_alike(chosen)
    check_kept(spec, get_method(chosen[0].name))


def check_kept(spec: LineSpec, method: Method) -> None:
    """Refuse a method that cannot merge what the line keeps of its members."""
    choice = spec.localize
    if spec.space is not None and (method.needs or not method.exact):
        raise BadInput(
            f"the method {method.name} merges the weights of layers, and the line has vectors",
            expected="a method that merges number by number: "
            + ", ".join(
                name
                for name, each in ((name, get_method(name)) for name in method_names())
                if each.exact and not each.needs
            ),
            found=method.name,
            hint="choose one of them, or a line without `space`",
        )
    is_subspace = choice.mode == SUBSPACE
    if method.whole and not is_subspace and (choice.mode, choice.density) != ("dataless", 1.0):
        raise BadInput(
            f"the method {method.name} needs whole task vectors, which the line does not keep",
            expected="localize: {mode: subspace}, or {mode: dataless, density: 1}",
            found=f"localize: {{mode: {choice.mode}, density: {choice.density}}}",
            hint="choose one of the two, or a method for sparse deltas: "
            + ", ".join(name for name in method_names() if not get_method(name).whole),
        )
    if is_subspace and not method.whole:
        raise BadInput(
            f"the method {method.name} stitches masks, and the line keeps subspaces",
            expected="a method for whole task vectors: "
            + ", ".join(name for name in method_names() if get_method(name).whole),
            found=method.name,
            hint="choose one of them, or another localize: mode",
        )


def _check_density(spec: LineSpec, base: Base) -> None:
    """Refuse a density that keeps nothing of this base."""
    choice = spec.localize
    density = choice.max_density if choice.density == "auto" else choice.density
    coordinates = sum(base.checkpoint.info(name).numel for name in base.names)
    if density is not None and kept_count(density, coordinates) == 0:
        raise BadInput(
            "the density under localize keeps no coordinate of this base",
            expected=f"{1 / coordinates:.1e} or more, for {coordinates:,} localizable coordinates",
            found=density,
            hint="correct it, or leave it out for the default",
        )


def _check_tensors(base: Base) -> None:
    """Refuse a base whose tensors cannot be found by their names, or cannot be merged."""
    if wrapped := wrapped_names(base.weights.names):
        raise BadInput(
            f"the base {base.ref.uri} has names that a wrapper changed",
            expected="the names of a model that was saved with save_pretrained",
            found=shortlist(wrapped),
            hint="unwrap the model (torch.compile, DistributedDataParallel, ...) and save it again",
        )
    infos = [base.weights.info(name) for name in base.weights.names]
    integers = [
        described(info)
        for info in infos
        if base.selection.matches(info.name) and info.dtype not in FLOATING and not is_buffer(info)
    ]
    if integers:
        raise BadInput(
            f"the base {base.ref.uri} has tensors in localizable layers that are no weights",
            expected="weights in float32, bfloat16, float16 or float64",
            found=f"{len(integers)} tensors of other types",
            details=integers,
            hint="use the base before quantization, or leave them out with localize: exclude",
        )


def _resolved(method: MethodSpec | TournamentSpec) -> MethodSpec | TournamentSpec:
    """The method with the defaults of all settings filled in.

    Raises:
        BadInput: the method or a setting does not exist, or two contestants are the same.
    """
    resolved = [
        MethodSpec(name=one.name, settings=resolve_settings(one.name, one.settings))
        for one in method.methods
    ]
    if isinstance(method, MethodSpec):
        return resolved[0]
    for place, one in enumerate(resolved):
        if one in resolved[:place]:
            raise BadInput(
                f"the tournament has {one.name} twice with the same settings",
                expected="contestants that differ",
                found=one.settings,
                hint="remove one of them; a setting that is left out has its default",
            )
    return method.model_copy(update={"tournament": tuple(resolved)})


def _check_alike(chosen: tuple[MethodSpec, ...]) -> None:
    """Refuse a tournament of methods that need different deltas."""
    methods = [get_method(one.name) for one in chosen]
    whole = sorted({method.name for method in methods if method.whole})
    sparse = sorted({method.name for method in methods if not method.whole})
    if whole and sparse:
        raise BadInput(
            "the methods of the tournament need different deltas of the members",
            expected="contestants that all need whole task vectors, or all sparse deltas",
            found=f"whole task vectors: {', '.join(whole)}; sparse deltas: {', '.join(sparse)}",
            hint="remove one of the groups; `restitch compare` measures both",
        )


def _configure(
    ledger: Ledger,
    spec: LineSpec,
    changes: list[tuple[str, Any, Any]],
    dropped: Removal | None,
) -> None:
    def change(line_state: LineState) -> LineState | None:
        after = line_state.with_spec(spec).with_drop(None)
        return None if after == line_state else after

    if changes or dropped is not None:
        text = "; ".join(line for each in changes for line in changed(*each))
        if dropped is not None:
            text = f"line {spec.line} starts again{': ' if text else ''}{text}"
        ledger.act("configured", actor(), text, change)
