"""Rules for shared coordinates, which several members keep, on plain arrays.

A rule receives the base's weights at some shared coordinates and, in the order of the members, the
deviation of each owner; it returns the merged weights. Everything is float64 and elementwise, so a
merged weight does not depend on the other coordinates or on the ranges of a tensor. The paper's
rule `mean` needs no base and is part of `stitch`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from restitch.merging.rules.settings import bad_setting

Floats = NDArray[np.float64]

MEAN = "mean"


@dataclass(frozen=True)
class Owner:
    """One member's values at the shared coordinates that it keeps.

    Attributes:
        places: the indices of the shared coordinates that it keeps, each once.
        deviations: the finetuned value minus the base's, one per place.
        weights: the positive importance of each to the member; None if it is unknown, and then
            the average of the other owners counts.
    """

    places: NDArray[np.int64]
    deviations: Floats
    weights: Floats | None


Rule = Callable[[Floats, Sequence[Owner]], Floats]


def sum_of_owners(before: Floats, owners: Sequence[Owner]) -> Floats:
    """The base plus all deviations: task arithmetic with coefficient 1."""
    return before + _totals(len(before), owners)


def owner_growth(growth: float) -> Rule:
    """The weighted mean of the deviations, times the number of owners to the power `growth`.

    With 0 it is the weighted mean; with 1 and equal weights it is the sum.

    Args:
        growth: a multiple of a quarter from 0 to 1, because square roots are rounded in the same
            way on every machine and other powers are not.
    """
    quarters = round(4 * growth)
    if not 0 <= quarters <= 4 or quarters != 4 * growth:
        raise bad_setting("growth", "not valid", "0, 0.25, 0.5, 0.75 or 1", growth)

    def rule(before: Floats, owners: Sequence[Owner]) -> Floats:
        counts = np.zeros(len(before))
        for owner in owners:
            counts[owner.places] += 1
        factor = counts if quarters == 4 else np.ones(len(before))
        if quarters in (2, 3):
            factor = np.sqrt(counts)
        if quarters in (1, 3):
            factor = factor * np.sqrt(np.sqrt(counts))
        return before + factor * _weighted(len(before), owners)

    return rule


def elect_sign(before: Floats, owners: Sequence[Owner]) -> Floats:
    """TIES: elect the sign of the sum, and average the owners that agree with it."""
    sign = np.sign(_totals(len(before), owners))
    agreeing, count = np.zeros(len(before)), np.zeros(len(before))
    for owner in owners:
        agrees = np.sign(owner.deviations) == sign[owner.places]
        places = owner.places[agrees]
        agreeing[places] += owner.deviations[agrees]
        count[places] += 1
    # If the sum is 0 and no deviation is 0, no owner agrees and the base stays.
    return before + agreeing / np.maximum(count, 1)


def _weighted(shared: int, owners: Sequence[Owner]) -> Floats:
    known, count = np.zeros(shared), np.zeros(shared)
    for owner in owners:
        if owner.weights is not None:
            known[owner.places] += owner.weights
            count[owner.places] += 1
    usual = np.where(count > 0, known / np.maximum(count, 1), 1.0)
    above, below = np.zeros(shared), np.zeros(shared)
    for owner in owners:
        weights = usual[owner.places] if owner.weights is None else owner.weights
        above[owner.places] += weights * owner.deviations
        below[owner.places] += weights
    return above / below


def _totals(shared: int, owners: Sequence[Owner]) -> Floats:
    totals = np.zeros(shared)
    for owner in owners:
        totals[owner.places] += owner.deviations
    return totals


RULES: Mapping[str, Rule] = {"sum": sum_of_owners, "weighted": owner_growth(0), "elect": elect_sign}
