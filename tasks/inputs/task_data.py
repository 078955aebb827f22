"""Resolve task files: labels, data, and the digests that identify them.

`resolve_task` runs once, at registration, and its result always means the same. Code that reads
data later compares it with the registered digest before it uses a row.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput, RestitchError
from restitch.modeling.data.task_data import Prompt, Rows, TaskData, data_digest, labels_of
from restitch.modeling.families.family import Batch, Family, Preprocess
from restitch.modeling.heads import listed
from restitch.registry.access_policy import check_hub, check_path
from restitch.registry.paths import is_there
from restitch.registry.sources.resolve import pin_data
from restitch.registry.specs.data import DataSpec
from restitch.registry.specs.head import ClassesSpec
from restitch.registry.specs.hub_id import split_pin
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.prompt import MASK, parts_at_mask, prompt_columns
from restitch.registry.specs.task import PROMPT_KEYS, TaskSpec
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.lm_eval_rows import rows_folder, with_lm_eval_rows
from restitch.tasks.inputs.task_head import resolved_head
from restitch.tasks.runtime.console import warn, working
from restitch.tasks.runtime.workspace import Workspace, made_by

_AT_ONCE = 64
_UNLABELLED = ("unlabelled", "left_out")  # left out of what a task means where they are not used
_SHOWN = 80


def evaluation_split(spec: TaskSpec) -> str | None:
    """The split to report results on; None without rows to evaluate on."""
    return None if spec.data is None else spec.data.evaluation_split


def description_digest(spec: TaskSpec) -> str:
    """The digest of what a description means; the places of its files are not part of it."""
    return digest_json(_meaning(spec))


def same_task(one: TaskSpec, other: TaskSpec) -> bool:
    """True if two specs mean the same, although their files may lie elsewhere."""
    return _meaning(one) == _meaning(other)


def _meaning(spec: TaskSpec) -> dict[str, Any]:
    values = spec.without_expected().to_json()  # it is about one model, not about the task
    for key in PROMPT_KEYS:
        if values.get(key) is None or (key == "score" and spec.prompt is None):
            values.pop(key, None)
    for key in _UNLABELLED:
        if values["data"] is not None and values["data"][key] is None:
            del values["data"][key]
    if values["data"] is not None and values["data"]["content"] is not None:
        for place in ("path", "train", "validation", "test"):
            values["data"][place] = values["data"][place] is not None
    return values


def resolve_task(spec: TaskSpec, family: Family) -> TaskSpec:
    """Fill in what a task file leaves out or refers to, and check that its rows can be read.

    Raises:
        BadInput: the data is empty, lacks a column, has a label that is not a class, ...
    """
    spec = with_lm_eval_rows(spec)
    _check_scoring(spec, family)
    if spec.data is None:
        return spec
    head = spec.head
    check_access(spec)
    pinned = _rows_spec(spec, family).with_columns(family.modality)
    pinned = pinned.model_copy(update={"path": pin_data(pinned.path)})
    if head is not None and head.labels_from is not None:
        head = head.model_copy(update={"labels": labels_of(pinned), "labels_from": None})
    spec = spec.model_copy(update={"data": pinned, "head": head})
    data = task_data(spec, family)
    for note in dict.fromkeys(note for split in data.splits for note in data.rows(split).notes):
        warn(f"{spec.task}: {note}")
    counts = {split: data.rows(split).left_out for split in data.splits if pinned.source(split)}
    left_out = {split: count for split, count in counts.items() if count} or None
    pinned = pinned.model_copy(update={"left_out": left_out})
    for split in left_out or ():
        warn(f"{spec.task}: {left_out_note(pinned, split)}")
    if pinned.content is not None:
        verified_data(spec, family)
        return spec
    with working(f"reading the data of {spec.task}"):
        content = data_digest(pinned, family.modality)
    return spec.model_copy(update={"data": pinned.model_copy(update={"content": content})})


def left_out_note(data: DataSpec, split: str) -> str | None:
    """A sentence about the rows without a label that are left out of a split, if there are some."""
    source = split if data.source(split) is not None else "train"  # of which it is set apart
    count = (data.left_out or {}).get(source)
    if count is None:
        return None
    label = f"(unlabelled: {data.unlabelled or repr('')})"
    if count == 1:
        return f"1 {source} row has no label {label} and is left out"
    return f"{count} {source} rows have no label {label} and are left out"


def _check_scoring(spec: TaskSpec, family: Family) -> None:
    """Refuse a task that says in another family's way how its rows are scored, or does not say it.

    Raises:
        BadInput: it has a head in place of a prompt, a prompt in place of a head, or neither.
    """
    if family.reads_prompts:
        wrong, found, what = spec.head is not None, "head", "prompt"
        expected = "prompt: ... with choices, choices_column or answer; or metric: perplexity"
    else:
        wrong, expected = spec.prompt is not None, "head: {labels: [...]}, or labels_from: dataset"
        found, what = "prompt", "head"
    if wrong:
        raise BadInput(
            f"task {spec.task} has a {found}, which the family {family.name} does not read",
            expected=expected,
            found=f"{found}: in the task's file",
            hint=f"describe the task by its {what}, or register it in a line of another family",
        )
    if spec.metric not in family.metrics:
        raise BadInput(
            f"task {spec.task} has metric {spec.metric}, which the family {family.name} does not"
            " measure",
            expected=" or ".join(family.metrics),
            found=spec.metric,
            hint="change metric: in the task's file, or register it in a line of another family",
        )
    unread = [] if family.task_heads is None or spec.head is None else _unread(spec)
    if unread:
        raise BadInput(
            f"task {spec.task} has {' and '.join(unread)}, which the family {family.name} does not"
            " read",
            expected="labels alone: the head is the finetuned model's own",
            hint="remove it from the task's file",
        )
    if spec.data is not None and not spec.has_head:
        raise BadInput(
            f"task {spec.task} has data but no {what}",
            expected=expected,
            hint="list the classes"
            + ("" if family.task_heads is None else " (only `register` reads them from a model)")
            + ", or leave out data: to merge without evaluating",
        )
    if spec.chat and not family.chats:
        raise BadInput(
            f"task {spec.task} has chat: true, which the family {family.name} does not use",
            expected="a line of a family that applies chat templates, such as causal-lm",
            hint="leave out chat:, and write the prompt as the model was trained on it",
        )
    if spec.prompt is not None and family.fills_mask:
        _check_mask(spec, family)


def _check_mask(spec: TaskSpec, family: Family) -> None:
    """Refuse a prompt of a masked language model without one mask and a column.

    Raises:
        BadInput: it has no mask, several, or nothing but the mask.
    """
    assert spec.prompt is not None
    count = len(parts_at_mask(spec.prompt)) - 1
    columns = [name for name in prompt_columns(spec.prompt) if name != MASK]
    if count == 1 and columns:
        return
    found = f"{{mask}} {count} times" if count != 1 else "no column"
    raise BadInput(
        f"task {spec.task}: a prompt of the family {family.name} has one {{mask}} and a column",
        expected="a prompt such as '{text} It was {mask}.'",
        found=f"{found} in {spec.prompt[:_SHOWN]!r}",
        hint="write {mask} where the choices belong, and the names of columns in braces",
    )


def _unread(spec: TaskSpec) -> list[str]:
    """The keys about embeddings of labels that a task with a head of its own has."""
    assert spec.head is not None
    default = ClassesSpec.model_fields["templates"].default
    return [
        *(["head: templates"] if spec.head.templates != default else []),
        *(["scale"] if spec.scale is not None else []),
    ]


# Writes the result of a check to the store, once its task is accepted.
Remember = Callable[[], None]


def check_rows(
    spec: TaskSpec,
    family: Family,
    space: Workspace,
    choice: LocalizeSpec | None = None,
    *,
    calibrated: bool = False,
    chosen: bool = False,
) -> Remember:
    """Read every row that is used later, once for the same content.

    A bad row must not stop a later merge of the whole line.

    Args:
        spec: a resolved task.
        family: the family, which says how rows are read.
        space: the workspace that remembers the result.
        choice: how masks are found; some modes read rows to calibrate on.
        calibrated: read rows to calibrate on in any case: the line's method needs them.
        chosen: read the validation rows in any case: the line chooses its method by them.

    Returns:
        A call that writes the result to the store; nothing may be left of a task that is refused.

    Raises:
        BadInput: a row is not a text, an image cannot be decoded, ...
    """
    split = evaluation_split(spec)
    if spec.data is None or split is None:
        return _nothing
    shots = None
    reads = choice is not None and (calibrated or choice.reads_rows)
    if reads and choice is not None and spec.data.train is not None:
        shots = [choice.shots, choice.seed]
    data = task_data(spec, family)
    chosen = chosen or (choice is not None and choice.chooses_by_rows)
    others = (
        ["validation"] if chosen and split != "validation" and has_validation(spec, family) else []
    )
    asked = [] if spec.prompt is None else [spec.prompt, spec.choices_column, spec.answer]
    key = digest_json([spec.data.content, split, shots, family.modality, *others, *asked])
    if space.objects.lookup("rows", key) is not None:
        return _nothing
    parts = [data.rows(one) for one in (split, *others)]
    parts += [] if shots is None else [data.calibration(*shots)]
    places = [(rows, index) for rows in parts for index in range(len(rows))]

    def read(place: tuple[Rows, int]) -> str | None:
        rows, index = place
        example = rows[index]
        empty = not any(example.inputs) if family.fills_mask else "" in example.inputs
        return example.where if empty else None

    # Decoding images releases the interpreter.
    threads = min(8, os.cpu_count() or 1) if family.modality == "image" else 1
    with (
        working(f"reading the rows of {spec.task}") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        empty = []
        for done, where in enumerate((pool.map if threads > 1 else map)(read, places), 1):
            progress(done, len(places))
            empty += [] if where is None else [where]
    if empty:
        warn(
            f"{spec.task}: {len(empty)} of {len(places)} rows have an empty text, {empty[0]} first"
        )

    def remember() -> None:
        blob = space.objects.put_json({"rows": len(places)})
        space.objects.publish("rows", key, blob, made_by=made_by())

    return remember


def _nothing() -> None:
    """There is nothing new to remember."""


def check_fits(spec: TaskSpec, base: Base) -> None:
    """Refuse a task that its line's base cannot read, before a worker tries to.

    Raises:
        BadInput: `max_length` is larger than the base reads, or too small for its rows, or a row
            has too many inputs.
    """
    split = evaluation_split(spec)
    if spec.data is None or split is None:
        return
    most = base.family.max_length(base.folder)
    if spec.max_length is not None and most is not None and spec.max_length > most:
        raise BadInput(
            f"task {spec.task}: max_length is more than the base reads",
            expected=f"at most {most} tokens",
            found=spec.max_length,
            hint="correct max_length, or leave it out for the most that the base reads",
        )
    data = task_data(spec, base.family)
    preprocess = base.family.preprocessor(base.folder, resolved_head(spec, base).most_read)
    if not base.family.reads_prompts:
        _batch(spec, preprocess, data.rows(split), range(1))
        return
    # What a tokenizer makes of a prompt and its answers differs from row to row.
    for one in dict.fromkeys((split, *(["validation"] if "validation" in data.splits else []))):
        _check_prompts(spec, preprocess, data.rows(one), base.family)


def _check_prompts(spec: TaskSpec, preprocess: Preprocess, rows: Rows, family: Family) -> None:
    """Turn all rows into input of the base, and report those that are cut."""
    cut: list[int] = []
    with working(f"reading the prompts of {spec.task}") as progress:
        for start in range(0, len(rows), _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, len(rows)))
            lost = _batch(spec, preprocess, rows, part)["cut"].tolist()
            cut += [row for row, count in zip(part, lost, strict=True) if count]
            progress(part.stop, len(rows))
    if cut:
        end = ", or their end if the mask comes first" if family.fills_mask else ""
        warn(
            f"{spec.task}: {len(cut)} of {len(rows)} prompts are longer than the model reads and"
            f" lose their beginning{end}, {rows[cut[0]].where} first"
        )


def _batch(spec: TaskSpec, preprocess: Preprocess, rows: Rows, places: range) -> Batch:
    try:
        return preprocess([rows[place] for place in places])
    except RestitchError:
        raise
    except Exception as error:  # tokenizers raise errors of many types
        raise BadInput(
            f"task {spec.task}: its rows from {rows[places.start].where} on cannot be turned into"
            " input of the base",
            found=str(error),
            hint="check max_length, and data: input or prompt:",
        ) from error


def check_access(spec: TaskSpec) -> None:
    """Refuse data that this worker may not read, before anything of it is opened.

    Raises:
        BadInput: `registry.access_policy` does not allow the data.
    """
    assert spec.data is not None
    what, root = f"the data of task {spec.task}", Path(split_pin(spec.data.path)[0])
    if not is_there(root, what):
        check_hub(what)
        return
    if spec.lm_eval is not None and root.parent == rows_folder():
        return  # written by restitch itself
    check_path(root, what)
    for split in (spec.data.train, spec.data.validation, spec.data.test):
        # One that is no file is a name: `train` stands for train-00000-of-00002.parquet.
        if split is not None and is_there(root / split, what):
            check_path((root / split).parent, what)
            check_path(root / split, what)


def task_data(spec: TaskSpec, family: Family) -> TaskData:
    """The task's rows, not yet compared with the registered digests.

    Raises:
        BadInput: this worker may not read them.
    """
    check_access(spec)
    rows = _rows_spec(spec, family)
    if spec.is_of_text or spec.is_of_numbers:
        return TaskData(rows, (), family.modality, of_numbers=spec.is_of_numbers)
    if spec.prompt is None:
        return TaskData(rows, listed(spec.head_spec).classes, family.modality)
    prompt = Prompt(
        spec.prompt,
        spec.choices_column,
        spec.answer,
        chat=bool(spec.chat),
        mask=family.fills_mask,
    )
    return TaskData(rows, spec.choices or (), family.modality, prompt)


def _rows_spec(spec: TaskSpec, family: Family) -> DataSpec:
    """Where the rows are, with the columns that the family reads of a prompt."""
    rows = spec.rows_spec
    if spec.prompt is None or not family.fills_mask:
        return rows
    columns = tuple(name for name in rows.input if name != MASK)
    return rows.model_copy(update={"input": columns})


def has_validation(task: TaskSpec, family: Family) -> bool:
    """True if a task has rows to tune on that are not its test rows."""
    given = task.data is not None and task.data.validation is not None
    return given or train_has_labels(task, family)


def train_has_labels(spec: TaskSpec, family: Family) -> bool:
    """True if the train rows of a task have labels or need none, or cannot be read."""
    if spec.data is None or spec.data.train is None:
        return False
    if spec.is_of_text:
        return True
    try:
        return task_data(spec, family).rows("train").label is not None
    except RestitchError:  # reported where the rows are needed
        return True


def verified_data(spec: TaskSpec, family: Family) -> TaskData:
    """The task's rows, checked against the registered digests.

    Raises:
        BadInput: a file is missing or has changed.
    """
    assert spec.data is not None
    place = Path(split_pin(spec.data.path)[0])
    if place.is_absolute() and not is_there(place, f"the data of task {spec.task}"):
        raise BadInput(
            f"the data of task {spec.task} is missing",
            expected=f"the registered files in {place}",
            found="nothing there",
            hint="put the files back, or register the task again with --replace-task",
        )
    data = task_data(spec, family)
    if data_digest(data.spec, family.modality) != spec.data.content:
        raise BadInput(
            f"the data of task {spec.task} changed since it was registered",
            expected=f"the registered files in {data.spec.path}",
            found="different content",
            hint="put the files back, or register the task again with --replace-task",
        )
    return data
