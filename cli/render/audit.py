"""The look of the answers to an auditor, and of people's decisions."""

from rich.console import Console

from restitch.cli.render.formats import (
    Values,
    number,
    numbered,
    percent,
    size,
    table_of,
    text,
    with_interval,
    write,
)
from restitch.cli.render.lines import of_specialists, remerged, results


def history(result: Values, out: Console) -> None:
    """The audit trail."""
    table = table_of("no", "time", "act", "by", "champion", "why")
    for act in result["acts"]:
        table.add_row(
            str(act["sequence"]),
            _time(act["time"]),
            act["kind"],
            act["actor"],
            text(act["champion"]),
            act["reason"],
        )
    out.print(table)
    if not result["acts"]:
        write(out, "no acts")


def versions(result: Values, out: Console) -> None:
    """All merged versions of a line."""
    table = table_of("version", "mean", "normalized", "retention", "made", "by", "members")
    for version in result["versions"]:
        made_by = version["made_by"] if isinstance(version["made_by"], dict) else {}
        role = version["role"] or ("" if version["passed"] else "failed")
        table.add_row(
            f"{version['version']} {role}".rstrip(),
            number(version["mean_accuracy"]),
            number(version["mean_normalized"]),
            number(version["retention"])
            + _ends(version["retention_interval"], "({low:.2f}-{high:.2f})"),
            version["created_at"][:16].replace("T", " "),
            str(made_by.get("actor", "")),
            numbered(version["members"]),
        )
    out.print(table)
    for version in result["versions"]:
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
    table = table_of("member", "version", "weights", "mask", "source")
    for task, member in used["members"].items():
        table.add_row(
            task,
            str(member["version"]),
            member["weights"][:12],
            member["mask"][:12],
            member["uri"],
        )
    out.print(table)


def show(result: Values, out: Console) -> None:
    """One merged version."""
    role = f" ({result['role']})" if result["role"] else ""
    made_by = result["made_by"] if isinstance(result["made_by"], dict) else {}
    by = "".join(f" {word} {made_by[key]}" for word, key in _MAKERS if key in made_by)
    made = f"made {result['created_at'][:19]} UTC{by}"
    write(out, f"{result['line']} version {result['version']}{role}, {made}")
    results(result, out)
    _intervals(result["results"], out)
    for gate in result["gates"]:
        mark = "passed" if gate["passed"] else "failed" if gate["action"] == "block" else "warned"
        write(out, f"  {mark}: {gate['note'] or gate['gate']}{_ends(gate['interval'])}")
    method = result["recipe"]["method"]
    write(out, f"  method {method['name']} {method['version']} {method['settings']}")
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
    table = table_of(
        *("member", "version", "density", "delta", "seconds"),
        *(["statistics", "seconds"] if weighed else []),
        *("weights", "mask", "source"),
    )
    for task, member in result.items():
        facts = member["facts"]
        statistics = (
            size(facts.get("statistics_bytes")),
            number(facts.get("statistics_seconds")),
        )
        table.add_row(
            task,
            str(member["version"]),
            percent(facts.get("density")),
            size(facts.get("delta_bytes")),
            number(facts.get("seconds")),
            *(statistics if weighed else ()),
            member["weights"][:12],
            member["mask"][:12],
            member["uri"],
        )
    out.print(table)


def _selection(result: Values, out: Console) -> None:
    """The methods that competed for the version, the best first, by their last round."""
    rows = result["rounds"][-1]["rows"]
    write(
        out, f"  chosen by {', '.join(f'{count} rows of {task}' for task, count in rows.items())}:"
    )
    table = table_of(
        "contestant", "score", "mean", "retention", "round", *result["entrants"][0]["tasks"]
    )
    for one in result["entrants"]:
        table.add_row(
            one["label"],
            number(one["score"]),
            number(one["mean"]),
            number(one["retention"]) + ("" if one["meets"] else " (too low)"),
            f"{one['round']} of {len(result['rounds'])}",
            *(number(value) for value in one["tasks"].values()),
        )
    out.print(table)
    if waiting := result.get("waiting"):
        write(out, f"  {len(waiting)} did not take part: {', '.join(o['name'] for o in waiting)}")
    if result["reported"]:
        tasks = ", ".join(result["reported"])
        write(out, f"  {tasks}: the results are from the rows that chose the method")


_MAKERS = (("by", "actor"), ("on", "host"), ("as", "worker"))


def reported(result: Values, out: Console) -> None:
    """The report that was written."""
    pages = len(result["files"]) - 1
    plots = f" with {pages} plots" if pages else ""
    write(
        out,
        f"{result['line']} version {result['version']}: "
        f"{result['out']}/{result['files'][0]}{plots}",
    )


def diff(result: Values, out: Console) -> None:
    """The differences of two versions."""
    write(out, f"{result['line']}: version {result['b']} compared with version {result['a']}")
    for word, names in result["members"].items():
        for task, model in names.items():
            write(out, f"  {word}: {task} {_arrow(model)}")
    for path, old, new in result["settings"]:
        write(out, f"  {path}: {text(old)} -> {text(new)}")
    rows = result["results"] + ([result["retention"]] if result["retention"] else [])
    a, b = str(result["a"]), str(result["b"])
    table = table_of("task", a, b, "difference", "95 %", "p", "verdict")
    for row in rows:
        table.add_row(
            row["task"],
            number(row["a"]),
            number(row["b"]),
            "-" if row["difference"] is None else f"{row['difference']:+.3f}",
            _ends(row["interval"], "{low:+.3f} to {high:+.3f}").strip(),
            "-" if row["p_value"] is None else f"{row['p_value']:.2g}",
            row["verdict"],
        )
    out.print(table)
    weights = result["weights"]
    write(
        out, f"  {weights['differ']:,} weights differ, of {weights['of']:,} in the tensors touched"
    )
    for kind in ("layer", "component"):
        counts = weights[f"by_{kind}"].items()
        if counts:
            write(out, f"  by {kind}: " + ", ".join(f"{name} {n:,}" for name, n in counts))


def why(result: Values, out: Console) -> None:
    """The accuracy of a task over the versions."""
    write(out, f"{result['line']}: {result['task']} over the merged versions")
    table = table_of("version", "made", "model", "merged", "95 %", "change", "p")
    for step in result["versions"]:
        change = "-" if step["change"] is None else f"{step['change']:+.3f}"
        table.add_row(
            f"{step['version']} {step['role'] or ('' if step['passed'] else 'failed')}".rstrip(),
            _time(step["at"]),
            text(step["model"]),
            number(step["merged"]),
            _ends(step["interval"], "{low:.3f}-{high:.3f}").strip(),
            f"{change} *" if step["significant"] else change,
            "-" if step["p_value"] is None else f"{step['p_value']:.2g}",
        )
    out.print(table)
    before = None
    for step in result["versions"]:
        if step["significant"] or step["model"] != before:
            changed = _changes(step["members"]) + ("; another method" if step["settings"] else "")
            write(out, f"  version {step['version']}: {changed}")
        before = step["model"]
    write(out, "  * significant on the same rows (McNemar's mid-p test, 5 %)")


def verified(result: Values, out: Console) -> None:
    """The findings about one line."""
    rebuilt, versions = len(result["rebuilt"]), len(result["versions"])
    write(out, f"{result['line']}: {'intact' if result['intact'] else 'DAMAGED'}")
    acts, objects = result["acts"], result["objects"]
    write(out, f"  {acts} acts in an unbroken chain, {objects} objects compared")
    write(
        out, f"  {rebuilt} of {versions} merged versions rebuilt from their recipes, byte for byte"
    )
    if result["mlflow"]:
        write(out, "  every act in MLflow is in the trail")
    for finding in result["findings"]:
        mark = "DAMAGE" if finding["kind"] == "damage" else "note"
        style = "red" if finding["kind"] == "damage" else "yellow"
        write(out, f"  {mark}: {finding['subject']}: {finding['text']}", style)
    claim = result["claim"]
    if claim is not None:
        for digest, use in claim["digests"].items():
            write(out, f"  {digest} is {use}")
        if claim["present_in"]:
            write(out, f"  it is in version {_list(claim['present_in'])}", "red")
        if claim["absent_from"]:
            absent = _list(claim["absent_from"])
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
        write(out, f"  MLflow compared with the lines {', '.join(store['mlflow'])}")
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
        write(out, f"    --repair can make it again from {one['remedy']}")


def decided(result: Values, out: Console) -> None:
    """A decision and its effects."""
    if not result["done"]:
        write(out, f"{result['line']}: nothing to do, this was decided before")
    else:
        write(out, f"{result['line']}: {result['act']}: {result['reason']}")
        used = "no version" if result["champion"] is None else f"version {result['champion']}"
        write(out, f"  {used} is in use{', pinned' if result['pinned'] else ''}")
    for note in result["notes"]:
        write(out, f"  {note}", "yellow")
    if result["handed_over"]:
        write(out, "  the workers merge; follow them with `restitch status --watch`")
    if result["merged"] is not None:
        remerged(result["merged"], out)


def _intervals(measured: Values, out: Console) -> None:
    """The other 95 % intervals; the results have those of the merged values."""
    names = ("base", "finetuned", "grafted")
    table = table_of("95 % of", *names)
    for task, result in measured.items():
        ends = (_ends(result["intervals"].get(name), "{low:.3f}-{high:.3f}") for name in names)
        table.add_row(task, *(end.strip() or "-" for end in ends))
    if any(result["intervals"] for result in measured.values()):
        out.print(table)


def _changes(members: Values) -> str:
    parts = []
    for word, names in members.items():
        shown = [f"{task} {_arrow(model)}" for task, model in names.items()]
        if shown:
            parts.append(f"{word} {', '.join(shown)}")
    return "; ".join(parts)


def _arrow(model: int | list[int]) -> str:
    return " -> ".join(map(str, model)) if isinstance(model, list) else str(model)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _ends(interval: Values | None, form: str = "({low:.3f} to {high:.3f})") -> str:
    return "" if interval is None else " " + form.format(**interval)


def _time(iso: str) -> str:
    return iso[:19].replace("T", " ")
