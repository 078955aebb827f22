"""Check that a finetuned model can join its line, and account for every tensor in its files."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from restitch.merging.errors import BadInput, CannotJoin, counted, shortlist
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.comparison import Comparison
from restitch.merging.files.coordinates import covering_globs
from restitch.merging.ranking.task_vector import TaskVector, check_finite, outside_share
from restitch.modeling.configs import unknown_keys, vocabulary_size
from restitch.modeling.family_choice import check_finetuned
from restitch.modeling.preprocessing import compare_preprocessing, unused_modules
from restitch.modeling.tensor_location import place_of
from restitch.registry.access_policy import AccessDenied
from restitch.registry.ledger.finetuned_models import ModelRef, TensorGroup
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base, line_up, open_base, open_model
from restitch.tasks.inputs.heads import check_task_head
from restitch.tasks.runtime.engine import step
from restitch.tasks.runtime.refs import LineRef, Validated
from restitch.tasks.runtime.workspace import workspace

# The names of a group of tensors that the line keeps.
_MOST_NAMES = 20
_HINT = "register a model that was finetuned from this base"
_EXPERT = re.compile(r"\.experts\.\d+\.")


@step("validate")
def validate(
    line: LineRef, spec: TaskSpec, model: ModelRef, accept_preprocessing: bool = False
) -> Validated:
    """Check a finetuned model against the base of its line.

    Args:
        line: the line.
        spec: the model's task.
        model: the finetuned model.
        accept_preprocessing: allow another tokenizer or image processor than the base's.

    Raises:
        CannotJoin: it has another kind, architecture, configuration, tokenizer or image processor,
            missing or unexpected tensors, other shapes, NaN or infinity, a head that does not fit
            its task, or equals the base.
        AccessDenied: this worker may not read it, but another one may.
    """
    space = workspace()
    base = open_base(line, space)
    notes: list[str] = []
    try:
        folder, checkpoint = open_model(model, space, base.family, base=base)
        notes += checkpoint.notes
        config: list[str] = []
        if folder.is_dir():
            check_finetuned(base.family, base.folder, folder, model.uri)
            config = _config_differences(base, model, folder)
            notes += _check_preprocessing(base, model, folder, accept_preprocessing)
        else:
            notes.append("a file alone has no configuration and no tokenizer: the base's are used")
        notes += check_task_head(spec, base, model, space)
        comparison = line_up(base, checkpoint)
    except AccessDenied:
        raise
    except BadInput as error:
        raise error.of_kind(CannotJoin) from error
    problems = [*config, *_vocabulary_problems(base, comparison, folder), *comparison.problems()]
    if problems:
        ours, theirs = _examples(comparison, base, checkpoint)
        raise CannotJoin(
            f"{model.uri} is not finetuned from the base of this line",
            expected=f"the configuration of {base.ref.uri} and its {len(base.names)} localizable"
            f" tensors, such as {ours}",
            found=f"{counted(len(problems), 'difference')} in {len(checkpoint.names)} tensors,"
            f" such as {theirs}",
            details=problems,
            hint=_hint(comparison),
        )
    finetuned = comparison.aligned(checkpoint)
    vector = TaskVector(base.checkpoint, finetuned, base.names)
    check_finite(checkpoint.renamed(comparison.mapping), base.checkpoint)
    if vector.is_zero():
        raise CannotJoin(
            f"{model.uri} has the same localizable weights as the base",
            expected="weights that finetuning changed",
            found=f"no difference in {len(base.names)} tensors",
            hint="check that the finetuned model was saved, and not its base",
            details=checkpoint.notes,
        )
    if comparison.renamed is not None:
        theirs, ours = comparison.renamed
        notes.append(f"its tensors are renamed to the base's names, such as {theirs} to {ours}")
    if comparison.rows is not None:
        notes.append(_more_rows(comparison, base))
    outside = outside_share(base.checkpoint, finetuned, base.names)
    own = base.family.task_heads
    heads = own.tensors(folder, checkpoint.names) if own is not None and folder.is_dir() else ()
    unused = [name for name in comparison.unexpected if name not in heads]
    return Validated(
        outside_share=outside.share,
        outside_tensors=outside.tensors[:_MOST_NAMES],
        include=_addition(base, [name for name, _ in outside.tensors]),
        unused=_group(checkpoint, unused),
        from_base=_group(base.checkpoint, comparison.missing),
        notes=tuple(notes),
    )


def _addition(base: Base, outside: Sequence[str]) -> tuple[str, ...]:
    """Globs for `include` that add changed tensors to the localizable ones.

    Without heads, tensors that the line excludes, and text towers, whose embeddings are the base's.
    """
    known, excluded = frozenset(base.names), base.selection.exclude
    names = [name for name in base.checkpoint.floating if name not in base.heads]
    changed = frozenset(outside)
    added = [
        name
        for name in names
        if name in changed
        and not any(fnmatchcase(name, glob) for glob in excluded)
        and place_of(name).tower != "text"
    ]
    return covering_globs(added, (n for n in names if n not in known and n not in added))


def _config_differences(base: Base, model: ModelRef, folder: Path) -> list[str]:
    """The differing keys of the configuration.

    Raises:
        CannotJoin: it is another architecture, so nothing else can be compared.
    """
    found = base.family.config_differences(base.folder, folder)
    kind = [difference for difference in found if difference.startswith("model_type:")]
    if kind:
        raise CannotJoin(
            f"{model.uri} is a model of another architecture than the base of this line",
            expected=f"the architecture of {base.ref.uri}",
            found=kind[0],
            hint=_HINT,
        )
    return found


def _vocabulary_problems(base: Base, comparison: Comparison, folder: Path) -> list[str]:
    """The number of tokens by the configuration, if the tensors have another one."""
    stated = vocabulary_size(folder) if folder.is_dir() and base.vocabulary else None
    rows = comparison.rows or base.vocabulary
    if stated is None or stated == rows:
        return []
    sizes = f"vocab_size: base {base.vocabulary}, finetuned {stated}"
    return [sizes if comparison.other_shape else f"{sizes}, but its embeddings have {rows} rows"]


def _more_rows(comparison: Comparison, base: Base) -> str:
    """A note about the rows of embeddings and head that no merge has."""
    assert comparison.rows is not None
    assert base.vocabulary is not None
    more = counted(comparison.rows - base.vocabulary, "row")
    names = shortlist(list(comparison.more_rows))
    return f"{more} more than the base's {base.vocabulary:,} are not merged: the ends of {names}"


def _check_preprocessing(base: Base, model: ModelRef, folder: Path, accepted: bool) -> list[str]:
    """Notes about the files of a folder other than its weights.

    Raises:
        CannotJoin: it prepares inputs in another way than the base, which was not accepted.
    """
    found = compare_preprocessing(base.folder, folder)
    if found.differences and not accepted:
        raise CannotJoin(
            f"{model.uri} prepares inputs in another way than the base of this line",
            expected=f"the tokenizer and image processor of {base.ref.uri}, which the merged model"
            " uses for every task",
            found=counted(len(found.differences), "difference"),
            details=found.differences,
            hint="put the base's files into the folder if the model was trained with them; to"
            " merge it in spite of the difference, register it again with"
            " --accept-preprocessing --reason WHY",
        )
    notes = list(found.notes)
    if found.differences:
        notes.append(f"accepted at registration: {shortlist(found.differences)}")
    if modules := unused_modules(folder):
        notes.append(f"modules.json adds layers after the encoder, not used: {shortlist(modules)}")
    if unknown := unknown_keys(base.folder, folder):
        notes.append(
            f"config.json has keys that the architecture does not know: {shortlist(unknown)}"
        )
    return notes


def _hint(comparison: Comparison) -> str:
    """What to do about tensors that do not fit the base."""
    ours, theirs = (
        {_EXPERT.search(name) is not None for name in names if ".experts." in name}
        for names in (comparison.missing_required, comparison.unexpected)
    )
    if len(ours) != 1 or ours == theirs or not theirs:
        return _HINT
    kind, apart = (
        ("a tensor for each expert", True) if ours == {True} else ("joined experts", False)
    )
    return (
        f"the base has {kind}: load the finetuned model with transformers and save it by"
        f" save_pretrained(FOLDER, save_original_format={apart})"
    )


def _examples(comparison: Comparison, base: Base, checkpoint: Checkpoint) -> tuple[str, str]:
    """A tensor of the base and one of the finetuned model, with like names where they differ."""
    ours = next(iter(comparison.missing_required), base.names[0])
    matched = {name: theirs for theirs, name in comparison.mapping.items()}
    if ours in matched:
        return ours, matched[ours]
    candidates = comparison.unexpected or checkpoint.names
    if not candidates:
        return ours, "none"
    return ours, max(candidates, key=lambda name: _common_end(name, ours))


def _common_end(one: str, other: str) -> int:
    """The number of characters at the end of two names that are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _group(checkpoint: Checkpoint, names: Sequence[str]) -> TensorGroup | None:
    """Some tensors of a checkpoint, for the record; None without any."""
    if not names:
        return None
    weights = sum(checkpoint.info(name).numel for name in names)
    total = sum(checkpoint.info(name).numel for name in checkpoint.names)
    return TensorGroup(
        count=len(names),
        weights=weights,
        share=weights / max(total, 1),
        names=tuple(names[:_MOST_NAMES]),
    )
