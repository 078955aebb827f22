"""Measure how well two members of a version fit together, and what merging the pair costs them.

The cost of a pair is the mean over both tasks of what the merge of the two loses against each delta
alone, as a share of the finetuned model's value. Signals on the deltas are those of
`merging.analysis.pairs`. The gradient alignment of a pair is the mean cosine of one member's task
vector with the direction in which the loss of the other's task falls, from the base; it needs
labelled train rows. Values are stored under all that they depend on.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch

from restitch.merging.analysis.pairs import VERSION as SIGNALS_VERSION
from restitch.merging.analysis.pairs import pair_signals, rank_correlation
from restitch.merging.digests import digest_json
from restitch.merging.files.delta import Delta, open_delta
from restitch.merging.localize.live_weights import requiring_gradients
from restitch.merging.rules.merge_inputs import member_vector
from restitch.modeling.evaluation import Evaluation
from restitch.registry.ledger.finetuned_models import Member
from restitch.registry.ledger.records import MergedRecord, TaskResult
from restitch.tasks.evaluate import Exam, result_inputs
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.task_data import train_has_labels
from restitch.tasks.localizers import Calibration
from restitch.tasks.merge import make_recipe, recipe_edits, recipe_inputs
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.free_memory import Part
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, workspace

# Raised when the same inputs would give other values.
VERSION = 1

SIGNALS = ("shared", "sign_conflict", "cosine", "subspace_overlap", "gradient_alignment")

_BATCH, _MOST_ROWS = 16, 64


def evaluated_members(record: MergedRecord, members: Sequence[Member]) -> tuple[Member, ...]:
    """The members that were evaluated alone and finetuned, with the deltas of a version."""
    found = []
    for member in members:
        result, merged = record.results[member.task], record.members[member.task]
        if result.grafted is not None and result.finetuned is not None:
            model = member.model.model_copy(update={"mask": merged.mask, "delta": merged.delta})
            found.append(member.model_copy(update={"model": model}))
    return tuple(found)


def known_pairs(line: LineRef, members: Sequence[Member]) -> dict[str, Any] | None:
    """The stored measurements of these members; None if they were not made."""
    space = workspace()
    known: dict[str, Any] | None = space.stored(
        "analysis", _key(line, members, open_base(line, space))
    )
    return known


def _key(line: LineRef, members: Sequence[Member], base: Base) -> str:
    """The digest of all that the measurements of all pairs depend on."""
    return digest_json(
        {
            "pairs": [VERSION, SIGNALS_VERSION],
            "merges": [recipe_inputs(line, pair) for pair in combinations(members, 2)],
            "tasks": [_alone(m, base) for m in members],
            "train": [m.spec.data.content if m.spec.data else None for m in members],
        }
    )


def _alone(member: Member, base: Base) -> dict[str, Any]:
    """All that the value of a member's delta alone depends on."""
    weights = WeightsRef("grafted", str(member.model.delta))
    return result_inputs(member.spec, base, weights, member.model.model)


@step("pairs", "pairs of members")
def measure_pairs(
    line: LineRef, members: tuple[Member, ...], results: dict[str, TaskResult]
) -> dict[str, Any] | Cached[dict[str, Any]]:
    """The signals and the cost of all pairs of members, and how the signals predict the cost.

    Args:
        line: with one merge method.
        members: with rows to evaluate on, in the order of their tasks.
        results: of their version, with the values of the deltas alone.

    Returns:
        `pairs`, each with its `tasks`, signals, `loss` and `by_task`; and `correlations` with the
        loss, by signal: `rho`, `p_value` and the number of `pairs`.
    """
    space = workspace()
    base = open_base(line, space)
    key = _key(line, members, base)
    known = space.stored("analysis", key)
    if known is not None:
        return Cached(known)
    deltas: dict[str, Delta] = {
        m.task: open_delta(space.objects.blob_path(str(m.model.delta)), base.checkpoint)
        for m in members
    }
    with working("comparing pairs") as progress:
        signals = pair_signals(base.checkpoint, deltas, progress)
    alignments = {m.task: _alignments(base, m, deltas, line, space) for m in members}
    pairs = []
    for one, other in combinations(members, 2):
        tasks = (one.task, other.task)
        sides = [alignments[a].get(b) for a, b in (tasks, tasks[::-1])]
        both = [side for side in sides if side is not None]
        by_task = _merged(line, (one, other), base, results, space)
        losses = [each["loss"] for each in by_task.values()]
        pairs.append(
            {
                "tasks": list(tasks),
                **asdict(signals[tasks]),
                "gradient_alignment": sum(both) / 2 if len(both) == 2 else None,
                "loss": sum(losses) / 2,
                "by_task": by_task,
            }
        )
    value = {"signals": list(SIGNALS), "pairs": pairs, "correlations": _correlations(pairs)}
    return space.keep("analysis", key, value)


def _merged(
    line: LineRef,
    pair: tuple[Member, Member],
    base: Base,
    results: dict[str, TaskResult],
    space: Workspace,
) -> dict[str, dict[str, float]]:
    """What the merge of two members has on each of their tasks, and what it loses."""
    edits = recipe_edits(base, make_recipe(line, pair), space)
    found = {}
    for member in pair:
        exam = Exam(base, member.spec, member.model.model, space)
        with exam.live.edited(edits), working(f"merged {member.task}") as progress:
            merged = exam.take(progress)
        found[member.task] = _lost(results[member.task], merged)
    return found


def _lost(alone: TaskResult, merged: Evaluation) -> dict[str, float]:
    assert alone.grafted is not None
    assert alone.finetuned is not None
    worth = merged.metric.worth
    loss = (worth(alone.grafted) - worth(merged.value)) / max(worth(alone.finetuned), 1e-9)
    return {"alone": alone.grafted, "merged": merged.value, "loss": loss}


def _alignments(
    base: Base, member: Member, deltas: dict[str, Delta], line: LineRef, space: Workspace
) -> dict[str, float]:
    """The cosine of each other member's task vector with the direction in which the loss falls."""
    data = member.spec.data
    if data is None or data.train is None or not train_has_labels(member.spec, base.family):
        return {}
    if base.space is not None:
        return {}
    calibration = Calibration(line.spec.localize, member.spec, base, member.model.model, space)
    others = {task: delta for task, delta in deltas.items() if task != member.task}
    names = sorted({name for delta in others.values() for name in delta.names})
    size = sum(4 * base.checkpoint.info(name).numel for name in names)
    opened = calibration.opened("measure gradients", (Part("the gradients", size),))
    rows = range(min(len(opened.rows), _MOST_ROWS))
    with (
        requiring_gradients(opened.live.parameters, names),
        working(f"gradients of {member.task}") as progress,
    ):
        for start in range(0, len(rows), _BATCH):
            batch = opened.batch(rows[start : start + _BATCH])
            with torch.enable_grad():
                torch.autograd.backward(opened.loss(batch))
            progress(min(start + _BATCH, len(rows)), len(rows))
        gradients = {name: opened.live.parameters[name].grad for name in names}
        found = {}
        for task, delta in others.items():
            vector = member_vector(base.checkpoint, delta)
            dot = slope = length = 0.0
            for name in vector.names:
                gradient, change = gradients[name], vector.difference(name).double()
                length += float(change.square().sum())
                if gradient is not None:
                    downhill = -gradient.detach().cpu().double().reshape(change.shape)
                    dot += float((downhill * change).sum())
                    slope += float(downhill.square().sum())
            if slope and length:
                found[task] = dot / (slope * length) ** 0.5
    return found


def _correlations(pairs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each signal ranks the pairs, against their losses."""
    found = {}
    for signal in SIGNALS:
        known = [(p[signal], p["loss"]) for p in pairs if p[signal] is not None]
        rho, p_value = rank_correlation([s for s, _ in known], [loss for _, loss in known])
        found[signal] = {"rho": rho, "p_value": p_value, "pairs": len(known)}
    return found
