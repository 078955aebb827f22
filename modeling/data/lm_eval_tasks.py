"""Read tasks of lm-eval: their own task objects make the texts, and restitch keeps them as rows.

A task is a name that lm-eval knows, or a YAML file in its format. Only tasks with
`output_type: multiple_choice` whose choices follow the text can be read. A file from somebody else
must not run anything here: functions in Python are refused, and templates are rendered in a
sandbox. The hub is never asked; data sets in its cache are read.
"""

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from restitch.merging.errors import BadInput, RestitchError, shortlist
from restitch.registry.specs.task import Score

EXTRA = "restitch[lm-eval]"
VERSION = "0.4.13"
# The metrics of lm-eval that compare choices, and how; the first one that a task has counts.
SCORES: dict[str, Score] = {"acc": "sum", "acc_norm": "per_character"}

_FUNCTION = "!function"
_SUFFIXES = (".yaml", ".yml")
_FEWSHOT_SEED = 1234  # lm-eval's default

Row = dict[str, Any]


@dataclass(frozen=True)
class LmEvalTask:
    """A task of lm-eval as rows.

    Attributes:
        name: its name in lm-eval.
        version: its own version.
        score: how choices are compared: by their sums, unless its only metric is `acc_norm`.
        splits: rows with `prompt`, `choices` and `label`, by train, validation and test; the test
            rows are those that lm-eval reports on.
    """

    name: str
    version: str
    score: Score
    splits: Mapping[str, list[Row]]


def read_lm_eval(source: str, subject: str, check_path: Callable[[Path, str], None]) -> LmEvalTask:
    """Read a task of lm-eval.

    Args:
        source: its name, or the path of its file.
        subject: the key and its file, for messages.
        check_path: refuses a path that this process may not read.

    Raises:
        BadInput: lm-eval is not installed, or the task cannot be used; the message says why.
    """
    lm_eval = _library(subject)
    with _quiet(), _sandboxed(lm_eval), _offline():
        try:
            if source.endswith(_SUFFIXES):
                task = _from_file(Path(source), subject, check_path)
            else:
                task = _by_name(source, subject)
            return _read(task, source, subject)
        except RestitchError:
            raise
        except Exception as error:  # code of lm-eval, of `datasets`, and of templates
            raise _explained(source, subject, error) from error


def _library(subject: str) -> ModuleType:
    try:
        import lm_eval.utils

        found = importlib.metadata.version("lm-eval")
    except ImportError as error:
        raise BadInput(
            f"{subject} needs lm-eval",
            expected=f"lm-eval {VERSION}",
            found=f"not installed: {error}",
            hint=f"pip install '{EXTRA}'",
        ) from error
    if found != VERSION:
        raise BadInput(
            f"{subject} needs another version of lm-eval",
            expected=f"lm-eval {VERSION}",
            found=found,
            hint=f"pip install '{EXTRA}'",
        )
    utils: ModuleType = lm_eval.utils
    return utils


def _by_name(name: str, subject: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_subtasks:
        near = get_close_matches(name, manager.all_subtasks, n=3)
        several = name in manager.all_tasks
        problem = "is a group of tasks" if several else "is no task of lm-eval"
        raise BadInput(
            f"{subject} {name!r} {problem}",
            expected="the name of one task, or a file in lm-eval's format",
            found=f"similar names: {', '.join(near) or 'none'}",
            hint="name one of its tasks; `lm-eval ls tasks` lists all" if several else "correct it",
        )
    return manager.load(name)["tasks"][name]


def _from_file(path: Path, subject: str, check_path: Callable[[Path, str], None]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = _config(path, subject, check_path, ())
    for key in ("task", "dataset_path", "output_type"):
        if not isinstance(config.get(key), str):
            raise BadInput(
                f"{path} has no {key}",
                expected=f"a task file of lm-eval with `{key}: ...`",
                found=f"keys {shortlist(sorted(map(str, config)))}",
            )
    _check_type(config["output_type"], config["task"], subject)
    for key in ("use_prompt", "unsafe_code", "custom_dataset", "class"):
        if config.get(key):
            raise BadInput(
                f"{path} has the key {key}, which can run code",
                expected="a dataset_path, and templates as texts",
                hint="write the prompt as doc_to_text",
            )
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    given = config.get("dataset_kwargs") or {}
    if "data_files" in given:
        files = _located(given["data_files"], path.parent, lambda p: check_path(p, subject))
        config["dataset_kwargs"] = {**given, "data_files": files}
    return ConfigurableTask(config=config)


def _config(
    path: Path, subject: str, check_path: Callable[[Path, str], None], above: tuple[Path, ...]
) -> dict[str, Any]:
    """The keys of a task file, on top of those of the files that it includes."""
    path = path.resolve()
    check_path(path, subject)
    try:
        text = path.read_text(encoding="utf-8")
        tags = [getattr(event, "tag", None) for event in yaml.parse(text, yaml.SafeLoader)]
        if _FUNCTION in tags:
            raise BadInput(
                f"{path} names functions in Python, which restitch does not run",
                expected="templates as texts",
                found=_FUNCTION,
                hint="write doc_to_text, doc_to_choice and doc_to_target as templates, and prepare"
                " the rows beforehand",
            )
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read as a task of lm-eval", found=error) from error
    if not isinstance(config, dict) or path in above:
        found = "itself, through include" if path in above else type(config).__name__
        raise BadInput(f"{path} is no task of lm-eval", expected="keys with values", found=found)
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _config(path.parent / str(name), subject, check_path, (*above, path))
    return merged | config


def _located(value: Any, folder: Path, check: Callable[[Path], None]) -> Any:
    """Names of files, relative to the folder of the task file."""
    if isinstance(value, dict):
        return {key: _located(each, folder, check) for key, each in value.items()}
    if isinstance(value, list):
        return [_located(each, folder, check) for each in value]
    path = folder / str(value)
    check(path)
    if not path.exists():
        raise BadInput(
            f"the data file {value!r} is not there",
            expected=f"a file, relative to {folder}",
            found=f"nothing at {path}",
        )
    return str(path)


def _check_type(output_type: object, name: str, subject: str) -> None:
    if output_type == "multiple_choice":
        return
    hints = {
        "generate_until": "describe the task with prompt, answer and metric: exact_match",
        "loglikelihood_rolling": "describe the texts with metric: perplexity and data: input",
    }
    raise BadInput(
        f"{subject} {name!r} has an output type that restitch does not read",
        expected="output_type: multiple_choice",
        found=output_type,
        hint=hints.get(str(output_type), "describe the task with prompt and choices"),
    )


def _read(task: Any, source: str, subject: str) -> LmEvalTask:
    """The rows of a loaded task."""
    name = str(task.config.task)
    _check_type(task.OUTPUT_TYPE, name, subject)
    metrics = [metric for metric in SCORES if metric in task.aggregation()]
    if not metrics or task.multiple_input or callable(task.config.process_results):
        found = f"metrics {', '.join(task.aggregation())}"
        if task.multiple_input:
            found = "several texts with one ending"
        elif callable(task.config.process_results):
            found = "results that a function of the task computes"
        raise BadInput(
            f"{subject} {name!r} does not choose between endings of one text",
            expected=f"one text, several choices, and the metric {' or '.join(SCORES)}",
            found=found,
        )
    task.set_fewshot_seed(_FEWSHOT_SEED)
    splits = {"test": _rows(task, "test", task.eval_docs, subject)}
    if task.has_test_docs() and task.has_validation_docs():
        splits["validation"] = _rows(task, "validation", task.validation_docs(), subject)
    if task.has_training_docs():
        splits["train"] = _rows(task, "train", task.training_docs(), subject)
    return LmEvalTask(name, str(task.VERSION), SCORES[metrics[0]], splits)


def _rows(task: Any, split: str, docs: Any, subject: str) -> list[Row]:
    return [
        _row(task, doc, f"{subject} {task.config.task!r}, {split} row {number}")
        for number, doc in enumerate(docs)
    ]


def _row(task: Any, doc: Mapping[str, Any], where: str) -> Row:
    """One document as a question, with the texts of lm-eval's requests."""
    shots, prefix = task.config.num_fewshot or 0, task.doc_to_prefix(doc)
    context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix)
    choices, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise BadInput(
            f"{where} has no single right choice",
            expected=f"an index from 0 to {len(choices) - 1}, or one of the choices",
            found=repr(gold)[:200],
        )
    prompt = context + task.config.target_delimiter
    if not prompt[-1:].isspace():
        raise BadInput(
            f"{where}: nothing stands between the text and its choices",
            expected="target_delimiter: a space, or other white space at the end of the text",
            found=f"target_delimiter {task.config.target_delimiter!r} after {context[-20:]!r}",
            hint="put the space into target_delimiter and not into the choices",
        )
    return {"prompt": prompt, "choices": [str(choice) for choice in choices], "label": gold}


def _explained(source: str, subject: str, error: Exception) -> BadInput:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    away = (OfflineModeIsEnabled, ConnectionError, DatasetNotFoundError, HfHubHTTPError)
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, away) or "offline" in str(chain).lower():
            return BadInput(
                f"{subject} {source!r} needs the network",
                expected="rows on this machine",
                found=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
                hint="fetch its data set into the cache of `datasets` first, or write a task file"
                " of lm-eval that reads local files",
            )
        chain = chain.__cause__ or chain.__context__
    return BadInput(
        f"{subject} {source!r} cannot be read as a task of lm-eval",
        expected="a task that lm-eval can load",
        found=f"{type(error).__name__}: {error}"[:500],
        hint="try it with lm-eval itself",
    )


@contextmanager
def _sandboxed(utils: ModuleType) -> Iterator[None]:
    """Render templates in a sandbox: they may come from somebody else."""
    from jinja2.sandbox import SandboxedEnvironment

    old = utils.env
    safe = SandboxedEnvironment(
        loader=old.loader, undefined=old.undefined, keep_trailing_newline=True
    )
    safe.filters.update(old.filters)
    with _replaced(utils, "env", safe):
        yield


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` read its cache only."""
    import datasets.config
    import huggingface_hub.constants

    with (
        _replaced(datasets.config, "HF_HUB_OFFLINE", True),
        _replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give a module another value within a block: lm-eval and `datasets` take no arguments."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress and the notes of lm-eval out of the output."""
    import datasets

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
