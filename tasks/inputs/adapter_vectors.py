"""The vectors of (IA)^3 adapters, for lines that merge these in place of weights."""

from restitch.merging.adapters.checkpoint import AdapterCheckpoint
from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.vector_modules import usual_modules
from restitch.registry.home import Home
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.specs.line import LineSpec


def with_modules(spec: LineSpec, base: str, home: Home) -> LineSpec:
    """A line whose space names its modules, if it has one.

    Args:
        spec: the line.
        base: the address of its base.
        home: the installation.

    Raises:
        BadInput: `space: adapter`, and the modules are not known for this base.
    """
    if spec.space != "adapter":
        return spec
    return spec.with_space(usual_modules(resolve_source(base, home, whole=False).local, base))


def vectors_of(finetuned: Checkpoint, ones: Checkpoint, where: str) -> Checkpoint:
    """The vectors of an adapter of a line.

    Args:
        finetuned: the adapter on the base of the line.
        ones: the vectors of the line.
        where: the adapter's name in messages.

    Raises:
        BadInput: it is another kind of model, has vectors of other modules, or more than vectors.
    """
    if not isinstance(finetuned, AdapterCheckpoint) or finetuned.config.kind != "IA3":
        other = "a LoRA adapter" if isinstance(finetuned, AdapterCheckpoint) else "whole weights"
        raise BadInput(
            f"{where} is no (IA)\u00b3 adapter, and the line merges the vectors of these",
            expected="peft_type: IA3 in its adapter_config.json",
            found=other,
            hint="register it on a line without `space`, which merges weights",
        )
    if finetuned.replaced:
        raise BadInput(
            f"{where} has more than vectors, and the line merges vectors alone",
            expected="an adapter without modules_to_save and without trained biases",
            found=shortlist(list(finetuned.replaced)),
            hint="register it on a line without `space`, which merges weights",
        )
    vectors = finetuned.vectors()
    vectors.notes = finetuned.notes
    found = {name: vectors.info(name).shape for name in vectors.names}
    expected = {name: ones.info(name).shape for name in ones.names}
    if found != expected:
        differing = sorted(
            name for name in {**expected, **found} if expected.get(name) != found.get(name)
        )
        raise BadInput(
            f"{where} has vectors of other modules than the line",
            expected=f"the {len(expected)} vectors of the modules under `space` in the line file",
            found=f"{len(differing)} that differ of {len(found)}",
            details=[f"{n}: line {_of(expected, n)}, adapter {_of(found, n)}" for n in differing],
            hint="register adapters with the target_modules and feedforward_modules of the line",
        )
    return vectors


def _of(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """The side that a vector scales, by its shape."""
    if name not in shapes:
        return "none"
    out, inputs = shapes[name]
    return f"{out} outputs" if inputs == 1 else f"{inputs} inputs"
