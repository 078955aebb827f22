"""Choose the family of a base by its kind, and refuse models of another kind.

`check_base` and `check_finetuned` refuse what the family of a line does not take; `proposal` says
which families take a base, and how each of them scores rows if there are several. A family without
`kinds` decides by `config_differences` alone.
"""

from pathlib import Path

from restitch.merging.errors import BadInput
from restitch.modeling.families.family import Family, family_names, get_family
from restitch.modeling.kinds import ModelKind, model_kind


def check_base(family: Family, folder: Path, where: str) -> None:
    """Refuse a base that the family does not take.

    Args:
        family: the family of the line.
        folder: the base.
        where: its name in messages.

    Raises:
        BadInput: it is of another kind; the hint names the right family.
    """
    if not family.kinds:
        return
    try:
        model = model_kind(folder)
    except BadInput as error:
        raise error.renamed(str(folder), where) from error
    if not _takes(family, model) and model.kind not in family.also:
        raise BadInput(
            f"the base {where} is not of family {family.name}",
            expected=_described(family),
            found=model,
            hint=proposal(model, folder),
        )
    lacking = family.lacks(folder)
    if lacking is not None:
        raise BadInput(
            f"the base {where} lacks {lacking}, which the family {family.name} needs",
            expected=lacking,
            found=model,
            hint=f"give a base that has it, or {proposal(model, folder)}",
        )


def check_finetuned(family: Family, base: Path, folder: Path, where: str) -> None:
    """Refuse a finetuned model of another kind than the family's and the base's.

    Args:
        family: the family of the line.
        base: the folder of the base.
        folder: the finetuned model.
        where: its name in messages.

    Raises:
        BadInput: it is of another kind.
    """
    if not family.kinds:
        return
    model, ours = model_kind(folder), model_kind(base)
    if model.kind not in (*family.kinds, *family.parts, ours.kind):
        raise BadInput(
            f"{where} is {model.kind}, and the base of this line is {ours.kind}",
            expected=ours,
            found=model,
            hint="register a model that was finetuned from this base; for the other model: "
            + proposal(model, folder, "make a line with {}"),
        )


def proposal(model: ModelKind, folder: Path, one: str = "write {} into the line file") -> str:
    """What to do with a base of this kind.

    Args:
        model: the kind of the base.
        folder: the base; its configuration alone is enough.
        one: the advice, with a place for the lines that name families.
    """
    families = _families_of(model, folder)
    if not families:
        return f"no family of restitch takes {model.kind}; the families are {_all_described()}"
    if len(families) == 1:
        return one.format(f"`family: {families[0].name}`")
    return one.format(" or ".join(f"`family: {each.name}` ({each.summary})" for each in families))


def _families_of(model: ModelKind, folder: Path) -> list[Family]:
    return [
        family
        for family in _usable()
        if family.kinds and _takes(family, model) and _has_all(family, folder)
    ]


def _has_all(family: Family, folder: Path) -> bool:
    """True if a folder lacks nothing for a family; one that cannot be read is no base."""
    try:
        return family.lacks(folder) is None
    except BadInput:
        return False


def only_family(folder: Path, where: str) -> Family:
    """The family that takes a base, of which only its choice of tensors matters.

    Args:
        folder: the base.
        where: its name in messages.

    Raises:
        BadInput: no family takes it, or several do whose choice of tensors differs.
    """
    try:
        model = model_kind(folder)
    except BadInput as error:
        raise error.renamed(str(folder), where) from error
    families = _families_of(model, folder)
    if len({(tuple(each.localizable), tuple(each.prefixes)) for each in families}) != 1:
        raise BadInput(
            f"the family of the base {where} is not clear",
            expected="a base that one family takes",
            found=model,
            hint=proposal(model, folder, "give {}"),
        )
    # A base that a family of heads takes as well has no head of its own.
    return min(families, key=lambda family: family.task_heads is not None)


def with_task_heads(family: Family) -> list[str]:
    """The families that take the same bases and score tasks by the heads of finetuned models."""
    return [
        other.name
        for other in _usable()
        if other.task_heads is not None and not set(other.kinds).isdisjoint(family.kinds)
    ]


def _usable() -> list[Family]:
    """All families but those of broken packages."""
    families = []
    for name in family_names():
        try:
            families.append(get_family(name))
        except BadInput:
            continue
    return families


def _takes(family: Family, model: ModelKind) -> bool:
    right = not family.model_types or model.model_type in family.model_types
    return model.kind in family.kinds and right


def _described(family: Family) -> str:
    kinds = " or ".join(family.kinds)
    return f"{kinds} ({', '.join(family.model_types)})" if family.model_types else kinds


def _all_described() -> str:
    return "; ".join(f"{f.name} for {_described(f)}" for f in _usable() if f.kinds)
