"""Check that a finetuned model can join its line, and measure changes that masks cannot hold."""

from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.ranking.task_vector import TaskVector, outside_share
from restitch.registry.access_policy import AccessDenied
from restitch.registry.ledger.line_state import ModelRef
from restitch.tasks.inputs.checkpoints import line_up, open_base, open_model
from restitch.tasks.runtime.engine import step
from restitch.tasks.runtime.refs import LineRef, Validated
from restitch.tasks.runtime.workspace import workspace


@step("validate")
def validate(line: LineRef, model: ModelRef) -> Validated:
    """Check a finetuned model against the base of its line.

    Raises:
        CannotJoin: it has another architecture or configuration, missing tensors, other shapes,
            NaN or infinity, or equals the base; the message lists every difference.
        AccessDenied: this worker may not read it, but another one may.
    """
    space = workspace()
    base = open_base(line, space)
    try:
        folder, checkpoint = open_model(model, space, base.family, like=base.checkpoint)
        comparison = line_up(base, checkpoint)
        problems = comparison.problems()
        if folder.is_dir():
            problems += base.family.config_differences(base.folder, folder)
    except AccessDenied:
        raise
    except BadInput as error:
        raise CannotJoin(
            error.summary,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
            details=error.details,
        ) from error
    if problems:
        raise CannotJoin(
            f"{model.uri} is not finetuned from the base of this line",
            expected=f"every localizable tensor and the configuration of {base.ref.uri}",
            found=f"{len(problems)} differences",
            details=problems,
            hint="register a model that was finetuned from this base",
        )
    finetuned = checkpoint.renamed(comparison.mapping)
    vector = TaskVector(base.checkpoint, finetuned, base.names)
    vector.check_finite()
    if vector.is_zero():
        raise CannotJoin(
            f"{model.uri} has the same localizable weights as the base",
            expected="weights that finetuning changed",
            found=f"no difference in {len(base.names)} tensors",
            hint="check that the finetuned model was saved, and not its base",
        )
    outside = outside_share(base.checkpoint, finetuned, base.names)
    return Validated(
        outside_share=outside.share,
        outside_tensors=outside.tensors[:20],
        ignored=(*comparison.unexpected, *comparison.missing)[:20],
    )
