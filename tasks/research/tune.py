"""Tune one setting of a merge method on the members' validation rows.

All values are tried on the same rows: those of `validation`, or those set apart from train, at most
500 of each task, stratified by class. The value with the highest mean over the tasks wins, the
first of equals. For a method with one model per task, each task gets its own best value. Test rows
are never used. Results are stored under all that they depend on, so that repeating a comparison
does not tune again.
"""

from dataclasses import asdict, dataclass
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.errors import BadInput
from restitch.merging.methods.registry import Method, get_method
from restitch.merging.recipe import Recipe
from restitch.modeling.device import device
from restitch.modeling.evaluation import EVALUATOR_VERSION, Evaluation
from restitch.registry.ledger.finetuned_models import Member
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.task_data import has_validation
from restitch.tasks.inputs.task_head import head_inputs
from restitch.tasks.merge import make_recipe, recipe_edits
from restitch.tasks.research.experts import recipe_experts
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, workspace

MOST_ROWS = 500


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        value: the best value; by task for a method with one model per task.
        curve: every value that was tried, with the metric of each task and their mean.
        rows: the number of rows that were used, by task.
    """

    setting: str
    value: float | dict[str, float]
    curve: list[dict[str, Any]]
    rows: dict[str, int]


@step("tune", "tune {method.name}")
def tune(line: LineRef, members: tuple[Member, ...], method: Method) -> Tuned | Cached[Tuned]:
    """The best value of the setting that a method tunes; the line has its other settings.

    Raises:
        BadInput: a task has no rows to tune on.
    """
    assert method.tunes is not None
    setting, values = method.tunes
    space = workspace()
    base = open_base(line, space)
    without = [member.task for member in members if not has_validation(member.spec, base.family)]
    if without:
        raise BadInput(
            f"{method.name} cannot be tuned on line {line.spec.line}",
            expected="validation rows, or labelled train rows, for every task",
            found=f"none for {', '.join(without)}",
            hint="name a validation split in the task's file, or compare without --tune",
        )
    recipes = [make_recipe(_with(line, setting, value), members) for value in values]
    key = digest_json(_inputs(recipes, members, base))
    known = space.stored("tuning", key)
    if known is not None:
        return Cached(Tuned(**known))
    live = live_base(base, f"tune {method.name}")
    exams = [
        Exam(base, member.spec, member.model.model, space, validation=MOST_ROWS)
        for member in members
    ]
    curve: list[dict[str, Any]] = []
    with working(f"tuning {method.name}") as progress:
        for number, (value, recipe) in enumerate(zip(values, recipes, strict=True)):
            found = _evaluated(live, base, recipe, exams, space)
            worths = {task: one.worth for task, one in found.items()}
            mean = sum(worths.values()) / len(worths)
            tasks = {task: one.value for task, one in found.items()}
            curve.append({"value": value, "mean": mean, "tasks": tasks, "worths": worths})
            progress(number + 1, len(values))
    rows = {exam.spec.task: exam.count for exam in exams}
    best: float | dict[str, float] = _best(curve)
    if method.kind == "experts":
        best = {task: _best([{**p, "mean": p["worths"][task]} for p in curve]) for task in rows}
    for point in curve:
        del point["worths"]
    return Tuned(**space.keep("tuning", key, asdict(Tuned(setting, best, curve, rows))))


def _evaluated(
    live: LiveBase, base: Base, recipe: Recipe, exams: list[Exam], space: Workspace
) -> dict[str, Evaluation]:
    """The evaluation of each task with the merged model, or with the task's specialist."""
    if get_method(recipe.method.name).kind == "experts":
        experts, values = recipe_experts(base, recipe, space), {}
        for exam in exams:
            with live.edited(experts.for_task(exam.spec.task)):
                values[exam.spec.task] = exam.take()
        return values
    with live.edited(recipe_edits(base, recipe, space)):
        return {exam.spec.task: exam.take() for exam in exams}


def _best(curve: list[dict[str, Any]]) -> float:
    """The setting's value at the point with the highest mean, the first of equals."""
    return float(max(curve, key=lambda point: float(point["mean"]))["value"])


def _with(line: LineRef, setting: str, value: float) -> LineRef:
    settings = {**line.spec.method.settings, setting: value}
    return LineRef(line.spec.with_method_settings(settings), line.base)


def _inputs(recipes: list[Recipe], members: tuple[Member, ...], base: Base) -> dict[str, Any]:
    """All that the result depends on."""
    tasks: dict[str, Any] = {}
    for member in members:
        data = member.spec.data
        assert data is not None
        tasks[member.task] = {
            "data": data.content,
            "set_apart": data.validation is None,
            "head": digest_json(head_inputs(member.spec, base, member.model.model)),
            "metric": member.spec.metric,
        }
    return {
        "recipes": [recipe.digest() for recipe in recipes],
        "tasks": tasks,
        "assets": base.ref.config,
        "evaluator": [EVALUATOR_VERSION, MOST_ROWS],
        "device": device().type,
    }
