"""The look of the answers to an auditor, and of people's decisions."""

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    accounted,
    number,
    numbered,
    percent,
    recovered,
    show_table,
    size,
    span,
    with_interval,
    write,
)
from restitch.cli.render.lines import of_specialists, paused, remerged, results
from restitch.merging.errors import counted
from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.measurements import density_word
from restitch.registry.specs.in_words import changed, setting


def history(result: Values, out: Console) -> None:
    """The audit trail."""
    rows = [
        (
            *(act["sequence"], _time(act["time"]), act["kind"], act["actor"]),
            *(act["champion"], act["reason"]),
        )
        for act in result["acts"]
    ]
    show_table(out, ("no", "time", "act", "by", "champion", "why"), rows)
    if not result["acts"]:
        write(out, "no acts")


def versions(result: Values, out: Console) -> None:
    """All merged versions of a line."""
    rows = [
        (
            *(_role(version), number(version["mean_accuracy"]), number(version["mean_normalized"])),
            number(version["retention"])
            + _ends(version["retention_interval"], "({low:.2f}-{high:.2f})"),
            _time(version["created_at"])[:16],
            _maker(version).get("actor", ""),
            numbered(version["members"]),
        )
        for version in result["versions"]
    ]
    columns = ("version", "mean", "normalized", "retention", "made", "by", "members")
    show_table(out, columns, rows)
    for version in result["versions"]:
        _removed(version, out)
        if version["specialists"] is not None:
            write(out, f"  version {version['version']}: {of_specialists(version['specialists'])}")


def as_of(result: Values, out: Console) -> None:
    """The version in use at a time, with its members."""
    used = result["champion"]
    if used is None:
        write(out, f"{result['line']} at {result['as_of']}: no version was in use")
        return
    write(out, f"{result['line']} at {result['as_of']}: version {used['version']} was in use")
    write(out, f"  {used['act']} by {used['by']} at {used['since']}: {used['why']}")
    kept = used["retention"]
    ratio = "-" if kept is None else with_interval(kept["ratio"], kept["ratio_interval"])
    write(
        out,
        f"  normalized {number(used['mean_normalized'])}, retention {ratio}, "
        f"patch {used['patch'][:16]}{', pinned' if result['pinned'] else ''}",
    )
    if result["paused"] is not None:
        write(out, f"  {paused(result['line'], result['paused'])}", "yellow")
    rows = [(task, member["version"], *_read(member)) for task, member in used["members"].items()]
    show_table(out, ("member", "version", *_READ), rows)


def show(result: Values, out: Console) -> None:
    """One merged version."""
    role = f" ({result['role']})" if result["role"] else ""
    maker = _maker(result)
    by = "".join(f" {word} {maker[key]}" for word, key in _MAKERS if key in maker)
    made = f"made {result['created_at'][:19]} UTC{by}"
    write(out, f"{result['line']} version {result['version']}{role}, {made}")
    _removed(result, out)
    results(result, out)
    _intervals(result["results"], out)
    for values in result["gates"]:
        gate = GateOutcome.model_validate(values)
        mark = gate.verdict if gate.passed or gate.blocks else "warned"
        write(out, f"  {mark}: {gate.note or gate.gate}{_ends(values['interval'])}")
    if not result["gates"]:
        write(out, "  no gates")
    for loss in result["losses"]:
        write(out, f"  {loss}", "yellow")
    method = result["recipe"]["method"]
    write(out, f"  method {method['name']} {method['version']}, {setting(method['settings'])}")
    if "tournament" in result["facts"]:
        _selection(result["facts"]["tournament"], out)
    _members(result["members"], out)
    write(
        out,
        f"  recipe {result['recipe_digest'][:16]}, patch {result['patch'][:16]}: "
        f"{result['kept']:,} weights, {size(result['patch_bytes'])}",
    )
    if result["specialists"] is not None:
        write(out, f"  {of_specialists(result['specialists'])}")
    write(out, "  seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in result["timings"].items()))
    write(out, "  with " + ", ".join(f"{k} {v}" for k, v in result["software"].items()))
    for name in ("mlflow", "prefect"):
        if result["links"][name]:
            write(out, f"  {name} {result['links'][name]}")


def _members(result: Values, out: Console) -> None:
    """The members of a version: their masks, the cost of finding them, and their sources."""
    weighed = any("statistics_seconds" in member["facts"] for member in result.values())
    localizers = (member["facts"].get("localizer") for member in result.values())
    keeps = density_word(next(localizers, None))
    columns = ["member", "version", keeps, "delta", "seconds"]
    columns += ["statistics", "seconds"] if weighed else []
    rows = []
    for task, member in result.items():
        facts = member["facts"]
        row = [task, member["version"], percent(facts.get("density"))]
        row += [size(facts.get("delta_bytes")), number(facts.get("seconds"))]
        if weighed:
            row += [size(facts.get("statistics_bytes")), number(facts.get("statistics_seconds"))]
        rows.append([*row, *_read(member)])
    show_table(out, (*columns, *_READ), rows)
    for task, member in result.items():
        recovered(member["facts"], out, f"{task}: ")
        for line in accounted(member["facts"]):
            write(out, f"  {task}: {line}")


def _selection(result: Values, out: Console) -> None:
    """The methods that competed for the version, the best first, by their last round."""
    rounds, contestants = result["rounds"], result["contestants"]
    counts = (f"{count} rows of {task}" for task, count in rounds[-1]["rows"].items())
    write(out, f"  chosen by {', '.join(counts)}:")
    rows = [
        (
            *(one["label"], number(one["score"]), number(one["mean"])),
            number(one["retention"]) + ("" if one["meets"] else " (too low)"),
            f"{one['round']} of {len(rounds)}",
            *(number(value) for value in one["tasks"].values()),
        )
        for one in contestants
    ]
    columns = ("contestant", "score", "mean", "retention", "round")
    show_table(out, (*columns, *contestants[0]["tasks"]), rows)
    if waiting := result.get("waiting"):
        write(out, f"  {len(waiting)} did not take part: {', '.join(o['name'] for o in waiting)}")
    if result["reported"]:
        tasks = ", ".join(result["reported"])
        write(out, f"  {tasks}: the results are from the rows that chose the method")


_MAKERS = (("by", "actor"), ("on", "host"), ("as", "worker"))
_READ = ("weights", "mask", "source")


def _read(member: Values) -> tuple[str, str, str]:
    return member["weights"][:12], member["mask"][:12], member["uri"]


def _maker(version: Values) -> Values:
    return version["made_by"] if isinstance(version["made_by"], dict) else {}


def _removed(version: Values, out: Console) -> None:
    """The removals that a version is affected by."""
    purge = version["purged"]
    if purge is not None:
        at = purge["time"][:16].replace("T", " ")
        text = f"purged by {purge['actor']} on {at} UTC: {purge['reason']}"
        write(out, f"  version {version['version']}: {text}", "yellow")
    elif version["forgotten"]:
        names = ", ".join(version["forgotten"])
        write(out, f"  version {version['version']} holds {names}, forgotten since", "yellow")


def _role(version: Values) -> str:
    role = version["role"] or ("" if version["passed"] else version["verdict"])
    return f"{version['version']} {role}".rstrip()


def reported(result: Values, out: Console) -> None:
    """The report that was written."""
    page, *plots = result["files"]
    more = f" with {len(plots)} plots" if plots else ""
    write(out, f"{result['line']} version {result['version']}: {result['out']}/{page}{more}")


def diff(result: Values, out: Console) -> None:
    """The differences of two versions."""
    write(out, f"{result['line']}: version {result['b']} compared with version {result['a']}")
    for word, names in result["members"].items():
        for task, model in names.items():
            write(out, f"  {word}: {task} {_arrow(model)}")
    for change in result["settings"]:
        for line in changed(*change):
            write(out, f"  {line}")
    rows = [
        (
            *(row["task"], number(row["a"]), number(row["b"]), number(row["difference"], "+.3f")),
            _ends(row["interval"], "{low:+.3f} to {high:+.3f}").strip(),
            *(number(row["p_value"], ".2g"), row["verdict"]),
        )
        for row in result["results"] + ([result["retention"]] if result["retention"] else [])
    ]
    a, b = str(result["a"]), str(result["b"])
    show_table(out, ("task", a, b, "difference", "95 %", "p", "verdict"), rows)
    weights = result["weights"]
    differ, touched = weights["differ"], weights["of"]
    write(out, f"  {differ:,} weights differ, of {touched:,} in the tensors touched")
    for kind in ("layer", "component"):
        if counts := weights[f"by_{kind}"]:
            write(out, f"  by {kind}: {'; '.join(f'{name}: {n:,}' for name, n in counts.items())}")


def why(result: Values, out: Console) -> None:
    """The accuracy of a task over the versions."""
    write(out, f"{result['line']}: {result['task']} over the merged versions")
    rows = [
        (
            *(_role(step), _time(step["at"]), step["model"], number(step["merged"])),
            span(step["interval"]),
            number(step["change"], "+.3f") + (" *" if step["significant"] else ""),
            number(step["p_value"], ".2g"),
        )
        for step in result["versions"]
    ]
    show_table(out, ("version", "made", "model", "merged", "95 %", "change", "p"), rows)
    before = None
    for step in result["versions"]:
        if step["significant"] or step["model"] != before:
            changes = _changes(step["members"]) + ("; another method" if step["settings"] else "")
            write(out, f"  version {step['version']}: {changes}")
        before = step["model"]
    write(out, "  * significant on the same rows (McNemar's mid-p test, 5 %)")


def verified(result: Values, out: Console) -> None:
    """The findings about one line."""
    write(out, f"{result['line']}: {'intact' if result['intact'] else 'DAMAGED'}")
    write(
        out, f"  {result['acts']} acts in an unbroken chain, {result['objects']} objects compared"
    )
    rebuilt = f"{len(result['rebuilt'])} of {len(result['versions'])} merged versions rebuilt"
    write(out, f"  {rebuilt} from their recipes, byte for byte")
    if result["purged"]:
        versions = counted(len(result["purged"]), "version")
        write(out, f"  the weights of {versions} were purged on purpose")
    if result["mlflow"]:
        write(out, "  every act in MLflow is in the trail")
    for finding in result["findings"]:
        mark, style = ("DAMAGE", "red") if finding["kind"] == "damage" else ("note", "yellow")
        write(out, f"  {mark}: {finding['subject']}: {finding['text']}", style)
    claim = result["claim"]
    if claim is not None:
        for digest, use in claim["digests"].items():
            write(out, f"  {digest} is {use}")
        if claim["present_in"]:
            write(out, f"  it is in version {setting(claim['present_in'])}", "red")
        if claim["absent_from"]:
            absent = setting(claim["absent_from"])
            write(out, f"  it is not in version {absent}: rebuilt without it")


def all_verified(result: Values, out: Console) -> None:
    """The findings about lines and about their store."""
    for line in result["lines"]:
        verified(line, out)
    store = result["store"]
    if store is None:
        return
    write(out, f"the store: {'intact' if store['intact'] else 'DAMAGED'}")
    write(out, f"  {store['objects']} objects ({size(store['bytes'])})")
    write(out, f"  {store['compared']} of them compared with their digests")
    if store["mlflow"]:
        names = ", ".join(store["mlflow"])
        weights = counted(store["mlflow_weights"], "version")
        write(out, f"  MLflow compared with the lines {names}, and the weights of {weights} there")
    for one in store["damaged"]:
        _damaged(one, out)
    if store["orphans"]:
        many, much = len(store["orphans"]), size(store["orphan_bytes"])
        write(out, f"  nothing refers to {many} objects ({much}); `restitch gc` removes them")
    for note in store["notes"]:
        write(out, f"  note: {note}", "yellow")


def _damaged(one: Values, out: Console) -> None:
    word, style = ("REPAIRED", "yellow") if one["mended"] else ("DAMAGE", "red")
    write(out, f"  {word}: {one['object']}: {one['problem']}", style)
    for use in one["what"]:
        write(out, f"    it is {use}")
    if one["depends"]:
        write(out, f"    needed by {', '.join(one['depends'])}")
    if one["outcome"] is not None:
        write(out, f"    {one['outcome']}")
    elif one["remedy"] is None:
        write(out, "    only a backup can restore it")
    else:
        write(out, f"    --repair would {one['remedy']}")


def decided(result: Values, out: Console) -> None:
    """A decision and its effects."""
    if not result["done"]:
        write(out, f"{result['line']}: nothing to do, this was decided before")
    else:
        write(out, f"{result['line']}: {result['act']}: {result['reason']}")
        used = "no version" if result["champion"] is None else f"version {result['champion']}"
        write(out, f"  {used} is in use{', pinned' if result['pinned'] else ''}")
    if result["paused"] is not None:
        write(out, f"  {paused(result['line'], result['paused'])}", "yellow")
    for note in result["notes"]:
        write(out, f"  {note}", "yellow")
    if result["handed_over"]:
        write(out, "  the workers merge; follow them with `restitch status --watch`")
    if result["merged"] is not None:
        remerged(result["merged"], out)


def _intervals(measured: Values, out: Console) -> None:
    """The other 95 % intervals; the results have those of the merged values."""
    if any(result["intervals"] for result in measured.values()):
        names = ("base", "finetuned", "grafted")
        rows = [
            (task, *(span(result["intervals"].get(name)) for name in names))
            for task, result in measured.items()
        ]
        show_table(out, ("95 % of", *names), rows)


def _changes(members: Values) -> str:
    parts = []
    for word, names in members.items():
        shown = [f"{task} {_arrow(model)}" for task, model in names.items()]
        if shown:
            parts.append(f"{word} {', '.join(shown)}")
    return "; ".join(parts)


def _arrow(model: int | list[int]) -> str:
    return " -> ".join(map(str, model)) if isinstance(model, list) else str(model)


def _ends(interval: Values | None, form: str = "({low:.3f} to {high:.3f})") -> str:
    return "" if interval is None else " " + form.format(**interval)


def _time(iso: str) -> str:
    return iso[:19].replace("T", " ")
