"""The keys under `gates` in a line's file: one for each gate, and `warn`."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, create_model, model_validator

from restitch.registry.gates.registry import GATES
from restitch.registry.specs.base import Spec


class _Gates(Spec):
    """The limits that a merged version must meet to be promoted. A gate without a limit is off."""

    warn: tuple[str, ...] = ()

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the gates that are on, by gate."""
        limits = {name: getattr(self, name) for name in GATES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @model_validator(mode="after")
    def _warns_of_gates_that_are_on(self) -> Self:
        off = [name for name in self.warn if name not in self.limits]
        if off:
            raise ValueError(f"warn names {', '.join(off)}, which has no limit here")
        return self


if TYPE_CHECKING:
    GatesSpec = _Gates
else:
    GatesSpec = create_model(
        "GatesSpec",
        __base__=_Gates,
        __doc__=_Gates.__doc__,
        **{
            gate.name: (
                gate.limit | None,
                Field(default=None, description=gate.description, examples=[gate.example]),
            )
            for gate in GATES.values()
        },
        warn=(
            tuple[Literal[tuple(GATES)], ...],
            Field(
                default=(),
                description="The gates that only warn, and do not keep a version from promotion.",
                examples=[["max_patch_bytes"]],
            ),
        ),
    )
