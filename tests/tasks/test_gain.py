"""The comparison of a finetuned model with the base, row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restitch.modeling.evaluation import Evaluation, summarize
from restitch.modeling.row_values import Losses
from restitch.modeling.significance import compare_right
from restitch.registry.ledger.measurements import ResultRef, unexpected
from restitch.registry.specs.metric import METRICS
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore
from restitch.tasks.gain import gain_over_base

OPPOSITE = {"better": "worse", "worse": "better", "not better": "not better"}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return ObjectStore(FolderStore(tmp_path_factory.mktemp("store")))


def result(objects: ObjectStore, right: list[bool], metric: str = "accuracy") -> ResultRef:
    """The evaluation of a model that has these rows right, of two classes in turn."""
    targets = np.arange(len(right)) % 2
    guesses = np.where(right, targets, 1 - targets)
    scores = np.eye(2, dtype=np.float32)[guesses]
    measured = summarize(scores, targets, metric)
    low, high = measured.interval
    return ResultRef(
        metric=metric,
        value=measured.value,
        low=low,
        high=high,
        count=measured.count,
        blob=objects.put_json(measured.to_json()),
    )


def perplexity(objects: ObjectStore, losses: np.ndarray) -> ResultRef:
    """The evaluation of texts of 50 tokens with these negative log-likelihoods."""
    measured = Evaluation.of(Losses.of(METRICS["perplexity"], losses, np.full(len(losses), 50)))
    low, high = measured.interval
    return ResultRef(
        metric="perplexity",
        value=measured.value,
        low=low,
        high=high,
        count=measured.count,
        blob=objects.put_json(measured.to_json()),
    )


pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(rows=pairs, metric=st.sampled_from(["accuracy", "f1"]))
def test_exchanging_the_models_exchanges_the_verdict(
    objects: ObjectStore, rows: list[tuple[bool, bool]], metric: str
) -> None:
    base, finetuned = (result(objects, list(side), metric) for side in zip(*rows, strict=True))
    gain, loss = gain_over_base(objects, base, finetuned), gain_over_base(objects, finetuned, base)
    assert loss.verdict == OPPOSITE[gain.verdict]
    assert loss.difference == pytest.approx(-gain.difference)
    assert (-loss.interval.high, -loss.interval.low) == pytest.approx(
        (gain.interval.low, gain.interval.high)
    )
    if gain.verdict != "not better":
        assert (gain.verdict == "better") is (gain.difference > 0)


@given(rows=pairs)
def test_accuracy_is_judged_by_the_test_on_paired_rows(
    objects: ObjectStore, rows: list[tuple[bool, bool]]
) -> None:
    first, second = (list(side) for side in zip(*rows, strict=True))
    gain = gain_over_base(objects, result(objects, first), result(objects, second))
    found = compare_right(np.array(first), np.array(second))
    assert (gain.verdict != "not better") is found.is_significant
    assert gain.p_value == found.p_value


@given(rows=st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_model_is_never_better_than_itself(objects: ObjectStore, rows: list[bool]) -> None:
    for metric in ("accuracy", "f1"):
        one = result(objects, rows, metric)
        assert gain_over_base(objects, one, one).verdict == "not better"


def test_two_rows_cannot_show_a_skill(objects: ObjectStore) -> None:
    for metric in ("accuracy", "f1"):
        none, both = (result(objects, [right] * 2, metric) for right in (False, True))
        assert gain_over_base(objects, none, both).verdict == "not better"


def test_less_perplexity_is_better(objects: ObjectStore) -> None:
    random = np.random.default_rng(0)
    losses = random.random(40) * 100
    base, finetuned = (perplexity(objects, losses * share) for share in (1.0, 0.8))
    assert finetuned.value < base.value
    gain = gain_over_base(objects, base, finetuned)
    assert (gain.verdict, gain.difference < 0) == ("better", True)
    assert gain.interval.high < 0
    assert gain_over_base(objects, finetuned, base).verdict == "worse"


def test_a_value_is_unexpected_outside_of_the_interval_only(objects: ObjectStore) -> None:
    one = result(objects, [True, False] * 50)
    assert unexpected(None, one) is None
    assert unexpected(0.9, None) is None
    for value in (one.low, one.value, one.high):
        assert unexpected(value, one) is None
    for value in (one.low - 0.001, one.high + 0.001):
        assert f"{value:.3f}" in str(unexpected(value, one))
