"""Line and task files: YAML that people write, read into specs.

What is read is resolved: relative paths become absolute, files of labels and templates are
read into the spec, defaults are filled in; a method that needs whole task vectors has every
coordinate kept where the file does not say. Every refusal names the file and the key.
"""

import json
from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput
from restitch.registry.access_policy import check_path
from restitch.registry.paths import is_there, named_path
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.strict_yaml import checked, parse_mapping, read_text
from restitch.registry.specs.task import NAME, TaskSpec, is_hub_id

_MAX_LABEL_FILE = 16 << 20


def load_line(path: Path) -> LineSpec:
    """The line that a YAML file describes.

    Raises:
        BadInput: the file, or one that it names, cannot be used.
    """
    path = Path(path)
    return parse_line(read_text(path, "line file"), str(path), path.absolute().parent)


def load_task(path: Path) -> TaskSpec:
    """The task that a YAML file describes.

    Raises:
        BadInput: the file, or one that it names, cannot be used.
    """
    path = Path(path)
    return parse_task(read_text(path, "task file"), str(path), path.absolute().parent)


def parse_line(text: str, origin: str, folder: Path) -> LineSpec:
    """The line that a YAML text describes; its relative paths begin at the folder."""
    values = parse_mapping(text, origin)
    if isinstance(values.get("base"), str):
        values["base"] = _source(values["base"], folder, f"{origin}: base")
    retention = values.get("retention")
    if isinstance(retention, str):
        file = named_path(retention, folder, f"{origin}: retention")
        if is_there(file) and not file.is_dir():
            values["retention"] = load_task(file).to_json()
        elif not NAME.match(retention):
            raise BadInput(
                f"{origin}: retention {retention!r} is neither a file nor the name of a task",
                hint=f"paths are relative to {folder}",
            )
    elif isinstance(retention, dict):
        values["retention"] = _task(retention, f"{origin}: retention", folder).to_json()
    for key in ("localize", "gates", "actors"):
        if values.get(key, ...) is None:  # `gates:` with nothing behind it
            del values[key]
    _resolve_objective(values)
    if "localize" not in values and _needs_whole(values.get("method")):
        values["localize"] = {"mode": "dataless", "density": 1.0}
    return checked(LineSpec, values, origin)


def _resolve_objective(values: dict[str, Any]) -> None:
    """What a tournament's winner must keep is what the line's gate asks, where it is not said."""
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


def parse_task(text: str, origin: str, folder: Path) -> TaskSpec:
    """The task that a YAML text describes; its relative paths begin at the folder."""
    return _task(parse_mapping(text, origin), origin, folder)


def _task(values: dict[str, Any], origin: str, folder: Path) -> TaskSpec:
    data, head = values.get("data"), values.get("head")
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        data["path"] = _source(data["path"], folder, f"{origin}: data.path")
    if isinstance(head, dict):
        for key in ("labels", "templates"):
            if isinstance(head.get(key), str):
                head[key] = _listed(head[key], folder, f"{origin}: head.{key}")
    return checked(TaskSpec, values, origin)


def _source(value: str, folder: Path, what: str) -> str:
    """An existing path, absolute; otherwise an address or a hub id as it stands."""
    path = named_path(value, folder, what)
    if is_there(path, what):
        return str(path.resolve())
    if "://" in value or value.startswith(("models:/", "runs:/", "mlflow-artifacts:/")):
        return value.rstrip("/")
    if is_hub_id(value):
        return value
    raise BadInput(
        f"{what} {value!r} is neither an existing path nor a hub id",
        found=f"nothing at {path}",
        hint="relative paths in a file are relative to that file",
    )


def _listed(value: str, folder: Path, what: str) -> list[Any] | str:
    """The texts that a file holds, one per line or as a JSON list; `openai` stays a word."""
    path = named_path(value, folder, what)
    if value == "openai" and not is_there(path, what):
        return value
    check_path(path, what)  # the texts would be shown: a task may come from anybody
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
