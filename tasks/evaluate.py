"""Evaluate weights on a task; results are cached by all that they depend on."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from restitch.merging.digests import digest_json
from restitch.merging.progress import Progress
from restitch.modeling.data.task_data import stratified
from restitch.modeling.device import device
from restitch.modeling.evaluation import EVALUATOR_VERSION, Evaluation
from restitch.modeling.evaluation import evaluate as run_evaluation
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base, open_base
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.inputs.reported_rows import reported_rows, rows_to_choose_by
from restitch.tasks.inputs.task_data import evaluation_split, verified_data
from restitch.tasks.inputs.task_head import head_inputs, task_head
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, ResultRef, WeightsRef
from restitch.tasks.runtime.sharing import Work
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace


def result_inputs(
    spec: TaskSpec, base: Base, weights: WeightsRef, head_of: ModelRef | None
) -> dict[str, Any]:
    """All that an evaluation depends on: the inputs of its key."""
    assert spec.data is not None
    return {
        "base": base.ref.weights,
        "assets": base.ref.config,
        "family": [base.family.name, base.family.version],
        "weights": [weights.kind, weights.identity],
        # Another selection of localizable tensors gives other weights of this kind.
        "localizable": list(base.names) if weights.kind == "localizable" else None,
        "head": digest_json(head_inputs(spec, base, head_of)),
        "data": spec.data.content,
        "split": evaluation_split(spec),
        "metric": spec.metric,
        "evaluator": EVALUATOR_VERSION,
        "device": device().type,
        **({} if spec.data.sample is None else {"sample": spec.data.sample.to_json()}),
    }


@step("evaluate", "evaluate {weights.kind} on {spec.task}")
def evaluate(
    line: LineRef,
    spec: TaskSpec,
    weights: WeightsRef,
    head_of: ModelRef | None = None,
    again: bool = False,
) -> ResultRef | Cached[ResultRef]:
    """The value of weights on a task's evaluation split; `again` ignores a stored result."""
    space = workspace()
    base = open_base(line, space)
    inputs = digest_json(result_inputs(spec, base, weights, head_of))
    record = None if again else space.objects.lookup("result", inputs)
    if record is not None:
        return Cached(_ref(record.blob, space))
    blob = space.objects.put_json(evaluated(base, spec, weights, head_of, space).to_json())
    space.objects.publish("result", inputs, blob, made_by=made_by())
    return _ref(blob, space)


class Evaluations:
    """The evaluations of some weights on several tasks, each of which is stored under its key.

    Args:
        line: the line.
        weights: what is evaluated.
        exams: the tasks, each with the finetuned model that has its own head.
        space: the workspace.

    Attributes:
        work: the evaluations as work that workers can share.
    """

    kind = "evaluate"

    def __init__(
        self,
        line: LineRef,
        weights: WeightsRef,
        exams: Sequence[tuple[TaskSpec, ModelRef | None]],
        space: Workspace,
    ) -> None:
        self.line, self.weights, self.exams = line, weights, tuple(exams)
        base = open_base(line, space)
        self.work = Work(
            line=line.spec.line,
            kind=self.kind,
            content={
                "spec": line.spec.to_json(),
                "base": line.base.to_json(),
                "weights": asdict(weights),
                "exams": [
                    [spec.to_json(), None if model is None else model.to_json()]
                    for spec, model in self.exams
                ],
            },
            results="result",
            keys=tuple(
                digest_json(result_inputs(spec, base, weights, model)) for spec, model in self.exams
            ),
        )

    @classmethod
    def of(cls, content: Mapping[str, Any], space: Workspace) -> "Evaluations":
        """The evaluations of the work that another process offers."""
        spec, base = LineSpec.from_json(content["spec"]), ModelRef.model_validate(content["base"])
        exams = [
            (TaskSpec.from_json(task), None if model is None else ModelRef.model_validate(model))
            for task, model in content["exams"]
        ]
        return cls(LineRef(spec, base), WeightsRef(**content["weights"]), exams, space)

    def do(self, number: int) -> ResultRef:
        """Evaluate the weights on a task, unless the result is in the store."""
        spec, head_of = self.exams[number]
        return evaluate(self.line, spec, self.weights, head_of)


def evaluated(
    base: Base,
    spec: TaskSpec,
    weights: WeightsRef,
    head_of: ModelRef | None,
    space: Workspace,
) -> Evaluation:
    """Evaluate weights on a task's evaluation split, without reading or storing a result."""
    exam = Exam(base, spec, head_of, space)
    title = f"evaluating {weights.kind} on {spec.task}"
    with exam.live.wearing(weights, space), working(title) as progress:
        return exam.take(progress)


class Exam:
    """The rows of a task and its head, loaded to evaluate several sets of weights.

    Create it while the live base has its own weights, because heads may be made from them.

    Args:
        head_of: the finetuned model with the task's own head, for families that have heads.
        validation: use at most this many rows to choose by (see `has_rows_to_choose_by`); None
            uses the rows of the evaluation split.

    Attributes:
        live: the model that is evaluated, with its current weights.
        count: the number of rows.
    """

    def __init__(
        self,
        base: Base,
        spec: TaskSpec,
        head_of: ModelRef | None,
        space: Workspace,
        *,
        validation: int | None = None,
    ) -> None:
        self.spec = spec
        self.live = live_base(base, f"evaluate on {spec.task}")
        data = verified_data(spec, base.family)
        if validation is not None:
            rows = rows_to_choose_by(data, spec, base.family)
            self._rows = rows.select(stratified(rows.strata, validation, 0))
        else:
            rows, reported = reported_rows(data, spec)
            self._rows = rows if reported is None else rows.select(reported)
        self.count = len(self._rows)
        self._head = task_head(spec, base, self.live, head_of, space)
        self._preprocess = base.family.preprocessor(base.folder, self._head.spec.most_read)

    def part(self, share: float) -> "Exam":
        """An exam with a share of the rows; except for rounding, shares are nested."""
        part = copy.copy(self)
        count = math.ceil(share * self.count)
        part._rows = self._rows.select(stratified(self._rows.strata, count, 0))
        part.count = len(part._rows)
        return part

    def take(self, progress: Progress | None = None) -> Evaluation:
        """Evaluate the live model with its current weights."""
        return run_evaluation(
            self.live.base.family,
            self.live.model,
            self._head,
            self._rows,
            self._preprocess,
            metric=self.spec.metric,
            progress=progress,
        )


def choice_inputs(spec: TaskSpec, base: Base, head_of: ModelRef | None) -> dict[str, Any]:
    """All that a value on rows to choose by depends on, in addition to the weights."""
    assert spec.data is not None
    return {
        "data": spec.data.content,
        "set_apart": spec.data.validation is None,
        "sample": None if spec.data.sample is None else spec.data.sample.to_json(),
        "head": digest_json(head_inputs(spec, base, head_of)),
        "metric": spec.metric,
        "evaluator": EVALUATOR_VERSION,
    }


def _ref(blob: str, space: Workspace) -> ResultRef:
    stored = Evaluation.from_json(json.loads(space.objects.read_blob(blob)))
    return ResultRef(
        metric=stored.metric.name,
        value=stored.value,
        low=stored.interval[0],
        high=stored.interval[1],
        count=stored.count,
        more=dict(stored.more),
        blob=blob,
    )
