"""Comparisons of two models on the same rows: losses and classes, against slow oracles."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from restitch.modeling.row_values import WORST, Bits, Classes, Errors, Losses, rows_from_json
from restitch.registry.specs.metric import METRICS, mean_share

PERPLEXITY = METRICS["perplexity"]
LOSSES = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 9)), min_size=1, max_size=9
)


def losses(*values: float) -> Losses:
    """Texts of one token."""
    return Losses.of(PERPLEXITY, np.array(values), np.ones(len(values)))


def test_perplexity_by_hand():
    # Two texts of 1 and 3 tokens, of which all tokens together have 4 ln 2 nats.
    found = Losses.of(PERPLEXITY, np.log(2) * np.array([3.0, 1.0]), np.array([1, 3]))
    assert found.value() == pytest.approx(2.0)
    low, high = found.interval()
    # One text alone has a perplexity of 8 or of the third root of 2.
    assert (low, high) == pytest.approx((2 ** (1 / 3), 8.0))


def test_a_row_without_a_number_has_the_worst_one_and_stays_finite():
    nan = Losses.of(PERPLEXITY, np.array([np.nan, 1.0]), np.array([2, 2]))
    assert np.isfinite(nan.value())
    assert nan.losses[0] == 2 * WORST
    assert nan.value() > Losses.of(PERPLEXITY, np.array([700.0, 1.0]), np.array([2, 2])).value()


@settings(max_examples=25, deadline=None)
@given(LOSSES)
def test_the_permutation_test_agrees_with_all_exchanges(rows):
    one, other, tokens = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    first, second = (Losses.of(PERPLEXITY, side, tokens) for side in (one, other))
    found, back = first.compare(second), second.compare(first)
    differences = one - other
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(rows))
    ]
    exact = np.mean([one >= sums[0] * (1 - 1e-9) for one in sums])
    assert found.p_value == pytest.approx(exact, abs=0.06)
    assert back.p_value == found.p_value
    assert back.difference == -found.difference
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert (found.gained, found.lost) == ((other < one).sum(), (other > one).sum())


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=7),
    st.sampled_from([2, 3]),
)
def test_the_test_of_f1_agrees_with_all_exchanges(rows, classes):
    metric = METRICS["f1"]
    target, one, other = (np.minimum(side, classes - 1) for side in zip(*rows, strict=True))
    first, second = (Classes(metric, target, side, classes) for side in (one, other))

    def f1(predicted: np.ndarray) -> float:
        average = "binary" if classes == 2 else "macro"
        found: float = f1_score(
            target, predicted, labels=range(classes), average=average, zero_division=0
        )
        return found

    assert first.value() == pytest.approx(f1(one))
    seen, as_large = abs(f1(other) - f1(one)), 0
    cases = list(itertools.product((False, True), repeat=len(rows)))
    for swapped in cases:
        a, b = np.where(swapped, other, one), np.where(swapped, one, other)
        as_large += abs(f1(b) - f1(a)) >= seen - 1e-9
    found = first.compare(second)
    assert found.p_value == pytest.approx(as_large / len(cases), abs=0.06)
    assert found.difference == pytest.approx(f1(other) - f1(one))


def test_a_class_that_neither_occurs_nor_is_predicted_has_f1_zero():
    found = Classes(METRICS["f1"], np.array([0, 0]), np.array([0, 0]), 3)
    assert found.value() == pytest.approx(1 / 3)


def test_the_test_and_the_interval_find_a_clear_difference_and_no_other():
    draw = np.random.default_rng(0)
    seen = 2 + draw.random(200)
    first, second = (losses(*side) for side in (seen, seen - 0.5 + draw.normal(size=200) / 4))
    found = first.compare(second)
    assert found.is_significant
    assert found.low < found.difference < found.high < 0
    assert (first.ratio_interval(second) or (0.0, 0.0))[0] > 1  # inverted: above 1 is better
    alike = first.compare(losses(*(seen + draw.normal(size=200) / 4)))
    assert not alike.is_significant
    assert alike.low < 0 < alike.high
    same = first.compare(first)
    assert (same.difference, same.p_value, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)


def test_chance_alone_is_rarely_significant():
    draw = np.random.default_rng(1)
    found = [
        losses(*draw.random(40)).compare(losses(*draw.random(40))).is_significant
        for _ in range(200)
    ]
    assert 0.01 <= np.mean(found) <= 0.1


def test_few_rows_cannot_show_a_difference():
    assert not losses(9, 9, 9, 9).compare(losses(1, 1, 1, 1)).is_significant


def test_a_ratio_to_zero_has_no_interval():
    right = Bits(METRICS["accuracy"], np.array([True, False]))
    none = Bits(METRICS["accuracy"], np.array([False, False]))
    assert right.ratio_interval(none) is None


def test_other_rows_cannot_be_compared():
    for first, second in (
        (losses(1), losses(1, 2)),
        (losses(), losses()),
        (losses(1), Losses.of(METRICS["f1"], np.ones(1), np.ones(1))),
    ):
        with pytest.raises(ValueError, match="same rows"):
            first.compare(second)


ERROR = METRICS["squared_error"]
NUMBERS = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(NUMBERS)
def test_errors_are_averaged_compared_and_stored(rows):
    one, other = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    first, second = Errors.of(ERROR, one), Errors.of(ERROR, other)
    low, high = first.interval()
    assert first.value() == pytest.approx(one.mean())
    assert one.min() - 1e-9 <= low <= high <= one.max() + 1e-9
    found = first.compare(second)
    assert found.difference == pytest.approx(other.mean() - one.mean())
    assert (found.gained, found.lost) == ((other < one).sum(), (other > one).sum())
    # The test is that of losses of one token each: their exponential changes no order.
    as_losses = losses(*one).compare(losses(*other))
    assert found.p_value == as_losses.p_value
    again = rows_from_json("squared_error", first.to_json())
    assert isinstance(again, Errors)
    assert np.array_equal(again.errors, first.errors)


def test_a_row_without_a_number_has_the_worst_error():
    found = Errors.of(ERROR, np.array([np.nan, np.inf, 1.0]))
    assert found.errors.tolist() == [WORST, WORST, 1.0]


class TestMetrics:
    def test_ratios_are_inverted_where_lower_is_better(self):
        assert METRICS["accuracy"].ratio(0.4, 0.8) == 0.5
        assert PERPLEXITY.ratio(20.0, 10.0) == 0.5
        assert METRICS["accuracy"].ratio(0.4, 0.0) is None
        assert PERPLEXITY.ratio(0.0, 1.0) is None

    def test_a_loss_is_a_fraction_of_the_value_where_there_is_no_share(self):
        assert METRICS["accuracy"].loss(0.8, 0.6) == pytest.approx(0.2)
        assert PERPLEXITY.loss(10.0, 12.0) == pytest.approx(0.2)
        assert PERPLEXITY.loss(10.0, 9.0) == pytest.approx(-0.1)

    @given(st.floats(1, 1e6), st.floats(1, 1e6))
    def test_worth_grows_with_quality_and_stays_between_0_and_1(self, one, other):
        worths = PERPLEXITY.worth(one), PERPLEXITY.worth(other)
        assert 0 <= min(worths) <= max(worths) <= 1
        assert (worths[0] > worths[1]) <= (one < other)

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_the_worth_of_an_error_is_1_without_any(self, one, other):
        worths = ERROR.worth(one), ERROR.worth(other)
        assert 0 <= min(worths) <= max(worths) <= 1
        assert (worths[0] > worths[1]) <= (one < other)
        assert ERROR.worth(0.0) == 1

    def test_a_value_reaches_a_share_of_the_better_one(self):
        assert METRICS["f1"].reaches(0.73, 0.9, 0.8)
        assert not METRICS["f1"].reaches(0.71, 0.9, 0.8)
        assert PERPLEXITY.reaches(11.0, 0.9, 10.0)
        assert not PERPLEXITY.reaches(11.2, 0.9, 10.0)

    def test_the_mean_is_over_shares_only(self):
        assert mean_share([("accuracy", 0.5), ("perplexity", 30.0), ("f1", 0.7)]) == 0.6
        assert mean_share([("perplexity", 30.0), ("accuracy", None)]) is None


def test_the_bound_of_a_ratio_is_the_20th_part_of_its_draws_and_never_above_it():
    # Errors 1 and 3 against 2 and 3: draws have the ratios 1/2, 4/5 and 1 in the shares 1:2:1.
    one, other = (Errors.of(METRICS["squared_error"], np.array(e)) for e in ([1.0, 3.0], [2, 3.0]))
    assert one.ratio_bound(other) == 0.5
    assert one.ratio_bound(one) == 1.0
    # A better model has ratios from 1 to 2: what one row alone shows is no bound above the value.
    assert other.ratio_bound(one) == 1.0


def test_nothing_left_to_reach_does_not_spoil_the_bound_of_a_ratio():
    """Draws without an error in either model divide by zero; they are no sign of a loss."""
    one, other = (Errors.of(METRICS["squared_error"], np.array(e)) for e in ([0, 4.0], [0, 5.0]))
    assert one.ratio_interval(other) is None
    assert one.ratio_bound(other) == pytest.approx(0.8)
    perfect = Errors.of(METRICS["squared_error"], np.zeros(2))
    assert perfect.ratio_bound(perfect) is None


def test_a_share_without_a_right_row_has_no_bound():
    right = Bits(METRICS["accuracy"], np.array([True, True]))
    assert right.ratio_bound(Bits(METRICS["accuracy"], np.array([False, False]))) is None
    assert 0 < (right.ratio_bound(right) or 0.0) < 1


@settings(max_examples=20, deadline=None)
@given(LOSSES)
def test_the_bound_of_any_ratio_is_at_most_the_ratio(rows):
    one, other, tokens = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    first, second = (Losses.of(PERPLEXITY, side, tokens) for side in (one, other))
    bound = first.ratio_bound(second)
    assert bound is not None
    assert 0 < bound <= first.value() / second.value()
