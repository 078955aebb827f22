"""The heads of classifiers: each task's own, read from its finetuned model.

A family whose tasks have heads of their own gives a `TaskHeads`; other families build heads from
the base. `ClassifierHeads` finds the head of any classifier of transformers without a list of
architectures: its tensors are those outside of the base model of the classification class, and the
pooler between encoder and classifier.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import without_wrappers
from restitch.modeling.configs import read_config
from restitch.modeling.tensor_names import named_tensors

# The name that transformers writes for the one output of a regression.
_NUMBER = ("LABEL_0",)
# Names that transformers or a trainer writes for classes without a name.
_NO_NAME = re.compile(r"(?:LABEL_)?(\d+)")


class TaskHeads(Protocol):
    """Reads the heads that lie in finetuned models."""

    def tensors(self, folder: Path, names: Iterable[str]) -> tuple[str, ...]:
        """The tensors that are a model's own head, sorted.

        Args:
            folder: the model's folder, with its configuration.
            names: the tensors of its checkpoint.
        """

    def labels(self, folder: Path) -> tuple[str, ...]:
        """The names of the classes of a model's own head, in the order of their indices."""

    def check(self, folder: Path, checkpoint: Checkpoint, labels: Sequence[str]) -> tuple[str, ...]:
        """Refuse a model without a head, or whose head has other classes than its task.

        Args:
            folder: the model's folder, with its configuration.
            checkpoint: its weights.
            labels: the classes of the task; none if its head gives a number.

        Returns:
            What is worth a note.

        Raises:
            BadInput: the head cannot be used for these classes.
        """

    def count_classes(self, folder: Path, checkpoint: Checkpoint) -> int | None:
        """The classes of a head, by the shapes of its tensors; None without one.

        Args:
            folder: a model with the configuration of its architecture, such as the base.
            checkpoint: the weights with the head.
        """

    def whole_names(self, folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
        """The names that a base's tensors have in a whole classifier; its own head is left out.

        Args:
            folder: the base's folder, with its configuration.
            checkpoint: its weights.
        """

    def whole_config(self, folder: Path, labels: Sequence[str]) -> dict[str, Any]:
        """The configuration of a whole classifier.

        Args:
            folder: the base's folder.
            labels: the classes of the head, in the order of their indices; none for a number.
        """


@dataclass(frozen=True)
class Layout:
    """The tensors of a classification class for one configuration.

    Attributes:
        body: the name of the attribute that holds the base model.
        shapes: of the head's tensors, by name.
        classes: the dimension that counts the classes, of the tensors that have one.
        statistics: the running statistics of BatchNorm layers.
    """

    body: str
    shapes: Mapping[str, tuple[int, ...]]
    classes: Mapping[str, int]
    statistics: tuple[str, ...]


@dataclass(frozen=True)
class ClassifierHeads:
    """The heads of the classifiers of one modality.

    Attributes:
        auto_class: the class of transformers that loads them, such as
            `AutoModelForSequenceClassification`.
        mapping: the name of its mapping from configurations to classes.
    """

    auto_class: str
    mapping: str

    def model_class(self, folder: Path) -> Any:
        """The classification class for the architecture of a folder.

        Raises:
            BadInput: there is none.
        """
        import transformers

        config = read_config(folder)
        try:
            found = getattr(transformers, self.mapping)[type(config)]
        except KeyError as error:
            raise BadInput(
                f"{folder} is of an architecture without a classifier",
                expected=f"an architecture that {self.auto_class} loads",
                found=f"model_type {config.model_type!r}",
                hint="choose a family that scores tasks without a classifier",
            ) from error
        choices = found if isinstance(found, list | tuple) else [found]
        named = config.architectures or ()
        return next((each for each in choices if each.__name__ in named), choices[0])

    def layout(self, folder: Path) -> Layout:
        """The tensors of the classification class with the folder's configuration.

        Raises:
            BadInput: the class cannot be made from it, or has no base model of its own.
        """
        config = read_config(folder)
        try:
            return _layout(self.model_class(folder), config.to_json_string(use_diff=False), folder)
        except BadInput:
            raise
        except Exception as error:  # a configuration of somebody else can raise any error
            raise BadInput(
                f"the model of {folder / 'config.json'} cannot be made", found=error
            ) from error

    def tensors(self, folder: Path, names: Iterable[str]) -> tuple[str, ...]:
        """The tensors outside of the base model, and its pooler, as far as the file has them."""
        return tuple(sorted(_located(self.layout(folder), list(names)).values()))

    def labels(self, folder: Path) -> tuple[str, ...]:
        """The names under `id2label`.

        Raises:
            BadInput: the model has another kind of head, or does not choose one of several classes.
        """
        self._check_class(folder)
        _check_chooses(folder)
        return _named(folder)

    def check(self, folder: Path, checkpoint: Checkpoint, labels: Sequence[str]) -> tuple[str, ...]:
        """Refuse another kind of head, an incomplete head, and other classes."""
        self._located(folder, checkpoint)
        order = self._order(folder, labels)
        if order == list(range(len(order))):
            return ()
        theirs = _named(folder)
        return (f"its classes are in another order, matched by name: {shortlist(theirs)}",)

    def read(
        self, folder: Path, checkpoint: Checkpoint, labels: Sequence[str]
    ) -> dict[str, Tensor]:
        """The head of a model in float32, by the names of the class, in the order of the labels.

        Raises:
            BadInput: as `check`.
        """
        located, layout = self._located(folder, checkpoint), self.layout(folder)
        order = torch.tensor(self._order(folder, labels))
        head = {name: checkpoint.tensor(own).float() for name, own in located.items()}
        for name, dimension in layout.classes.items():
            head[name] = head[name].index_select(dimension, order)
        return head

    def count_classes(self, folder: Path, checkpoint: Checkpoint) -> int | None:
        """The size of the dimension that counts the classes."""
        layout = self.layout(folder)
        located = _located(layout, checkpoint.names)
        for name, dimension in layout.classes.items():
            if name in located and len(checkpoint.info(located[name]).shape) > dimension:
                return checkpoint.info(located[name]).shape[dimension]
        return None

    def whole_names(self, folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
        """The names in the file, with the prefix of the base model."""
        layout, model_class = self.layout(folder), self.model_class(folder)
        with torch.device("meta"):
            model = model_class(read_config(folder))
        start = f"{layout.body}."
        live = named_tensors(model, checkpoint, (start,))
        return {
            name: name if name.startswith(start) else start + name
            for name, own in live.items()
            if own not in layout.shapes
        }

    def whole_config(self, folder: Path, labels: Sequence[str]) -> dict[str, Any]:
        """The base's configuration with the classification class and the labels."""
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values.pop("num_labels", None)
        names = labels or _NUMBER
        return values | {
            "architectures": [self.model_class(folder).__name__],
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification" if labels else "regression",
        }

    def _located(self, folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
        """The head's tensors in a checkpoint, by their names in the class.

        Raises:
            BadInput: the model has another kind of head, or not all tensors of this one.
        """
        layout = self.layout(folder)
        located = _located(layout, checkpoint.names)
        self._check_class(folder, [name for name in layout.shapes if name not in located])
        other = [
            f"{name}: {list(shape)} by its config.json, {list(checkpoint.info(own).shape)} stored"
            for name, shape in layout.shapes.items()
            if tuple(checkpoint.info(own := located[name]).shape) != shape
        ]
        if other:
            raise BadInput(
                f"the head of {folder} has other shapes than its config.json says",
                details=other,
                hint="check that config.json, with its id2label, belongs to these weights",
            )
        broken = [own for own in located.values() if not checkpoint.tensor(own).isfinite().all()]
        if broken:
            raise BadInput(
                f"the head of {folder} has weights that are not finite",
                expected="finite numbers",
                found=f"NaN or infinity in {shortlist(broken)}",
                hint="save the model before its training diverged, or from an undamaged copy",
            )
        return located

    def _check_class(self, folder: Path, missing: Sequence[str] = ()) -> None:
        """Refuse a model that another class saved, or that lacks tensors of the head."""
        needed, saved = self.model_class(folder).__name__, _known_classes(read_config(folder))
        if missing or (saved and needed not in saved):
            raise BadInput(
                f"{folder} has no head for a classification",
                expected=f"{needed} with {', '.join(self.layout(folder).shapes)}",
                found=" or ".join(saved) or "a config.json without architectures",
                details=[f"missing: {name}" for name in missing],
                hint="save the whole finetuned classifier with save_pretrained, not its encoder or"
                " a model with another head",
            )

    def _order(self, folder: Path, labels: Sequence[str]) -> list[int]:
        """The index in the head of each of a task's classes, or of its number.

        Raises:
            BadInput: the head has other classes, or does not choose one of several classes; or it
                does not give a number.
        """
        if not labels:
            _check_gives_a_number(folder)
            return [0]
        _check_chooses(folder)
        theirs = _named(folder)
        if len(labels) != len(theirs):
            raise BadInput(
                f"the head of {folder} has another number of classes than the task",
                expected=f"the {len(labels)} classes of the task: {_quoted(labels)}",
                found=f"{len(theirs)}: {_quoted(theirs)}",
                hint="correct head: labels, or leave it out for the names in the model's config",
            )
        return _matched(folder, labels, theirs)


def _named(folder: Path) -> tuple[str, ...]:
    named: Mapping[int, str] = read_config(folder).id2label
    return tuple(str(named[index]) for index in sorted(named))


def _check_chooses(folder: Path) -> None:
    """Refuse a head that does not choose one of several classes."""
    config = read_config(folder)
    if config.num_labels == 1 or config.problem_type == "regression":
        raise BadInput(
            f"{folder} is a regression: its head gives numbers, not classes",
            expected="a head with at least two classes",
            found=f"outputs: {config.num_labels}, problem_type: {config.problem_type}",
            hint="if the rows have numbers, write metric: squared_error in the task's file, without"
            " head: labels; otherwise register a classifier",
        )
    if config.problem_type == "multi_label_classification":
        raise BadInput(
            f"{folder} gives several labels to a row",
            expected="a head that chooses one class per row",
            found="problem_type: multi_label_classification",
            hint="a task has one class per row; if the model does choose one class, correct"
            " problem_type in its config.json",
        )


def _check_gives_a_number(folder: Path) -> None:
    """Refuse a head that does not give one number."""
    config = read_config(folder)
    if config.num_labels != 1 or config.problem_type not in (None, "regression"):
        raise BadInput(
            f"the head of {folder} does not give one number",
            expected="a regression with one output, by metric: squared_error",
            found=f"outputs: {config.num_labels}, problem_type: {config.problem_type}",
            hint="for a classifier, leave out the metric or write metric: accuracy",
        )


def _matched(folder: Path, labels: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """The index of each label among a model's own names, by name.

    Raises:
        BadInput: the names differ.
    """
    if _says_nothing(theirs) or _says_nothing(labels):
        return list(range(len(labels)))
    for form in (str, str.casefold):
        places = {form(name): index for index, name in enumerate(theirs)}
        if len(places) == len(theirs) and places.keys() == {form(label) for label in labels}:
            return [places[form(label)] for label in labels]
    raise BadInput(
        f"the classes of {folder} have other names than those of the task",
        expected=f"the task's: {_quoted(labels)}",
        found=f"id2label of the model: {_quoted(theirs)}",
        hint="write the model's names under head: labels, in any order, and those of the rows under"
        " data: classes, in the order of head: labels",
    )


def _says_nothing(names: Sequence[str]) -> bool:
    """True if names are only the indices of their classes."""
    found = [_NO_NAME.fullmatch(name) for name in names]
    return all(match is not None and int(match[1]) == index for index, match in enumerate(found))


def _quoted(names: Sequence[str]) -> str:
    return shortlist([repr(name) for name in names])


def _known_classes(config: Any) -> list[str]:
    """The classes of its architecture that a configuration names; others say nothing."""
    import transformers

    named = config.architectures if isinstance(config.architectures, list) else []
    known = []
    for name in map(str, named):
        found = getattr(transformers, name, None)
        if getattr(found, "config_class", None) is type(config):
            known.append(name)
    return known


@lru_cache(maxsize=32)
def _layout(model_class: Any, _config: str, folder: Path) -> Layout:
    config = read_config(folder)
    shapes = _shapes(model_class, config)
    more = deepcopy(config)
    more.num_labels = config.num_labels + 1
    wider, body = _shapes(model_class, more), model_class.base_model_prefix
    outside = [
        name
        for name in shapes
        if not name.startswith(f"{body}.") or name.startswith(f"{body}.pooler.")
    ]
    if not body or len(outside) == len(shapes):
        raise BadInput(
            f"{folder} is a {model_class.__name__}, in which encoder and head are not apart",
            hint="choose a model of another architecture",
        )
    return Layout(
        body,
        {name: shapes[name] for name in outside},
        {
            name: _first_difference(shapes[name], wider[name])
            for name in outside
            if shapes[name] != wider[name]
        },
        tuple(name for name in shapes if name.endswith(".running_mean")),
    )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first dimension in which two shapes differ."""
    return next(at for at, sizes in enumerate(zip(one, other, strict=True)) if len(set(sizes)) > 1)


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _located(layout: Layout, names: Sequence[str]) -> dict[str, str]:
    """The names in a file of a head's tensors: with one prefix of all, or as the base model's."""
    plain = {bare: name for name, bare in without_wrappers(frozenset(), names).items()}
    heads = tuple(layout.shapes)
    prefixes = {""} | {
        bare.removesuffix(head) for bare in plain for head in heads if bare.endswith(f".{head}")
    }
    best = max(
        sorted(prefixes, key=lambda prefix: (len(prefix), prefix)),
        key=lambda prefix: sum(prefix + head in plain for head in heads),
    )
    located = {head: plain[best + head] for head in heads if best + head in plain}
    for head in heads:
        # A base model that was saved alone has its pooler without the prefix.
        inner = head.removeprefix(f"{layout.body}.")
        if inner != head and head not in located and inner in plain:
            located[head] = plain[inner]
    return located
