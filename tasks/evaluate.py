"""Evaluate weights on a task: the step that is cached by everything that it depends on."""

import json
from typing import Any

from merging.digests import digest_json
from merging.progress import Progress
from modeling.data import Rows, stratified
from modeling.evaluation import EVALUATOR_VERSION, Evaluation
from modeling.evaluation import evaluate as run_evaluation
from registry.head import ModelRef
from registry.specs import TaskSpec
from tasks.engine import Cached, step
from tasks.inputs import evaluation_split, head_inputs, task_head, verified_data
from tasks.models import Base, device, live_base, open_base
from tasks.refs import LineRef, ResultRef, WeightsRef
from tasks.reporting import working
from tasks.workspace import Workspace, made_by, workspace


def result_inputs(
    spec: TaskSpec, base: Base, weights: WeightsRef, head_of: ModelRef | None
) -> dict[str, Any]:
    """All that an evaluation depends on (DESIGN: result key)."""
    assert spec.data is not None
    return {
        "base": base.ref.weights,
        "assets": base.ref.config,
        "family": [base.family.name, base.family.version],
        "weights": [weights.kind, weights.identity],
        # All localizable coordinates of a model are another set under another choice.
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
    """The accuracy of weights on a task's evaluation split.

    Args:
        line: with the base that the weights lie on.
        spec: a task with data.
        weights: what lies on top of the base.
        head_of: the finetuned model that holds the task's own head, where families have one.
        again: evaluate even where there is a result.
    """
    space = workspace()
    base = open_base(line, space)
    inputs = digest_json(result_inputs(spec, base, weights, head_of))
    record = None if again else space.objects.lookup("result", inputs)
    if record is not None:
        return Cached(_ref(record.blob, space))
    blob = space.objects.put_json(evaluated(base, spec, weights, head_of, space).to_json())
    space.objects.publish("result", inputs, blob, made_by=made_by())
    return _ref(blob, space)


def evaluated(
    base: Base,
    spec: TaskSpec,
    weights: WeightsRef,
    head_of: ModelRef | None,
    space: Workspace,
) -> Evaluation:
    """What weights reach on a task's evaluation split, found anew and kept nowhere."""
    exam = Exam(base, spec, head_of, space)
    title = f"evaluating {weights.kind} on {spec.task}"
    with exam.live.wearing(weights, space), working(title) as progress:
        return exam.take(progress)


class Exam:
    """Rows of a task and its head, ready to be asked again and again.

    Made while the live base has its own weights, which give heads.

    Args:
        base: of the line, opened.
        spec: a task with data.
        head_of: the finetuned model that holds the task's own head, where families have one.
        space: where heads are kept.
        validation: ask at most so many validation rows, for choices; by default those of the
            evaluation split that results are reported on.

    Attributes:
        live: the model that takes it, with whatever weights it has at the time.
        count: how many rows there are.
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
        self.live = live_base(base)
        data = verified_data(spec, base.family)
        if validation is not None:
            rows = data.rows("validation")
            self._rows = rows.select(stratified(rows.targets, validation, 0))
        else:
            split = evaluation_split(spec)
            assert split is not None
            self._rows = _sampled(data.rows(split), spec)
        self.count = len(self._rows)
        self._head = task_head(spec, base, self.live, head_of, space)
        self._preprocess = base.family.preprocessor(base.folder, self._head.spec.max_length)

    def take(self, progress: Progress | None = None) -> Evaluation:
        """What the live model reaches as it is."""
        return run_evaluation(
            self.live.base.family,
            self.live.model,
            self._head,
            self._rows,
            self._preprocess,
            metric=self.spec.metric,
            progress=progress,
        )


def _sampled(rows: Rows, spec: TaskSpec) -> Rows:
    """The rows that the task is evaluated on: all of the split, or the sample it asks for."""
    assert spec.data is not None
    sample = spec.data.sample
    if sample is None:
        return rows
    return rows.select(stratified(rows.targets, sample.rows, sample.seed))


def _ref(blob: str, space: Workspace) -> ResultRef:
    found = Evaluation.from_json(json.loads(space.objects.read_blob(blob)))
    return ResultRef(
        metric=found.metric,
        value=found.value,
        low=found.interval[0],
        high=found.interval[1],
        count=found.count,
        top1=found.top1,
        top5=found.top5,
        blob=blob,
    )
