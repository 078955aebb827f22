"""Say in one sentence why a merged model has little of a member's skill, or why it cannot join.

A skill is lost in three steps: tensors that the line does not merge, weights that a delta leaves
out, and the other members. Four evaluations show how much each step costs: the finetuned model, the
base with all its localizable weights, the base with its delta, and the merged model. The sentence
names the step that costs most, with its values and what to do.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from restitch.registry.gates.gate import Drop, GateOutcome
from restitch.registry.gates.max_task_drop import MaxTaskDrop
from restitch.registry.gates.min_normalized import MinNormalized
from restitch.registry.ledger.finetuned_models import Addition, Member, ModelFacts
from restitch.registry.ledger.records import TaskResult
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.metric import METRICS

# Normalized values below this are explained.
LITTLE = 0.9


def why_little(
    spec: LineSpec, member: Member, result: TaskResult, others: Sequence[str]
) -> str | None:
    """Why a merged model has little of a member's skill.

    Args:
        spec: the line's.
        member: the member.
        result: its results.
        others: the tasks of the other members.

    Returns:
        None if it has enough, or if that was not measured.
    """
    if result.normalized is None or result.normalized >= LITTLE:
        return None
    assert result.finetuned is not None, "normalized by it"
    assert result.grafted is not None
    assert result.merged is not None
    metric, facts = METRICS[result.metric], member.model.facts
    whole = facts.results.get("localizable")
    localizable = result.finetuned if whole is None else whole.value
    values = (result.finetuned, localizable, result.grafted, result.merged)
    worths = [metric.worth(value) for value in values]
    costs = [before - after for before, after in pairwise(worths)]
    start = (
        f"the merged model has {result.metric} {result.merged:.3f}, the finetuned model"
        f" {result.finetuned:.3f}, mostly because"
    )
    step = costs.index(max(costs))
    if step == 0:
        return f"{start} {_tensors(localizable, facts.addition, result.metric)}"
    if step == 1:
        return (
            f"{start} its {_kept(spec.localize)} leaves out too much: alone, on the base, it has"
            f" {result.grafted:.3f}, and all weights of the tensors that the line merges have"
            f" {localizable:.3f}; {_more(spec.localize)}"
        )
    joined = f" with {', '.join(others)}" if others else ""
    return (
        f"{start} of merging it{joined}: its {_kept(spec.localize)} alone, on the base, has"
        f" {result.grafted:.3f}; {_remedies(spec.line)}"
    )


def why_not_joined(
    spec: LineSpec,
    member: Member,
    results: dict[str, TaskResult],
    drops: dict[str, Drop],
    failed: Sequence[GateOutcome],
) -> str | None:
    """Why a member does not fit with those of the champion.

    Args:
        spec: the line's.
        member: the member that would have joined.
        results: those of the merge with it, by task.
        drops: what tasks lost against the champion.
        failed: the gates that block it.

    Returns:
        None if the gates say all that is known.
    """
    lost = [gate.task for gate in failed if gate.gate == MaxTaskDrop.name]
    hurt = [task for task in lost if task is not None and task in drops and task != member.task]
    own = results[member.task]
    others = [task for task in results if task != member.task]
    if not hurt or own.merged is None or own.grafted is None:
        missed = any(g.gate == MinNormalized.name and g.task == member.task for g in failed)
        return why_little(spec, member, own, others) if missed else None
    falls = ", ".join(
        f"{task} goes from {_before(results[task], drops[task]):.3f} to {results[task].merged:.3f}"
        for task in hurt
    )
    whole = "" if own.finetuned is None else f", its finetuned model {own.finetuned:.3f}"
    return (
        f"it does not fit with {', '.join(hurt)}, because their changes conflict: merged, {falls},"
        f" and {member.task} has {own.merged:.3f}, its {_kept(spec.localize)} alone"
        f" {own.grafted:.3f}{whole}; {_remedies(spec.line)}"
    )


def needed_tensors(facts: ModelFacts) -> str | None:
    """What a line has to merge, too, to have a model's skill; None if it merges enough."""
    if facts.addition is None:
        return None
    result = facts.results["localizable"]
    return _tensors(result.value, facts.addition, result.metric)


def proposed(addition: Addition, metric: str) -> str:
    """What a line has to change to merge the tensors that hold a skill."""
    return (
        f"with {as_key(addition.include)} in the line file the {metric} of all weights that can be"
        f" merged is {addition.value:.3f}"
    )


def as_key(include: Sequence[str]) -> str:
    """The key of a line file that adds tensors."""
    globs = ", ".join(f'"{glob}"' for glob in include)
    return f"`localize: {{include: [{globs}]}}`"


def _tensors(localizable: float, addition: Addition | None, metric: str) -> str:
    text = (
        "some of the skill lies in tensors that the line does not merge: all weights that it can"
        f" merge have {localizable:.3f}"
    )
    return text if addition is None else f"{text}; {proposed(addition, metric)}"


def _before(result: TaskResult, drop: Drop) -> float:
    assert result.merged is not None
    if drop.fraction_of is None:
        return result.merged + drop.value
    return result.merged / (1 + drop.value)


def _kept(choice: LocalizeSpec) -> str:
    return "subspace" if choice.mode == "subspace" else "mask"


def _more(choice: LocalizeSpec) -> str:
    values: dict[str, Any] = {"rank": choice.rank, "density": choice.density}
    key = "rank" if choice.mode == "subspace" else "density"
    more = f"raise `{key}` under `localize` (now {values[key]})"
    return f"{more}, or use `mode: distilled`" if choice.mode == "dataless" else more


def _remedies(line: str) -> str:
    return (
        f"`restitch compare {line} --tune` measures other methods, and `restitch experts {line}`"
        " makes a specialist for each task"
    )
