"""Plots of results: what is drawn on one scale."""

from restitch.tasks.report.plots import methods_plot, results_plot


def test_a_perplexity_is_not_drawn_on_the_scale_of_shares() -> None:
    results = {
        "dates": {"metric": "exact_match", "base": 0.1, "merged": 0.9},
        "texts": {"metric": "perplexity", "base": 40.0, "merged": 30.0},
    }
    plot = results_plot(results)
    assert plot is not None
    axes = plot.figure.axes[0]
    assert axes.get_xlabel() == "exact_match"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dates"]
    assert results_plot({"texts": results["texts"]}) is None


def test_a_method_without_a_retention_has_no_mark() -> None:
    """The base may have no right answer on the benchmark."""
    row = {"method": "ties", "mean_accuracy": 0.5, "retention": {"ratio": None}}
    assert methods_plot([row]) is None
    plot = methods_plot([row, {"method": "tsv-m", "mean_accuracy": 0.6, "retention": {"ratio": 1}}])
    assert plot is not None
    assert "tsv-m" in plot.description
    assert "ties" not in plot.description
