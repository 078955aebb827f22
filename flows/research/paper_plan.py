"""What the study of a paper needs before it starts: disk space, memory and hours.

Sizes of models and data sets are those that the hub lists. What the store will hold follows from
the shape of the base, whose configuration alone is fetched. Hours are the rows to evaluate times
the seconds of a row, which a short pass measures on this machine.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from restitch.flows.outcome import Outcome
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import Method, get_method, method_names
from restitch.merging.statistics.statistic_file import (
    COEFFICIENTS,
    FISHER,
    GRADIENT_GRAM,
    GRAM,
)
from restitch.modeling.device import device
from restitch.modeling.families.family import get_family
from restitch.modeling.short_pass import ShortPass, short_pass
from restitch.registry.ledger.finetuned_models import ModelVersion
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.sources.hub import config_on_hub, is_read, sizes_on_hub
from restitch.registry.specs.hub_id import is_hub_id, split_pin
from restitch.registry.specs.paper import Paper
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.task_data import same_task
from restitch.tasks.research.tune import MOST_ROWS
from restitch.tasks.runtime.free_memory import free_memory
from restitch.tasks.runtime.workspace import Workspace, workspace

# Bytes of a weight in float32, and of one that a sparse delta keeps: value and coordinate.
_WHOLE, _SPARSE = 4, 5.2
# What registration fills in, if a task file leaves it out.
_FILLED_IN = ("input", "label", "content")
# The base, the finetuned model, and its sparse and its whole delta alone.
_ONCE = 4


@dataclass(frozen=True)
class Need:
    """Something that is needed: bytes, and how they are estimated."""

    what: str
    size: int
    how: str


@dataclass(frozen=True, kw_only=True)
class PaperPlan(Outcome):
    """What the study of a paper needs.

    Attributes:
        line: the line that it makes.
        registered: the tasks whose models are in the line already.
        to_register: the source of each model that is not.
        methods: the methods that it compares.
        disk: what is stored, with the bytes of each part; likewise `memory`.
        disk_free: the bytes that are free where the store or the hub's cache lies, the smaller.
        rows: how many rows are evaluated, from the beginning.
        row_seconds: of one row, as measured.
        measured: how they were measured.
    """

    paper: str
    about: str
    line: str
    registered: tuple[str, ...]
    to_register: dict[str, str]
    methods: tuple[str, ...]
    tuned: bool
    disk: tuple[Need, ...]
    disk_free: int
    memory: tuple[Need, ...]
    memory_free: int | None
    device: str
    rows: int
    row_seconds: float
    measured: str

    @property
    def hours(self) -> float:
        """The hours of evaluating."""
        return self.rows * self.row_seconds / 3600


def plan_paper(paper: Paper, methods: Sequence[str] = (), tuned: bool = False) -> PaperPlan:
    """Estimate what a study needs; nothing is fetched but the base's configuration.

    Args:
        paper: the paper.
        methods: the methods to compare; all by default.
        tuned: choose each method's tunable setting on validation rows.

    Raises:
        BadInput: models or data sets are not on the hub; the message names all of them. There is
            no such method.
        Unavailable: the hub cannot be reached.
    """
    chosen = [get_method(name) for name in methods or method_names()]
    done = registered_tasks(paper)
    missing = [name for name in paper.tasks if name not in done]
    fetched = _downloads(paper, missing)
    family = get_family(paper.spec.family)
    on = device()
    timed = short_pass(_config_folder(paper.spec.base), family.modality, on)
    space = workspace(to_write=False)
    free = free_memory(on)
    return PaperPlan(
        paper=paper.name,
        about=paper.spec.about,
        line=paper.name,
        registered=tuple(done),
        to_register={name: paper.models[name] for name in missing},
        methods=tuple(method.name for method in chosen),
        tuned=tuned,
        disk=(*fetched, *_stored(paper, timed, chosen)),
        disk_free=min(_free(folder) for folder in _folders(space)),
        memory=tuple(_held(paper, timed, chosen)),
        memory_free=None if free is None else free.size,
        device=str(on),
        rows=_rows(paper, chosen, tuned),
        row_seconds=timed.row,
        measured=f"{timed.rows} rows on this {on}, each {timed.what}; random weights, two layers of"
        " the base, scaled to all",
    )


def find_line(paper: Paper) -> LineState | None:
    """The state of a paper's line; None before it is made."""
    return Ledger(workspace(to_write=False).objects, paper.name).find()


def registered_tasks(paper: Paper) -> list[str]:
    """The tasks of a paper whose models are in its line, from the same sources and described so."""
    line_state = find_line(paper)
    if line_state is None:
        return []
    return [name for name, spec in paper.tasks.items() if _is_registered(line_state, paper, spec)]


def _is_registered(line_state: LineState, paper: Paper, spec: TaskSpec) -> bool:
    task = line_state.tasks.get(spec.task)
    if task is None or not task.declared or not _means(task.spec, spec):
        return False
    source = paper.models[spec.task]
    return any(_is_ready(model, source) for model in task.versions.values())


def _is_ready(model: ModelVersion, source: str) -> bool:
    return model.state == "ready" and source in (model.model.uri, split_pin(model.model.uri)[0])


def _means(known: TaskSpec, spec: TaskSpec) -> bool:
    """True if a registered task is the one that a file describes: the same data, read the same."""
    if known.data is None or spec.data is None:
        return known == spec
    if split_pin(known.data.path)[0] != split_pin(spec.data.path)[0]:
        return False
    filled = {name: getattr(spec.data, name) or getattr(known.data, name) for name in _FILLED_IN}
    data = spec.data.model_copy(update={**filled, "path": known.data.path})
    described = spec.model_copy(update={"data": data, "head": spec.head or known.head})
    return data == known.data and same_task(known, described)


def _downloads(paper: Paper, missing: Sequence[str]) -> list[Need]:
    """The models and data sets that the hub sends, or refuses by name."""
    problems: list[str] = []

    def size_of(names: Iterable[str], measure: Callable[[str], int]) -> int:
        total = 0
        for name in dict.fromkeys(names):
            try:
                total += measure(name)
            except BadInput as error:
                problems.append(f"{name}: {error.found or error.summary}")
        return total

    models = size_of([paper.models[name] for name in missing], _model_size)
    described = [paper.tasks[name] for name in missing]
    benchmark, base = paper.line_spec.retention, 0
    if find_line(paper) is None:
        base = size_of([paper.spec.base], _model_size)
        described += [benchmark] if isinstance(benchmark, TaskSpec) else []
    data = size_of((s.data.path for s in described if s.data is not None), _data_size)
    if problems:
        raise BadInput(
            f"{len(problems)} of the models and data sets of {paper.name} cannot be fetched",
            expected="repositories on the hub that your HF_TOKEN may read, or folders",
            found=problems[0] if len(problems) == 1 else None,
            details=problems if len(problems) > 1 else (),
            hint="--models names other models, --benchmark a folder of images; a copy of the paper"
            " file may name other data sets: restitch study paper ./COPY.yaml",
        )
    return [
        Need("base", base, "as the hub lists it"),
        Need("finetuned models", models, f"as the hub lists them, {len(missing)} to fetch"),
        Need("data sets", data, "as the hub lists them, with all their splits"),
        Need("data sets, prepared", data, "the library datasets writes them again, at most so big"),
    ]


def _on_hub(source: str) -> bool:
    return is_hub_id(source) and not Path(source).exists()


def _model_size(source: str) -> int:
    if not _on_hub(source):
        return 0
    return sum(size for file, size in sizes_on_hub(source, "model").items() if is_read(file))


def _data_size(path: str) -> int:
    name, _, config = path.partition(":")
    if not _on_hub(name):
        return 0
    sizes = sizes_on_hub(name, "dataset")
    of_config = [size for file, size in sizes.items() if file.startswith(f"{config}/")]
    return sum(of_config if config and of_config else sizes.values())


def _config_folder(base: str) -> Path:
    return config_on_hub(base) if _on_hub(base) else Path(base)


def _stored(paper: Paper, timed: ShortPass, methods: Sequence[Method]) -> list[Need]:
    """What the store holds at the end, at most."""
    count, whole = len(paper.tasks), _WHOLE * timed.parameters
    localize = paper.line_spec.localize
    density = localize.max_density if localize.density == "auto" else localize.density
    kept = round(_SPARSE * (density or 1.0) * timed.parameters)
    merged = [method for method in methods if method.kind == "merged"]
    experts = [method for method in methods if method.kind == "experts"]
    weights = f"{timed.parameters:,} weights"
    found = [
        Need("sparse deltas", count * kept, f"{count} of {weights}, {_SPARSE} bytes for each kept"),
    ]
    if any(method.whole for method in methods):
        found.append(Need("whole task vectors", count * whole, f"{count} of {weights}, float32"))
    if _needs(methods, FISHER):
        found.append(Need("Fisher diagonals", count * whole, f"{count} of {weights}, float32"))
    for kind, size, what, side in (
        (GRAM, timed.squared_inputs, "Gram matrices", "inputs"),
        (GRADIENT_GRAM, timed.squared_outputs, "Gram matrices of gradients", "outputs"),
    ):
        if _needs(methods, kind):
            about = f"{side} x {side} of each layer, float32"
            found.append(Need(what, _WHOLE * count * size, about))
    found.append(
        Need("merged results", len(merged) * whole, f"{len(merged)} methods, {weights} each")
    )
    if experts:
        size = round(len(experts) * whole * (1 + count / 32))
        found.append(Need("specialists", size, f"{len(experts)} methods, and a bit per task"))
    return found


def _held(paper: Paper, timed: ShortPass, methods: Sequence[Method]) -> list[Need]:
    """What the largest step holds at once, without the activations of a batch."""
    whole = _WHOLE * timed.parameters
    found = [Need("the model", whole, "once, in float32")]
    if _needs(methods, COEFFICIENTS):
        count = len(paper.tasks) + 2
        found.append(Need("AdaMerging", count * whole, "task vectors of all tasks, and gradients"))
    elif _needs(methods, FISHER):
        found.append(Need("Fisher", 2 * whole, "gradients, and the diagonal"))
    elif _needs(methods, GRADIENT_GRAM):
        held = _WHOLE * timed.squared_outputs
        found.append(Need("MaTS", held, "Gram matrices of the gradients of one task"))
    return found


def _needs(methods: Sequence[Method], statistic: str) -> bool:
    return any(statistic in method.needs for method in methods)


def _rows(paper: Paper, methods: Sequence[Method], tuned: bool) -> int:
    """The rows that the study evaluates from its beginning."""
    merged = sum(method.kind == "merged" for method in methods)
    total = 0
    for task in paper.spec.tasks.values():
        total += task.rows * (_ONCE + len(methods))
        if tuned:
            tried = sum(len(method.tunes[1]) for method in methods if method.tunes)
            total += tried * min(MOST_ROWS, task.rows)
    return total + (paper.spec.retention_rows or 0) * (1 + merged)


def _folders(space: Workspace) -> list[Path]:
    """Where bytes are written: the store, if it is a folder, and the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [space.home.root, Path(HF_HUB_CACHE)]


def _free(folder: Path) -> int:
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free if os.access(there, os.R_OK) else 0
