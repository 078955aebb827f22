"""The look of models: registered, evaluated, exported, followed."""

from collections.abc import Sequence

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    accounted,
    number,
    percent,
    recovered,
    show_table,
    size,
    write,
)
from restitch.cli.render.lines import paused, remerged, results
from restitch.flows.promotion.lost_skill import needed_tensors
from restitch.registry.ledger.finetuned_models import ModelFacts
from restitch.registry.ledger.measurements import (
    Gain,
    ResultRef,
    compared,
    keeps_subspace,
    unexpected,
)
from restitch.registry.ledger.records import MergedRecord


def registered(result: Values, out: Console) -> None:
    """A registered model: its state, its mask, and the merge that took it in."""
    already = "already " if result["already"] else ""
    write(out, f"{result['task']}: {already}version {result['version']}, {result['state']}")
    held = {} if result["merged"] is None else result["merged"]["held"]
    printed = []
    if result["reason"] and f"{result['task']} {result['version']}" not in held:
        write(out, f"  {result['reason']}", "yellow")
        printed.append(result["reason"])
    record = result["record"] or {"results": {}}
    printed += record["results"].get(result["task"], {"notes": ()})["notes"]
    _facts(result["facts"], printed, out)
    if result["merged"] is not None:
        remerged(result["merged"], out)
    elif result["paused"] is not None:
        write(out, f"  {paused(result['line'], result['paused'])}", "yellow")
        write(out, f"  it is merged after `restitch resume {result['line']}`")
    elif result["record"] is not None:
        write(out, f"{result['line']}: version {result['champion']} is the champion")
        for loss in MergedRecord.model_validate(result["record"]).losses:
            write(out, f"  {loss}", "yellow")
        results(result["record"], out)
    elif result["handed_over"] and result["state"] in ("registered", "ready"):
        write(out, "  the workers continue; follow them with `restitch status --watch`")


def evaluated(result: Values, out: Console) -> None:
    """The present results of a version."""
    write(out, f"{result['line']} version {result['version']}")
    results(result, out)


def exported(result: Values, out: Console) -> None:
    """The folder that was written."""
    whose, task = "", result["task"]
    if task is not None:
        whose = (
            f", the specialist for {task}," if result["specialist"] else f" with the head of {task}"
        )
    place = " and ".join(each for each in (result["out"], result["commit"]) if each)
    write(out, f"{result['line']} version {result['version']}{whose} is in {place}")
    write(out, f"  {len(result['files'])} files, {size(result['bytes'])}")


def followed(result: Values, out: Console) -> None:
    """A folder that follows a line, after one look."""
    version, previous, taken = result["version"], result["previous"], len(result["taken"])
    was = "" if previous in (None, version) else f", before it version {previous}"
    made = result["created_at"][:16].replace("T", " ")
    write(out, f"{result['current']}: {result['line']} version {version}, merged {made} UTC{was}")
    if result["action"] == "unchanged":
        write(out, "  nothing changed")
    elif result["action"] == "switched":
        write(out, "  its folder was still there")
    else:
        write(
            out,
            f"  read a patch of {size(result['patch_bytes'])} and wrote {len(result['written'])} "
            f"files, {size(result['bytes_written'])}, in {result['seconds']:.1f} s"
            + (f"; {taken} of the version before it are unchanged" if taken else ""),
        )
    if result["command"]:
        write(out, "  the command ran")


def merged_once(result: Values, out: Console) -> None:
    """A merge without a line."""
    models = result["models"]
    what = f"{len(models)} models by {result['method']}"
    if result["out"] is None:
        write(out, f"would merge {what}: nothing was written")
    else:
        write(out, f"merged {what} into {result['out']}")
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    kept = ", ".join(f"{key} {value}" for key, value in result["localize"].items())
    write(out, f"  {result['family']}, {result['tensors']} tensors; {settings}; kept: {kept}")
    read, written = size(result["read"]), size(result["written"])
    write(out, f"  reads {read} and writes {written} in {_written_type(result)}")
    rows = [
        (task, each["source"], each["weights"][:12], percent(each["outside_share"]))
        for task, each in models.items()
    ]
    show_table(out, ("task", "model", "weights", "outside"), rows)


def _written_type(result: Values) -> str:
    dtype, before = result["dtype"], result["base_dtype"]
    return str(dtype) if dtype == before else f"{dtype} (the base has {before})"


def exported_adapter(result: Values, out: Console) -> None:
    """The adapter that was written, and what it loses."""
    place = " and ".join(each for each in (result["out"], result["commit"]) if each)
    write(out, f"{result['line']} version {result['version']} as an adapter: {place}")
    ranks = sorted(result["ranks"].values())
    spread = f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
    write(
        out,
        f"  {result['parameters']:,} parameters, {size(result['bytes'])}, ranks {spread} in "
        f"{len(ranks)} layers, {percent(result['kept'])} of the squared change",
    )
    if left_out := result["left_out"]:
        write(
            out,
            f"  left out: {len(left_out)} tensors that are no weights of linear layers, with "
            f"{percent(sum(left_out.values()))} of the squared change",
            "yellow",
        )
    rows = [(task, *_compared(each)) for task, each in result["results"].items()]
    if result["retention"] is not None:
        rows.append(("general benchmark", *_compared(result["retention"])))
    if rows:
        show_table(out, ("task", "metric", "merged", "adapter", "rows"), rows)


def _compared(each: Values) -> tuple[str, str, str, int]:
    return each["metric"], number(each["merged"]), number(each["adapter"]), each["count"]


def _facts(facts: Values, printed: Sequence[str], out: Console) -> None:
    """The facts of a model, without what was printed already."""
    if "localizer" not in facts:
        return
    _gain(facts, printed, out)
    statistics = ""
    if "statistics" in facts:
        statistics = f" {' and '.join(facts['statistics'])} {size(facts['statistics_bytes'])},"
    of = "numbers for" if keeps_subspace(facts["localizer"]) else "of"
    write(
        out,
        f"  {facts['localizer']}: {facts['kept']:,} {of} {facts['coordinates']:,} weights"
        f" ({percent(facts['density'])}), delta {size(facts['delta_bytes'])},{statistics}"
        f" {facts['outside_share']:.1%} of the change is outside of the localizable tensors",
    )
    recovered(facts, out)
    needed = needed_tensors(ModelFacts.model_validate(facts))
    if needed is not None and not any(needed in text for text in printed):
        write(out, f"  {needed}", "yellow")
    for line in accounted(facts):
        write(out, f"  {line}", "yellow")
    for check, one in facts.get("accepted", {}).items():
        write(out, f"  {check} accepted by {one['by']}: {one['reason']}")


def _gain(facts: Values, printed: Sequence[str], out: Console) -> None:
    """The comparison with the base, and with the value that the author measured."""
    if "gain" not in facts:
        write(out, "  gain over the base: not measured, because the task has no rows")
        return
    measured = {name: ResultRef.model_validate(one) for name, one in facts["results"].items()}
    gain = Gain.model_validate(facts["gain"])
    values, style = compared(gain, measured), None if gain.verdict == "better" else "yellow"
    if not any(values in text for text in printed):
        write(out, f"  {gain.against_base}: {values}", style)
    if contradiction := unexpected(facts.get("expected"), measured["finetuned"]):
        write(out, f"  {contradiction}", "yellow")
