"""Compare a finetuned model with the base on the rows of its own task.

A model that is not better than the base has no skill to merge, or it is not measured as it was
trained: its labels, prompts, inputs, head or tokenizer differ.
"""

from restitch.merging.errors import GateFailed, shortlist
from restitch.modeling.families.family import get_family
from restitch.modeling.family_choice import with_task_heads
from restitch.registry.ledger.finetuned_models import ModelFacts
from restitch.registry.ledger.measurements import Gain, ResultRef, compared
from restitch.registry.record import Interval
from restitch.registry.specs.head import GenerateSpec
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.compare_results import read_evaluation, verdict_of
from restitch.tasks.runtime.refs import LineRef

_OTHER_TEXTS = "texts: other columns were read in training, or texts were prepared differently"
_OTHER_SCALE = "numbers: those of training had another scale, such as 0 to 1 in place of 0 to 5"
_OWN_TOKENIZER = "tokenizer: that of the base is used, not that of the model"


def gain_over_base(objects: ObjectStore, base: ResultRef, finetuned: ResultRef) -> Gain:
    """Compare two evaluations of the same rows."""
    first, second = (read_evaluation(objects, result.blob) for result in (base, finetuned))
    pairs = first.rows.compare(second.rows)
    verdict = verdict_of(pairs, base.metric)
    return Gain(
        verdict="not better" if verdict == "same" else verdict,
        difference=pairs.difference,
        interval=Interval(low=pairs.low, high=pairs.high),
        p_value=pairs.p_value,
    )


def why_held(line: LineRef, spec: TaskSpec, facts: ModelFacts) -> GateFailed:
    """The reason why a model that is worse than the base is held: values, causes, remedies.

    Args:
        line: the model's line.
        spec: its task.
        facts: with the comparison.
    """
    assert facts.gain is not None
    name, base, finetuned = line.spec.line, facts.results["base"], facts.results["finetuned"]
    return GateFailed(
        f"significantly worse than the base on its own task:"
        f" {base.metric} {finetuned.value:.3f}, the base has {base.value:.3f}",
        expected=f"{base.metric} {'below' if base.measure.lower_is_better else 'above'}"
        f" {base.value:.3f}",
        found=compared(facts.gain, facts.results),
        details=[f"likely cause: {cause}" for cause in likely_causes(line, spec, facts)],
        hint=f"correct the task file and declare it with `restitch task {name} --task FILE"
        " --replace-task`: the next remerge measures the model again. To merge the model as it is,"
        " register it again with --accept-no-gain --reason WHY",
    )


def likely_causes(line: LineRef, spec: TaskSpec, facts: ModelFacts) -> tuple[str, ...]:
    """The usual reasons why a model does not show the skill that its author measured."""
    head = spec.head
    if spec.prompt is not None:
        return _causes_with_prompt(spec)
    if spec.is_of_text:
        return (_OTHER_TEXTS, _OWN_TOKENIZER)
    if spec.is_of_numbers:
        return (_OTHER_SCALE, _OTHER_TEXTS, _OWN_TOKENIZER)
    labels = () if head is None or not isinstance(head.labels, tuple) else head.labels
    prompts = () if head is None or not isinstance(head.templates, tuple) else head.templates
    family = get_family(line.spec.family)
    scores = "labels are scored by embeddings of their texts, not by a classifier of the model"
    if family.task_heads is not None:
        scores = "it is the model's own, with the classes of id2label in its config.json"
    elif facts.unused is not None:
        unused = f"{facts.unused.count} unused tensors: {shortlist(facts.unused.names)}"
        scores += f"; its file has {unused}"
        others = ", ".join(with_task_heads(family))
        scores += (
            f"; if these are a classifier, use it in a line of family {others}" if others else ""
        )
    inputs = (
        "images: they were turned, cropped or coloured differently in training"
        if family.modality == "image"
        else "texts: other columns were read in training, or texts were prepared differently"
    )
    readers = "image processor, tokenizer" if family.modality == "image" else "tokenizer"
    classes, templates = (shortlist([repr(text) for text in each]) for each in (labels, prompts))
    return (
        f"label order: the classes 0, 1, ... of the rows are {classes}",
        f"templates: the prompts are {templates}; use those of training",
        inputs,
        f"head: {scores}",
        f"{readers}: taken from the base, not from the model",
    )


def _causes_with_prompt(spec: TaskSpec) -> tuple[str, ...]:
    """The same for a task with a prompt."""
    prompt = (
        f"prompt: it is {spec.prompt!r}; use that of training, with the same spaces and line ends"
    )
    if spec.answer is not None:
        generate = spec.generate or GenerateSpec()
        ends = shortlist([repr(text) for text in generate.stop])
        return (
            prompt,
            f"answer: column {spec.answer!r}, compared letter by letter; an answer ends with {ends}"
            f" or after {generate.max_new_tokens} tokens",
            _OTHER_TEXTS,
            _OWN_TOKENIZER,
        )
    choices = f"the lists in column {spec.choices_column!r}"
    if spec.choices is not None:
        choices = shortlist([repr(text) for text in spec.choices])
    return (
        prompt,
        f"choices: they are {choices}; use the answers of training",
        f"score: choices are compared by score: {spec.score}",
        _OTHER_TEXTS,
        _OWN_TOKENIZER,
    )
