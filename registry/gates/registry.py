"""Find the gates: every class in a file of this folder, without a list to maintain."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from restitch.registry.gates.gate import Gate, GateOutcome, Measured


def _scan() -> dict[str, Gate]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return {kind.name: kind() for kind in sorted(Gate.__subclasses__(), key=lambda k: k.name)}


GATES: Mapping[str, Gate] = _scan()


def check_gates(
    limits: Mapping[str, float], measured: Measured, warn: tuple[str, ...] = ()
) -> tuple[GateOutcome, ...]:
    """Apply gates, in the order of their names: at least one outcome for each.

    Args:
        limits: the limits of the gates that are on, by gate.
        measured: the measurements of the merged version.
        warn: the gates that only warn.
    """
    return tuple(
        outcome.as_warning() if name in warn else outcome
        for name in sorted(limits)
        for outcome in GATES[name].outcomes(limits[name], measured)
    )
