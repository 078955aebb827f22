"""Read line and task files into specs.

A spec is resolved: relative paths become absolute, files of labels and templates are read into
the spec, and defaults are filled in. A method that needs whole task vectors keeps every
coordinate unless the file says otherwise. Every error names the file and the key.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.registry.access_policy import check_path
from restitch.registry.paths import is_there, named_path
from restitch.registry.specs.hub_id import is_hub_id
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.mergekit import from_mergekit, is_mergekit
from restitch.registry.specs.name import NAME
from restitch.registry.specs.once import MergeSpec
from restitch.registry.specs.strict_yaml import checked, parse_mapping, read_text
from restitch.registry.specs.task import TaskSpec

_MAX_LABEL_FILE = 16 << 20


class NoFamily(BadInput):
    """A line file that names no family, and is valid otherwise."""


class NoMethod(BadInput):
    """A line file that names no method, and is valid otherwise."""


def load_line(path: Path, family: str | None = None, method: str | None = None) -> LineSpec:
    """Read a line file.

    Args:
        path: the file.
        family: the family of a file that names none.
        method: the method of a file that names none.

    Raises:
        NoFamily: the file names no family, and none was given.
        NoMethod: the file names no method, and none was given.
        BadInput: the file, or a file that it names, cannot be used.
    """
    text = read_text(path, "line file")
    return parse_line(text, str(path), path.absolute().parent, family, method)


def load_task(path: Path) -> TaskSpec:
    """Read a task file.

    Raises:
        BadInput: the file, or a file that it names, cannot be used.
    """
    return parse_task(read_text(path, "task file"), str(path), path.absolute().parent)


def load_merge(path: Path) -> MergeSpec:
    """Read a file for `restitch merge`: our own form, or a mergekit file.

    Raises:
        BadInput: the file cannot be used, or mergekit has something in it that we lack.
    """
    return parse_merge(read_text(path, "merge file"), str(path), path.absolute().parent)


def line_of(
    values: Mapping[str, Any], family: str | None = None, method: str | None = None
) -> LineSpec:
    """A line from the keys of a line file; relative paths start at the working directory.

    Raises:
        NoFamily, NoMethod, BadInput: as `load_line`.
    """
    return _line(deepcopy(dict(values)), "the line", Path.cwd(), family, method)


def task_of(
    values: Mapping[str, Any], origin: str = "the task", folder: Path | None = None
) -> TaskSpec:
    """A task from the keys of a task file.

    Args:
        values: the keys.
        origin: the name of the keys in errors.
        folder: where relative paths start; by default the working directory.

    Raises:
        BadInput: a key, or a file that it names, cannot be used.
    """
    return _task(deepcopy(dict(values)), origin, folder or Path.cwd())


def parse_merge(text: str, origin: str, folder: Path) -> MergeSpec:
    """Read the text of a file for `restitch merge`; its relative paths start at the folder."""
    values = parse_mapping(text, origin)
    if is_mergekit(values):
        values = from_mergekit(values, origin)
    return _merge(values, origin, folder)


def _merge(values: dict[str, Any], origin: str, folder: Path) -> MergeSpec:
    if isinstance(values.get("base"), str):
        values["base"] = _source(values["base"], folder, f"{origin}: base")
    if isinstance(values.get("models"), dict):
        values["models"] = {
            task: _source(source, folder, f"{origin}: models.{task}")
            if isinstance(source, str)
            else source
            for task, source in values["models"].items()
        }
    return checked(MergeSpec, values, origin)


def merge_of(values: dict[str, Any]) -> MergeSpec:
    """A merge from the options of a command; relative paths start at the working directory."""
    return _merge(values, "the merge", Path.cwd())


def parse_line(
    text: str, origin: str, folder: Path, family: str | None = None, method: str | None = None
) -> LineSpec:
    """Read the text of a line file; its relative paths start at the folder."""
    return _line(parse_mapping(text, origin), origin, folder, family, method)


def _line(
    values: dict[str, Any], origin: str, folder: Path, family: str | None, method: str | None
) -> LineSpec:
    without_method = values.get("method") is None
    if without_method:
        values["method"] = method or "none"  # the other keys are checked as well
    unnamed = values.get("family") is None
    if unnamed:
        values["family"] = family or "none"  # the other keys are checked as well
    if isinstance(values.get("base"), str):
        values["base"] = _source(values["base"], folder, f"{origin}: base")
    retention = values.get("retention")
    if isinstance(retention, str):
        file = named_path(retention, folder, f"{origin}: retention")
        if is_there(file) and not file.is_dir():
            values["retention"] = _keys_of(load_task(file))
        elif not NAME.match(retention):
            raise BadInput(
                f"{origin}: retention {retention!r} is neither a file nor the name of a task",
                expected=f"a task file, relative to {folder}, or the name of a task of the line",
            )
    elif isinstance(retention, dict):
        values["retention"] = _keys_of(_task(retention, f"{origin}: retention", folder))
    for key in ("localize", "space", "gates", "actors", "notify", "mlflow"):
        if values.get(key, ...) is None:  # `gates:` without a value
            del values[key]
    _resolve_objective(values)
    if "localize" not in values and _needs_whole(values.get("method")):
        values["localize"] = {"mode": "dataless", "density": 1.0}
    elif "localize" not in values and values.get("space") is not None:
        values["localize"] = {"mode": "dataless"}
    spec = checked(LineSpec, values, origin)
    if unnamed and family is None:
        raise NoFamily(
            f"{origin} names no family", expected="a line such as `family: text-encoder`"
        )
    if without_method and method is None:  # which one depends on the family
        raise NoMethod(
            f"{origin} names no method", expected="a line such as `method: localize-and-stitch`"
        )
    return spec


def _resolve_objective(values: dict[str, Any]) -> None:
    """By default the winner of a tournament must keep the retention that the gate asks for."""
    method, gates = values.get("method"), values.get("gates")
    if not isinstance(method, dict) or "tournament" not in method:
        return
    objective = method.setdefault("objective", {})
    if objective in ("mean", None):
        objective = method["objective"] = {}
    if isinstance(objective, dict) and isinstance(gates, dict):
        objective.setdefault("min_retention", gates.get("min_retention"))


def _needs_whole(method: Any) -> bool:
    from restitch.merging.methods.registry import get_method, method_names

    if isinstance(method, dict) and isinstance(method.get("tournament"), list):
        return all(_needs_whole(one) for one in method["tournament"])
    name = method.get("name") if isinstance(method, dict) else method
    return isinstance(name, str) and name in method_names() and get_method(name).whole


def _keys_of(task: TaskSpec) -> dict[str, Any]:
    """The keys that a file gave: a task of lm-eval has its own values for the others."""
    return task.model_dump(mode="json", exclude_unset=True)


def parse_task(text: str, origin: str, folder: Path) -> TaskSpec:
    """Read the text of a task file; its relative paths start at the folder."""
    return _task(parse_mapping(text, origin), origin, folder)


def _task(values: dict[str, Any], origin: str, folder: Path) -> TaskSpec:
    data, head = values.get("data"), values.get("head")
    if values.get("answer") is not None:
        values = {"metric": "exact_match", **values}
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        if "://" in data["path"]:
            raise BadInput(
                f"{origin}: data.path {data['path']!r} is an address",
                expected="a folder, or a data set on the hub as owner/name",
                hint="copy the data to a folder that all workers see",
            )
        data["path"] = _source(data["path"], folder, f"{origin}: data.path")
    if str(values.get("lm_eval")).endswith((".yaml", ".yml")):
        values["lm_eval"] = str(_existing(values["lm_eval"], folder, f"{origin}: lm_eval"))
    if isinstance(head, dict):
        for key in ("labels", "templates"):
            if isinstance(head.get(key), str):
                head[key] = _listed(head[key], folder, f"{origin}: head.{key}")
    return checked(TaskSpec, values, origin)


def _existing(value: str, folder: Path, what: str) -> Path:
    """A file that must be there, as an absolute path."""
    path = named_path(value, folder, what)
    if not is_there(path, what):
        raise BadInput(
            f"{what} {value!r} is not there",
            expected=f"a file, relative to {folder}",
            found=f"nothing at {path}",
            hint="check the path; relative paths in a file are relative to that file",
        )
    return path.resolve()


def _source(value: str, folder: Path, what: str) -> str:
    """Make an existing path absolute; return an address or a hub id as it is."""
    path = named_path(value, folder, what)
    if is_there(path, what):
        return str(path.resolve())
    if "://" in value or value.startswith(("models:/", "runs:/", "mlflow-artifacts:/")):
        return value.rstrip("/") if value.rstrip("/")[-1] != ":" else value
    if is_hub_id(value):
        return value
    raise BadInput(
        f"{what} {value!r} is neither an existing path nor a hub id",
        found=f"nothing at {path}",
        hint="check the path; relative paths in a file are relative to that file",
    )


def _listed(value: str, folder: Path, what: str) -> list[Any] | str:
    """Read texts from a file, one per line or as a JSON list; the word `openai` stays."""
    path = named_path(value, folder, what)
    if value == "openai" and not is_there(path, what):
        return value
    check_path(path, what)  # the texts are shown, and anyone may have written the task file
    text = read_text(path, what, _MAX_LABEL_FILE)
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{what} {path} is not valid JSON", found=str(error)) from error
        if not isinstance(values, list):
            raise BadInput(f"{what} {path} is not a JSON list of texts")
        return values
    return [line.rstrip() for line in text.splitlines() if line.strip()]
