"""Repeat a published table: register its models, compare all methods, and put both side by side.

    paper file --> line --> register each model (one after another, without merges)
                        --> compare all methods --> accuracy against retention
                                                --> the table, with what was published

Every part is kept as soon as it is done. After an interruption the same command continues: models
in the line are not registered again, and what was measured is not measured again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restitch.flows.lines.init_line import init_line
from restitch.flows.register import register
from restitch.flows.research.compare import Comparison, MergedResult, SpecialistsResult, compare
from restitch.flows.research.paper_plan import registered_tasks
from restitch.flows.research.study_output import StudyOutcome, as_csv, publish_study
from restitch.merging.errors import BadInput, CannotJoin
from restitch.registry.ledger.finetuned_models import NO_GAIN
from restitch.registry.ledger.records import mean_of
from restitch.registry.specs.metric import METRICS, mean_share
from restitch.registry.specs.paper import BASE, FINETUNED, Paper, PublishedRow, load_paper
from restitch.tasks.runtime.console import say
from restitch.tasks.runtime.engine import flow


@dataclass(frozen=True, kw_only=True)
class PaperTable(StudyOutcome):
    """A published table, with the numbers of this study next to it.

    Attributes:
        rows: what was published on these models, and all methods of the study, in percent:
            `published` and `mean` over the tasks, `benchmark` and `retention` of the general
            benchmark. The `kind` is `merged`, `experts` (one model for each task) or `reference`.
        elsewhere: what was published on other models, by its source.
        notes: what a reader of the table has to know.
    """

    paper: str
    about: str
    sources: list[str]
    tuned: bool
    rows: list[dict[str, Any]]
    elsewhere: dict[str, list[dict[str, Any]]]
    notes: list[str]
    left_out: dict[str, list[str]]


@flow("study-paper", "{paper}")
def study_paper(
    paper: str,
    models: str | None = None,
    benchmark: str | None = None,
    retention: bool = True,
    methods: Sequence[str] = (),
    tuned: bool = False,
    out: str | None = None,
) -> PaperTable:
    """Make the study of a paper, or continue it.

    Args:
        paper: the name of a paper, or the path of a paper file.
        models: the models in place of those of the file; see `load_paper`.
        benchmark: a folder with the images of the general benchmark.
        retention: measure the general benchmark.
        methods: the methods to compare; all by default.
        tuned: choose each method's tunable setting on validation rows.
        out: a folder for the tables and the plot.

    Raises:
        BadInput: the paper file, a model or a data set cannot be used.
        CannotJoin: models cannot join the line; the message names all of them.
    """
    place = None if benchmark is None else Path(benchmark)
    chosen = load_paper(paper, models=models, benchmark=place, retention=retention)
    init_line(chosen.line)
    _register_all(chosen)
    line = chosen.name
    comparison = compare(line, methods, tuned, out, chosen.settings)
    outcome = PaperTable(
        line=line,
        members=comparison.members,
        paper=chosen.name,
        about=chosen.spec.about,
        sources=[table.source for table in chosen.spec.published if table.same_models],
        tuned=tuned,
        rows=list(_rows(chosen, comparison)),
        elsewhere={
            table.source: [{"name": row.name, "published": row.mean} for row in table.rows]
            for table in chosen.spec.published
            if not table.same_models
        },
        notes=list(chosen.spec.notes),
        left_out=comparison.left_out,
    )
    publish_study(
        outcome,
        f"the table of {chosen.name}",
        out,
        name="paper",
        params={"paper": chosen.name, "members": outcome.members, "tuned": tuned},
        metrics={
            f"mean/{row['method']}": row["mean"]
            for row in outcome.rows
            if row["method"] and row["mean"] is not None
        },
        artifacts={
            "paper.csv": as_csv(outcome.rows).encode(),
            "paper.md": _markdown(outcome),
        },
    )
    return outcome


def _register_all(paper: Paper) -> None:
    """Register the models that are not in the line yet.

    A finetuned model without a gain joins as well, because the published table has it.

    Raises:
        CannotJoin: some cannot join; the others stay registered.
    """
    line, done = paper.name, registered_tasks(paper)
    refused: dict[str, str] = {}
    for number, (name, spec) in enumerate(paper.tasks.items(), 1):
        if name in done:
            say(f"{line}: {name} is registered ({number} of {len(paper.tasks)})")
            continue
        say(f"{line}: registering {name} ({number} of {len(paper.tasks)})")
        try:
            outcome = register(
                line,
                spec,
                paper.models[name],
                merge=False,
                replace_task=True,
                here=True,
                accepted={NO_GAIN: f"the table of {paper.name} has this model"},
            )
        except BadInput as error:
            refused[name] = error.message()
            continue
        if outcome.onboarded.state != "ready":
            refused[name] = outcome.onboarded.reason or outcome.onboarded.state
    if refused:
        raise CannotJoin(
            f"{len(refused)} of {len(paper.tasks)} models of {paper.name} cannot join",
            expected="models and data sets as the paper file describes them",
            details=[f"{name}: {reason}" for name, reason in refused.items()],
            hint="correct a copy of the paper file or of its task files, and run `restitch study"
            " paper ./COPY.yaml`; the models that joined are not registered again",
        )


def _rows(paper: Paper, comparison: Comparison) -> Iterator[dict[str, Any]]:
    """What was published on these models next to our numbers, then our other methods."""
    ours = {name: _reference(comparison, name) for name in (BASE, FINETUNED)}
    ours |= {one.method: _measured(one) for one in comparison.methods}
    ours |= {one.method: _measured(one) for one in comparison.experts}
    for row in paper.comparable:
        yield {"name": row.name, **_published(row), **_of(row.method, ours)}
    named = {row.method for row in paper.comparable}
    for method, values in ours.items():
        if method not in named:
            yield {"name": method, **_published(None), "method": method, **values}


_OURS = ("kind", "mean", "normalized", "benchmark", "retention", "settings")


def _published(row: PublishedRow | None) -> dict[str, Any]:
    return {
        "published": None if row is None else row.mean,
        "published_benchmark": None if row is None else row.benchmark,
    }


def _of(method: str | None, ours: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Our numbers for a published row; none for a method that we lack or left out."""
    return {"method": method, **ours.get(method or "", dict.fromkeys(_OURS))}


def _measured(one: MergedResult | SpecialistsResult) -> dict[str, Any]:
    """The numbers of a method, in percent as in papers."""
    retention = (one.retention if isinstance(one, MergedResult) else None) or {}
    return {
        "kind": "merged" if isinstance(one, MergedResult) else "experts",
        "mean": _percent(one.mean_accuracy),
        "normalized": _percent(one.mean_normalized),
        "benchmark": _percent(retention.get("value")),
        "retention": _percent(retention.get("ratio")),
        "settings": ", ".join(f"{key} {value}" for key, value in one.settings.items()),
    }


def _reference(comparison: Comparison, name: str) -> dict[str, Any]:
    """The numbers of the base, or of the finetuned models."""
    results = list((*comparison.methods, *comparison.experts)[0].results.values())
    ratios = (
        METRICS[one["metric"]].ratio(one[name], one["finetuned"])
        for one in results
        if one[name] is not None and one["finetuned"] is not None
    )
    measured = next((one.retention for one in comparison.methods if one.retention), None)
    of_base = measured if name == BASE else None
    return {
        "kind": "reference",
        "mean": _percent(mean_share((one["metric"], one[name]) for one in results)),
        "normalized": _percent(mean_of(ratios)),
        "benchmark": None if of_base is None else _percent(of_base["base"]),
        "retention": None if of_base is None else 100.0,
        "settings": None,
    }


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _markdown(outcome: PaperTable) -> bytes:
    """The table as Markdown."""
    lines = [f"# {outcome.paper}: {outcome.about}", ""]
    lines += [f"Published: {source}." for source in outcome.sources]
    heads = ("", "published", "here", "normalized", "benchmark", "retention", "settings here")
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in outcome.rows:
        numbers = (_cell(row[key]) for key in ("published", *_OURS[1:-1]))
        name = row["name"] + (" (one model per task)" if row["kind"] == "experts" else "")
        lines.append(f"| {name} | {' | '.join(numbers)} | {row['settings'] or ''} |")
    for source, rows in outcome.elsewhere.items():
        lines += ["", f"Published elsewhere, not to be compared with the rows above: {source}.", ""]
        lines += ["| | published |", "| --- | --- |"]
        lines += [f"| {row['name']} | {_cell(row['published'])} |" for row in rows]
    lines += ["", *outcome.notes]
    return ("\n".join(lines).rstrip() + "\n").encode()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
