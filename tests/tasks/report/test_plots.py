"""Plots of results: what is drawn on one scale."""

from restitch.tasks.report.plots import results_plot


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
