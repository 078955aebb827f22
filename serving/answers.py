"""Ask a merged version: labels with scores for a task, generated texts, or embeddings.

Rows are read, checked and prepared as in an evaluation, so the answer for a row is the one that
the task's measurements are made of.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from restitch.merging.errors import BadInput, unknown_name
from restitch.modeling.data.rows import Prompt, Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.device import device
from restitch.modeling.evaluation import by_row, units_of
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.heads import Head
from restitch.registry.specs.head import GenerateSpec, HeadSpec
from restitch.registry.specs.prompt import MASK, prompt_columns
from restitch.serving.served_version import ServedTask, ServedVersion
from restitch.serving.version_folder import version_folder

TEXT, PAIR, PROMPT, IMAGE = "text", "text_pair", "prompt", "image"
# Tokens that a language model writes without a task, unless the request names another number; at
# most half of what it reads.
_NEW_TOKENS = 64
# Each row has an answer in the data of a task that generates one; a request has none.
_NO_ANSWER, _ANSWER = "-", "restitch.answer"

Row = Mapping[str, Any]


def columns_of(version: ServedVersion) -> dict[str, bool]:
    """The columns of a request, each with whether every row has it."""
    family = get_family(version.family)
    if family.modality == "image":
        return {IMAGE: True}
    if not family.reads_prompts:
        pairs = any(len(task.columns) > 1 for task in version.tasks.values())
        return {TEXT: True, **({PAIR: False} if pairs else {})}
    tasks = {name for task in version.tasks.values() for name in task.columns}
    named = [*([] if family.fills_mask else [PROMPT]), *sorted(tasks)]
    return dict.fromkeys(named or [TEXT], False)  # MLflow takes no model without a column


class MergedModel:
    """A merged version in memory.

    Args:
        version: the version; its folder is taken from the cache, or written there.

    Raises:
        RestitchError: the version cannot be rebuilt, or not be loaded.
    """

    def __init__(self, version: ServedVersion) -> None:
        self.version = version
        self.folder = version_folder(version)
        self.family: Family = get_family(version.family)
        given = (torch.bfloat16,) if version.compute == "bfloat16" else ()
        self.model = self.family.load(self.folder, *given).to(device()).eval()
        self._heads: dict[str, Head] = {}

    def answer(
        self, rows: Sequence[Row], task: str | None = None, max_new_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """The answer for each row.

        Args:
            rows: values by column; see `columns_of`. An image is its file's bytes, or their base64.
            task: the task to answer; None generates texts, or gives embeddings.
            max_new_tokens: the most tokens of a generated text.

        Raises:
            BadInput: there is no such task, a column is missing, or a value cannot be read.
        """
        if not rows:
            return []
        if task is None:
            return self._without_task(rows, max_new_tokens)
        if task not in self.version.tasks:
            error = unknown_name(f"task of {self.version.name}", task, self.version.tasks)
            raise error
        known, head = self.version.tasks[task], self._head(task)
        if head.spec.generate is not None:
            return self._generated(rows, self._longer(head, max_new_tokens))
        if head.spec.of_text:
            texts = self._rows(rows, head, known)
            losses = self._by_row(
                texts, head, lambda batch: self.family.text_losses(self.model, batch, head).double()
            )
            each = zip(losses[:, 0], units_of(texts, head, losses[:, 1]), strict=True)
            return [{"perplexity": float(np.exp(a / max(b, 1)))} for a, b in each]
        return self._scored(self._rows(rows, head, known), head)

    def _without_task(self, rows: Sequence[Row], most: int | None) -> list[dict[str, Any]]:
        if self.family.reads_prompts and not self.family.fills_mask:
            room = self.family.max_length(self.folder) or 2 * _NEW_TOKENS
            spec = HeadSpec(
                prompt=f"{{{PROMPT}}}",
                answer=_ANSWER,
                generate=GenerateSpec(max_new_tokens=most or min(_NEW_TOKENS, room // 2), stop=()),
            )
            return self._generated(rows, Head({}, self.family.resolve(self.folder, spec)))
        features = getattr(self.family, "features", None)
        if features is None:
            raise BadInput(
                f"a model of the family {self.family.name} answers tasks only",
                expected='params={"task": ...} with one of '
                f"{', '.join(self.version.tasks) or 'no tasks'}",
                found="no task",
            )
        plain = Head({}, self.family.resolve(self.folder, HeadSpec(labels=("-", "--"))))
        table = self._by_row(
            self._rows(rows, plain, None),
            plain,
            lambda batch: features(self.model, batch).float(),
        )
        return [{"embedding": row.tolist()} for row in table]

    def _generated(self, rows: Sequence[Row], head: Head) -> list[dict[str, Any]]:
        asked = self._rows([{**row, _ANSWER: _NO_ANSWER} for row in rows], head, None)
        texts = by_row(
            self.model,
            asked,
            self.family.preprocessor(self.folder, head.spec.most_read),
            lambda batch: np.array(self.family.generate(self.model, batch, head), dtype=object),
        )
        return [{"text": text} for text in texts.tolist()]

    def _longer(self, head: Head, most: int | None) -> Head:
        """The head of a task with another limit of tokens."""
        assert head.spec.generate is not None
        if most is None:
            return head
        generate = head.spec.generate.model_copy(update={"max_new_tokens": most})
        spec = head.spec.model_copy(update={"generate": generate})
        return Head(head.tensors, self.family.resolve(self.folder, spec))

    def _scored(self, rows: Rows, head: Head) -> list[dict[str, Any]]:
        on = head.to(device())
        scores = self._by_row(
            rows, head, lambda batch: self.family.logits(self.model, batch, on).float()
        )
        if head.spec.of_number:
            return [{"value": float(row[0])} for row in scores]
        shares = torch.from_numpy(scores).double().softmax(1).numpy()
        found = []
        for place, row in enumerate(shares):
            labels = rows[place].choices if rows.prompt is not None else head.spec.classes
            named = {
                str(label): float(share)
                for label, share in zip(labels, row, strict=False)
                if label is not None
            }
            best = str(labels[int(row.argmax())])
            found.append({"label": best, "score": named[best], "scores": named})
        return found

    def _by_row(self, rows: Rows, head: Head, score: Any) -> NDArray[Any]:
        preprocess = self.family.preprocessor(self.folder, head.spec.most_read)
        return by_row(self.model, rows, preprocess, lambda batch: score(batch).cpu().numpy())

    def _head(self, task: str) -> Head:
        if task not in self._heads:
            known = self.version.tasks[task]
            if known.head is not None:
                file = self.folder / "heads" / f"{task}.safetensors"
                self._heads[task] = Head.from_bytes(file.read_bytes())
            else:
                assert known.spec is not None
                resolved = self.family.resolve(self.folder, known.spec)
                self._heads[task] = Head({}, resolved)
        return self._heads[task]

    def _rows(self, rows: Sequence[Row], head: Head, task: ServedTask | None) -> Rows:
        """The rows of a request, as those of a file."""
        spec = head.spec
        prompt = None
        if spec.prompt is not None:
            prompt = Prompt(
                spec.prompt,
                spec.choices_column,
                None if spec.answer is None else _ANSWER,
                bool(spec.chat),
                self.family.fills_mask,
            )
        inputs = self._inputs(rows, spec, task)
        own = () if prompt is None or prompt.own is None else (prompt.own,)
        values = {
            name: [_value(row, name, place) for place, row in enumerate(rows)]
            for name in (*inputs, *own)
        }
        if self.family.modality == "image":
            values = {name: [*map(_image, column)] for name, column in values.items()}
        wheres = [f"row {place} of the request" for place in range(len(rows))]
        table = ListTable("the request", Path("/"), values, wheres=wheres)
        listed = spec.classes if isinstance(spec.labels, tuple) else ()
        return Rows(table, inputs, None, listed, self.family.modality, prompt=prompt)

    def _inputs(
        self, rows: Sequence[Row], spec: HeadSpec, task: ServedTask | None
    ) -> tuple[str, ...]:
        """The columns of a request that are read."""
        if spec.prompt is not None:
            named = prompt_columns(spec.prompt)
            return tuple(name for name in named if name != MASK or not self.family.fills_mask)
        if self.family.modality == "image":
            return (IMAGE,)
        if self.family.reads_prompts:
            assert task is not None
            return task.columns
        pair = len(task.columns) > 1 if task is not None else _given(rows[0], PAIR)
        return (TEXT, PAIR) if pair else (TEXT,)


def _given(row: Row, name: str) -> bool:
    """True if a row has a value; MLflow fills in None or NaN for a column that is left out."""
    value = row.get(name)
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def _value(row: Row, name: str, place: int) -> Any:
    if not _given(row, name):
        raise BadInput(
            f"row {place} of the request has no {name!r}",
            expected=f"a value in the column {name!r}",
            found=f"columns {', '.join(map(repr, (n for n in row if _given(row, n)))) or 'none'}",
        )
    value = row[name]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _image(value: Any) -> bytes:
    """The bytes of an image, which a request may have as base64. A path is never read."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    try:
        return base64.b64decode("".join(cast(str, value).split()), validate=True)
    except (binascii.Error, ValueError, AttributeError) as error:
        raise BadInput(
            "an image of the request cannot be read",
            expected="the bytes of an image file, or their base64",
            found=type(value).__name__ if not isinstance(value, str) else repr(value[:40]),
        ) from error
