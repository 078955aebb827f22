"""What a number is worth: ranks, intervals and F1, against slow or known references."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Rows
from restitch.modeling.data.tables import ListTable
from restitch.modeling.evaluation import Evaluation, best, evaluate, summarize
from restitch.modeling.families.family import get_family
from restitch.modeling.row_values import Bits, Classes, Losses
from restitch.modeling.significance import wilson
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.metric import METRICS
from tests.modeling.conftest import png


def scores(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def right(found: Evaluation) -> list[bool]:
    assert isinstance(found.rows, Bits)
    return list(found.rows.right.tolist())


@pytest.mark.parametrize("count", [1, 10, 263, 100_000])
@pytest.mark.parametrize("share", [0, 0.3, 0.999, 1])
def test_the_interval_of_an_accuracy_is_wilson_s(share, count):
    successes = int(share * count)
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_solves_wilson_s_equation():
    for successes, count in ((3, 7), (864, 1000), (499, 500)):
        for bound in wilson(successes, count):
            distance = abs(successes / count - bound)
            assert distance == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / count), rel=1e-9
            )


def test_equal_scores_rank_the_lower_class_first():
    found = summarize(scores([1, 1, 0], [1, 1, 0], [0, 0, 0]), np.array([0, 1, 2]), "accuracy")
    assert right(found) == [True, False, False]


def test_a_row_is_right_if_any_of_its_right_choices_ranks_first():
    rows = scores([3, 1, 2], [1, 3, 2], [2, 2, 1], [1, 2, 2], [-math.inf, 0, 1])
    chosen = best(rows, [(2, 0), (0, 2), (2, 1), (2, 1), (0,)])
    assert chosen.tolist() == [0, 2, 1, 1, 0]
    assert right(summarize(rows, chosen, "accuracy")) == [True, False, False, True, False]


def test_a_nan_score_counts_as_wrong():
    nan, inf = float("nan"), float("inf")
    rows = scores([nan, 0], [0, nan], [inf, 0], [nan, nan], [1, 0])
    found = summarize(rows, np.array([0, 0, 0, 0, 0]), "accuracy")
    assert right(found) == [False, False, False, False, True]
    found = summarize(rows, np.array([0, 0, 0, 0, 0]), "f1")
    assert isinstance(found.rows, Classes)
    assert found.rows.predicted.tolist() == [2, 2, 2, 2, 0]


def test_a_choice_that_a_row_lacks_ranks_behind_all_others():
    inf = float("inf")
    rows = scores([-5, -2, -inf], [-5, -2, -inf], [-3, -inf, -inf])
    found = summarize(rows, np.array([1, 2, 0]), "accuracy")
    assert right(found) == [True, False, True]


def test_top5_counts_the_first_five_and_exists_from_six_classes_on():
    rows = np.tile(np.arange(8, 0, -1, dtype=np.float32), (8, 1))
    found = summarize(rows, np.arange(8), "accuracy")
    assert (found.value, found.more) == (1 / 8, {"top5": 5 / 8})
    assert summarize(rows[:5, :5], np.arange(5), "accuracy").more == {}
    assert summarize(rows[:6, :6], np.arange(6), "accuracy").more == {"top5": 5 / 6}


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_is_that_of_class_one_or_the_mean_over_more_classes(classes):
    random = np.random.default_rng(0)
    values = random.normal(size=(200, classes)).astype(np.float32)
    targets = random.integers(0, classes, 200)
    found = summarize(values, targets, "f1")
    average = "binary" if classes == 2 else "macro"
    assert found.value == pytest.approx(f1_score(targets, values.argmax(1), average=average))
    assert found.interval[0] < found.value < found.interval[1]
    assert summarize(values, targets, "f1").to_json() == found.to_json()


def test_f1_without_any_hit_is_zero():
    assert summarize(scores([1, 0], [1, 0]), np.array([0, 0]), "f1").value == 0


def test_the_interval_of_f1_narrows_with_the_rows():
    widths = []
    for count in (50, 5000):
        random = np.random.default_rng(1)
        values = random.normal(size=(count, 2)).astype(np.float32)
        found = summarize(values, random.integers(0, 2, count), "f1")
        widths.append(found.interval[1] - found.interval[0])
    assert widths[1] < widths[0] / 5


def test_an_evaluation_survives_json():
    random = np.random.default_rng(0)
    scores, targets = random.normal(size=(13, 6)).astype(np.float32), random.integers(0, 6, 13)
    numbers = Losses.of(METRICS["perplexity"], random.random(13), random.integers(1, 9, 13))
    for found in (
        summarize(scores, targets, "accuracy"),
        summarize(scores, targets, "f1"),
        Evaluation.of(numbers),
    ):
        read = Evaluation.from_json(json.loads(json.dumps(found.to_json())))
        assert read.to_json() == found.to_json()
        assert read.rows.value() == found.value


def test_correct_rows_are_bits_from_the_highest_down():
    found = summarize(np.eye(2, dtype=np.float32)[[0, 1, 0] * 3], np.zeros(9, int), "accuracy")
    assert found.to_json()["rows"] == {"right": "b680", "count": 9}


class TestRunning:
    LABELS = ("cat", "dog", "a very much longer name")

    @pytest.fixture
    def rows(self):
        words = ["a", "b c", "long words everywhere", "d", "e f g h i j", "k"] * 5
        return Rows(
            ListTable("rows", Path(), {"text": words, "label": [0, 1, 2] * 10}),
            ("text",),
            "label",
            self.LABELS,
            "text",
        )

    @pytest.fixture
    def run(self, bert, rows):
        family = get_family("text-encoder")
        model = family.load(bert)
        head = family.build_head(model, bert, HeadSpec(labels=self.LABELS))
        return partial(evaluate, family, model, head, rows, family.preprocessor(bert))

    def test_rows_are_reported_in_their_own_order(self, rows, run):
        family, model, head, _, preprocess = run.args
        found = run(batch_size=7)
        single = []
        with torch.inference_mode():
            for index in range(len(rows)):
                best = family.logits(model, preprocess([rows[index]]), head).argmax(1).item()
                single.append(best == rows[index].label)
        assert right(found) == single

    def test_batches_and_runs_change_nothing(self, rows, run):
        found = [run(batch_size=size) for size in (1, 4, 30, 100, 4)]
        assert all(one.to_json() == found[0].to_json() for one in found)

    def test_progress_ends_with_all_rows(self, rows, run):
        seen = []
        run(batch_size=8, progress=lambda *p: seen.append(p))
        assert seen == [(8, 30), (16, 30), (24, 30), (30, 30)]

    def test_an_unknown_metric_is_an_error(self, rows, run):
        with pytest.raises(BadInput, match="unknown metric 'auc'"):
            run(metric="auc")

    def test_images_prepared_by_many_threads_keep_their_order(self, clip):
        family = get_family("clip")
        model = family.load(clip)
        head = family.build_head(model, clip, HeadSpec(labels=("a", "b", "c")))
        images = [png(seed, (16 + seed % 5, 17)) for seed in range(40)]
        table = ListTable("rows", Path(), {"image": images, "label": [0, 1, 2, 0] * 10})
        rows = Rows(table, ("image",), "label", ("a", "b", "c"), "image")
        preprocess = family.preprocessor(clip)
        found = evaluate(family, model, head, rows, preprocess, batch_size=3)
        whole = evaluate(family, model, head, rows, preprocess, batch_size=40)
        assert found.to_json() == whole.to_json()

    def test_a_broken_image_ends_the_evaluation_with_its_row(self, clip):
        family = get_family("clip")
        model = family.load(clip)
        head = family.build_head(model, clip, HeadSpec(labels=("a", "b")))
        images = [*(png(seed) for seed in range(20)), b"broken"]
        table = ListTable("rows", Path(), {"image": images, "label": [0] * 21})
        rows = Rows(table, ("image",), "label", ("a", "b"), "image")
        with pytest.raises(BadInput, match="rows row 20"):
            evaluate(family, model, head, rows, family.preprocessor(clip), batch_size=4)
