"""Trimming in place keeps the very weights of which a cut says that they are kept."""

import numpy as np
import pytest

from restitch.merging.ranking.quantile import Cut

VALUES = (0.0, 0.5, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), float("inf"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", [None, "a", "b", "c"])
def test_kept_values_stay_and_the_others_become_0(
    dtype: type[np.floating], value: float, name: str | None
) -> None:
    levels = np.array([*VALUES, *(-np.array(VALUES)), 1e-30, -3.5], dtype=dtype)
    whole = np.random.default_rng(0).choice(levels, 40_000)
    for position in (0, 7, 33_000, 39_999):
        cut = Cut(value, name, position if name else 0)
        kept = whole.copy()
        kept[~cut.keeps("b", 0, np.absolute(whole))] = 0
        for size in (1000, 33_000, 40_000):
            found = whole.copy()
            for start in range(0, len(found), size):
                cut.trim("b", start, found[start : start + size])
            assert np.array_equal(found, kept)
