"""Read tasks of lm-eval: their own task objects make the texts, and restitch keeps them as rows.

A task is a name that lm-eval knows, or a YAML file in its format. It chooses between endings of a
text (`multiple_choice`), generates an answer that `exact_match` compares (`generate_until`), or
scores whole texts (`loglikelihood_rolling`). A file from somebody else must not run anything here:
functions in Python are refused, and templates are rendered in a sandbox. The hub is never asked;
data sets in its cache are read.
"""

import importlib.metadata
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from restitch.merging.errors import BadInput, RestitchError, shortlist
from restitch.modeling.data.exact_match import right_text, without_ignored
from restitch.registry.specs.head import GenerateSpec, Score, TextUnit
from restitch.registry.specs.strict_yaml import checked

EXTRA = "restitch[lm-eval]"
VERSION = "0.4.13"
# The metrics of lm-eval that compare choices, and how; the first one that a task has counts.
SCORES: dict[str, Score] = {"acc": "sum", "acc_norm": "per_character"}
# Its metrics of whole texts, and their units. Bits per byte are the logarithm of the byte's value.
UNITS: dict[str, TextUnit] = {
    "word_perplexity": "word",
    "byte_perplexity": "byte",
    "bits_per_byte": "byte",
}
MATCH = "exact_match"

# Filters that leave the one text of a row as it is, or change white space around it.
_NO_CHANGE = ("take_first", "remove_whitespace")
# What a generating task may ask for: other keys would make its texts other than greedy.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature"}
_MATCHING = {"regexes_to_ignore", "ignore_case", "ignore_punctuation"}
_NEW_TOKENS = 256  # of lm-eval's model where the task does not say it

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
        splits: rows by train, validation and test, with the columns `prompt`, `choices` and
            `label`, or `prompt` and `answer`, or `text`; labels and answers are lists where several
            are right. The test rows are those that lm-eval reports on.
        score: how choices are compared: by their sums, unless its only metric is `acc_norm`.
        generate: how answers are generated and compared; None for other tasks.
        per: the unit of the perplexity of whole texts; None for other tasks.
    """

    name: str
    version: str
    splits: Mapping[str, list[Row]]
    score: Score = "sum"
    generate: GenerateSpec | None = None
    per: TextUnit | None = None


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
    if output_type not in _READERS:
        raise BadInput(
            f"{subject} {name!r} has an output type that restitch does not read",
            expected="output_type: " + " or ".join(_READERS),
            found=output_type,
            hint="describe the task with prompt and choices",
        )


def _read(task: Any, source: str, subject: str) -> LmEvalTask:
    """The rows of a loaded task."""
    name = str(task.config.task)
    where = f"{subject} {name!r}"
    _check_type(task.OUTPUT_TYPE, name, subject)
    if callable(task.config.process_results):
        raise BadInput(
            f"{where} is measured by a function of its own",
            expected="results that its metric computes",
            found="process_results",
            hint="describe the task in restitch's own keys",
        )
    task.set_fewshot_seed(_FEWSHOT_SEED)
    return _READERS[task.OUTPUT_TYPE](task, name, where)


def _choosing(task: Any, name: str, where: str) -> LmEvalTask:
    """A task that chooses between endings of a text."""
    metric = _metric(task, SCORES, where)
    if task.multiple_input:
        raise BadInput(
            f"{where} does not choose between endings of one text",
            expected="one text and several choices",
            found="several texts with one ending",
        )
    return LmEvalTask(name, str(task.VERSION), _splits(task, where, _choices), SCORES[metric])


def _generating(task: Any, name: str, where: str) -> LmEvalTask:
    """A task whose answers are generated and compared."""
    _metric(task, (MATCH,), where)
    if task.config.repeats != 1:
        raise BadInput(
            f"{where} generates several answers",
            expected="repeats: 1; restitch takes the likeliest token each time",
            found=f"repeats: {task.config.repeats}",
            hint="write a file with `repeats: 1` that includes that of the task",
        )
    spec = _generate_spec(task, where)

    def row(task: Any, doc: Mapping[str, Any], place: str) -> Row:
        context = _context(task, doc)
        if not context or context[-1].isspace():
            raise BadInput(
                f"{place}: the text before the answer ends with white space",
                expected="a text that ends with a character to read; the model writes the space",
                found=repr(context[-20:]),
                hint="leave out the white space at the end of doc_to_text",
            )
        return {"prompt": context, "answer": _answers(task, doc, spec, place)}

    splits = _splits(task, where, row)
    return LmEvalTask(name, str(task.VERSION), splits, generate=spec)


def _scoring(task: Any, name: str, where: str) -> LmEvalTask:
    """A task that scores whole texts."""
    metric = _metric(task, UNITS, where)

    def row(task: Any, doc: Mapping[str, Any], _: str) -> Row:
        return {"text": str(task.doc_to_target(doc))}

    return LmEvalTask(name, str(task.VERSION), _splits(task, where, row), per=UNITS[metric])


_READERS: dict[str, Callable[[Any, str, str], LmEvalTask]] = {
    "multiple_choice": _choosing,
    "generate_until": _generating,
    "loglikelihood_rolling": _scoring,
}


def _metric(task: Any, known: Collection[str], where: str) -> str:
    """The first metric of a task that restitch has."""
    found: str | None = next((name for name in known if name in task.aggregation()), None)
    if found is None:
        raise BadInput(
            f"{where} has no metric that restitch has",
            expected=f"the metric {' or '.join(known)}",
            found=f"metrics {', '.join(task.aggregation())}",
        )
    return found


def _splits(
    task: Any, where: str, row: Callable[[Any, Mapping[str, Any], str], Row]
) -> dict[str, list[Row]]:
    def rows(split: str, docs: Any) -> list[Row]:
        return [row(task, d, f"{where}, {split} row {number}") for number, d in enumerate(docs)]

    splits = {"test": rows("test", task.eval_docs)}
    if task.has_test_docs() and task.has_validation_docs():
        splits["validation"] = rows("validation", task.validation_docs())
    if task.has_training_docs():
        splits["train"] = rows("train", task.training_docs())
    return splits


def _context(task: Any, doc: Mapping[str, Any]) -> str:
    """The text before the answer, with description and examples."""
    shots, prefix = task.config.num_fewshot or 0, task.doc_to_prefix(doc)
    return str(task.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix))


def _choices(task: Any, doc: Mapping[str, Any], where: str) -> Row:
    """One document as a question, with the texts of lm-eval's requests."""
    context = _context(task, doc)
    choices, gold = task.doc_to_choice(doc), _target(task, doc, where)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    right = gold if isinstance(gold, list) else [gold]
    if not right or any(type(one) is not int or not 0 <= one < len(choices) for one in right):
        raise BadInput(
            f"{where} has no right choice",
            expected=f"an index from 0 to {len(choices) - 1}, a list of indices, or one of the"
            " choices",
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


def _target(task: Any, doc: Mapping[str, Any], where: str) -> Any:
    """The right answer of a document, or a list of them.

    lm-eval looks at the first row to see whether rows have lists, and reads all others like it.
    """
    gold = task.doc_to_target(doc)
    if gold != [] and isinstance(gold, list) != bool(task.multiple_target):
        raise BadInput(
            f"{where}: the right answer is of another form than in the first row",
            expected="a list of answers" if task.multiple_target else "one answer",
            found=repr(gold)[:200],
            hint="write doc_to_target so that all rows have lists, or none",
        )
    return gold


def _generate_spec(task: Any, where: str) -> GenerateSpec:
    """How a task generates and compares its answers."""
    asked = dict(task.config.generation_kwargs or {})
    stop = asked.get("until") or ()
    values: dict[str, Any] = {
        "max_new_tokens": asked.get("max_gen_toks", _NEW_TOKENS),
        "stop": [stop] if isinstance(stop, str) else list(stop),
        **_extraction(task.config.filter_list or [], where),
    }
    (matching,) = (m for m in _metrics(task) if m.get("metric") == MATCH)
    options = set(matching) - {"metric", "aggregation", "higher_is_better", "hf_evaluate"}
    others = sorted({key for key in options - _MATCHING if matching[key]})
    others += sorted(set(asked) - _GENERATION)
    if asked.get("do_sample") or asked.get("temperature"):
        others.append("do_sample")
    if others:
        raise BadInput(
            f"{where} generates or compares in a way that restitch does not have",
            expected="greedy texts, and of options " + ", ".join(sorted(_MATCHING)),
            found=shortlist(others),
        )
    values["ignore"] = matching.get("regexes_to_ignore")
    values |= {key: matching.get(key) for key in ("ignore_case", "ignore_punctuation")}
    return checked(GenerateSpec, values, where)


def _metrics(task: Any) -> list[dict[str, Any]]:
    return list(task.config.metric_list or [{"metric": MATCH}])


def _extraction(filters: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """What the first list of filters takes of a generated text."""
    steps = [dict(step) for step in filters[0]["filter"]] if filters else []
    names = [step["function"] for step in steps if step["function"] not in _NO_CHANGE]
    patterns = [step for step in steps if step["function"] == "regex"]
    last = patterns[0].get("group_select", 0) if patterns else 0
    missing = any("regex_pattern" not in step for step in patterns)
    if len(names) > 1 or names != ["regex"] * len(patterns) or missing or last not in (0, -1):
        raise BadInput(
            f"{where} filters generated texts in a way that restitch does not have",
            expected="no filter, or one regex that takes the first or the last match",
            found=shortlist([str(step) for step in steps]),
        )
    if not patterns:
        return {}
    return {"extract": patterns[0].get("regex_pattern"), "extract_last": last == -1}


def _answers(task: Any, doc: Mapping[str, Any], spec: GenerateSpec, where: str) -> str | list[str]:
    """The right answer of a document, or all of them."""
    gold = _target(task, doc, where)
    if task.config.doc_to_choice is not None:
        gold = task.doc_to_choice(doc)[gold]
    if not isinstance(gold, list):
        return _answer(str(gold), spec, where)
    if not gold or not all(isinstance(one, str) for one in gold):
        raise BadInput(
            f"{where} has no list of right answers",
            expected="one text or more, which lm-eval compares with the generated one",
            found=repr(gold)[:200],
            hint="write the answers as texts in doc_to_target",
        )
    return [_answer(one, spec, where) for one in gold]


def _answer(gold: str, spec: GenerateSpec, where: str) -> str:
    """A text that restitch compares as lm-eval does a right answer."""
    # lm-eval extracts from generated texts alone.
    right = without_ignored(gold, spec)
    for answer in (gold, right):
        if answer.strip() and right_text(answer, spec) == right:
            return answer
    raise BadInput(
        f"{where}: the right answer cannot be compared",
        expected="an answer of which the filter's regex takes all or nothing",
        found=f"{gold!r}, of which it takes {right_text(gold, spec)!r}"[:300],
    )


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
