"""The keys of a paper file: the models and data sets of a published table, and its numbers.

A paper file of `restitch` lies in the package `restitch.papers` (`examples/papers` in the sources).
`load_paper` reads one by its name, or any other by its path, into the line and the tasks that the
study of the paper makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from restitch.merging.errors import BadInput, unknown_name
from restitch.registry.specs.base import Count, Spec, Text
from restitch.registry.specs.files import line_of, load_task, task_of
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.name import Name
from restitch.registry.specs.strict_yaml import checked, parse_mapping, read_text
from restitch.registry.specs.task import TaskSpec

# Stands for the name of a task in `models`.
TASK = "{task}"
# Rows of a published table that no merge method gives.
BASE, FINETUNED = "base", "finetuned"

_PACKAGE = "restitch.papers"
# Keys that are about one table: a paper file that extends another does not get them from it.
_OWN = ("about", "published", "notes")

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class PaperTask(Spec):
    """A task of a published table."""

    rows: Count
    """The rows that the task is evaluated on, for the estimate of the hours."""
    task: dict[str, JsonValue] | None = None
    """The keys of a task file; by default they are in the file `tasks/NAME.yaml`."""


class PublishedRow(Spec):
    """A row of a published table."""

    name: Text
    """The name of the row, with the settings that the paper names."""
    mean: Percent | None = None
    """The mean over the tasks, in percent."""
    method: Text | None = None
    """The merge method of ours that stands next to it, or `base` or `finetuned`."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The settings of the method that the paper names, which differ from our defaults."""
    benchmark: Percent | None = None
    """Top-1 on the general benchmark, in percent."""


class PublishedTable(Spec):
    """A published table."""

    source: Text
    """Where the numbers were published."""
    same_models: bool = True
    """Whether they were measured on these models; others never stand in one row with ours."""
    rows: Annotated[tuple[PublishedRow, ...], Field(min_length=1)]
    """The rows."""


class PaperSpec(Spec):
    """The models and data sets of a published table, and its numbers."""

    about: Text
    """What the table compares, in one line."""
    base: Text
    """The base, as in a line file."""
    family: Text
    """The family, as in a line file."""
    localize: dict[str, JsonValue] = Field(default_factory=dict)
    """The masks of methods that merge sparse deltas, as in a line file; by default dataless, of the
    largest 5 %."""
    retention: Text | None = None
    """The task file of the general benchmark."""
    retention_rows: Count | None = None
    """The rows of the general benchmark."""
    models: Text | None = None
    """The finetuned models: a hub id with `{task}` in place of the task's name. Without it, the
    user gives the models."""
    tasks: Annotated[dict[Name, PaperTask], Field(min_length=2)]
    """The tasks by their names."""
    published: tuple[PublishedTable, ...] = ()
    """What was published."""
    notes: tuple[Text, ...] = ()
    """What a reader of the table has to know."""


@dataclass(frozen=True)
class Paper:
    """A paper file, resolved: the line, its tasks, and the models that the study registers.

    Attributes:
        name: of the paper, and of its line.
        line: the keys of the line.
        tasks: the tasks by name.
        models: the source of each task's model.
    """

    name: str
    spec: PaperSpec
    line: Mapping[str, Any]
    tasks: Mapping[str, TaskSpec]
    models: Mapping[str, str]

    @property
    def comparable(self) -> list[PublishedRow]:
        """What was published on these models."""
        tables = (table for table in self.spec.published if table.same_models)
        return [row for table in tables for row in table.rows]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of methods that were published on these models."""
        return {row.method: row.settings for row in self.comparable if row.method and row.settings}

    @property
    def line_spec(self) -> LineSpec:
        """The line that `init` makes."""
        return line_of(self.line)


def paper_names() -> list[str]:
    """The papers of the package."""
    return sorted((path.stem for path in _folder().glob("*.yaml")), key=_by_size)


def load_paper(
    paper: str,
    *,
    models: str | None = None,
    benchmark: Path | None = None,
    retention: bool = True,
) -> Paper:
    """Read a paper file.

    Args:
        paper: a name of `paper_names`, or the path of a file.
        models: the models in place of those of the file: an id or address with `{task}` in place
            of the task's name, or a folder with one model per task.
        benchmark: a folder with the images of the general benchmark, by class, in place of the
            data set that the file names.
        retention: measure the general benchmark, if the file names one.

    Raises:
        BadInput: there is no such paper, its file cannot be used, or it names no models and none
            were given.
    """
    path = _path_of(paper)
    spec = checked(PaperSpec, _values(path), str(path))
    source = models or spec.models
    if source is None:
        raise BadInput(
            f"the models of {path.stem} are not published",
            expected="--models: a folder with one model per task, or an id with {task} in it",
            hint=f"finetune one model of {spec.base} per task: {', '.join(spec.tasks)}",
        )
    pattern = source if TASK in source else f"{source.rstrip('/')}/{TASK}"
    general = _benchmark(path, spec, benchmark) if retention else None
    if not retention:
        spec = spec.model_copy(update={"retention": None, "retention_rows": None})
    line = {
        "line": path.stem,
        "base": _relative(spec.base, path.parent),
        "family": spec.family,
        "method": "localize-and-stitch",
        "localize": {"mode": "dataless", **spec.localize},
        "retention": None if general is None else general.to_json(),
        "schedule": None,
        "mlflow": {"weights": "none"},
    }
    tasks = {name: _task(path, name, task) for name, task in spec.tasks.items()}
    sources = {name: pattern.replace(TASK, name) for name in tasks}
    found = Paper(path.stem, spec, line, tasks, sources)
    _ = found.line_spec  # a line that cannot be made is refused here
    return found


def _by_size(name: str) -> tuple[str, int]:
    """`clip-b32-8` stands before `clip-b32-14`."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)


def _folder() -> Path:
    return Path(str(files(_PACKAGE)))


def _path_of(paper: str) -> Path:
    if paper.endswith((".yaml", ".yml")):
        return Path(paper).absolute()
    path = _folder() / f"{paper}.yaml"
    if paper not in paper_names():
        raise unknown_name("paper", paper, paper_names())
    return path


def _values(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, with those of the file that it extends.

    Own keys win; tasks are added to those of the other file.
    """
    if path in seen:
        raise BadInput(f"{path} extends itself", found=" -> ".join(one.name for one in seen))
    values = parse_mapping(read_text(path, "paper file"), str(path))
    other = values.pop("extends", None)
    if other is None:
        return values
    if not isinstance(other, str):
        raise BadInput(f"{path}: extends is not the name of a paper file", found=other)
    above = _values(path.parent / f"{other}.yaml", (*seen, path))
    inherited = {key: value for key, value in above.items() if key not in _OWN}
    tasks = {**_mapping(inherited, "tasks"), **_mapping(values, "tasks")}
    return {**inherited, **values, "tasks": tasks}


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _task(path: Path, name: str, described: PaperTask) -> TaskSpec:
    if described.task is None:
        spec = load_task(path.parent / "tasks" / f"{name}.yaml")
        if spec.task != name:
            raise BadInput(
                f"{path}: the file of the task {name} describes another task",
                expected=f"task: {name}",
                found=f"task: {spec.task}",
            )
        return spec
    return task_of({"task": name, **described.task}, f"{path}: tasks.{name}", path.parent)


def _benchmark(path: Path, spec: PaperSpec, folder: Path | None) -> TaskSpec | None:
    """The general benchmark, with the images of a folder if one is given."""
    if spec.retention is None:
        if folder is not None:
            raise BadInput(
                f"{path.stem} has no general benchmark",
                found=f"--benchmark {folder}",
                hint="leave out --benchmark",
            )
        return None
    task = load_task(path.parent / spec.retention)
    if folder is None:
        return task
    if not folder.is_dir():
        raise BadInput(
            f"the images of {task.task} are not there",
            expected="a folder with one folder of images per class",
            found=f"no folder {folder}",
            hint="correct --benchmark",
        )
    place = folder.resolve()
    values = task.to_json()
    values["data"] = {"path": str(place.parent), "test": place.name}
    return task_of(values, f"the images in {folder}", place.parent)


def _relative(value: str, folder: Path) -> str:
    """A base that lies next to the paper file, or an id or address as it is."""
    return str(folder / value) if value.startswith((".", "~")) else value
