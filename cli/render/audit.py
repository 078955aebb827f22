"""How the answers to an auditor look in a terminal, from the same values as `--json`."""

from typing import Any

from rich.console import Console

from restitch.cli.render.formats import number, percent, size, table_of, text, with_interval
from restitch.cli.render.lines import of_specialists, remerged, results

Values = dict[str, Any]


def history(found: Values, out: Console) -> None:
    """The audit trail."""
    table = table_of("no", "time", "act", "by", "champion", "why")
    for act in found["acts"]:
        table.add_row(
            str(act["sequence"]),
            _time(act["time"]),
            act["kind"],
            act["actor"],
            text(act["champion"]),
            act["reason"],
        )
    out.print(table)
    if not found["acts"]:
        out.print("no such act")


def versions(found: Values, out: Console) -> None:
    """The merged versions of a line."""
    table = table_of("version", "mean", "normalized", "retention", "made", "by", "members")
    for version in found["versions"]:
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
            ", ".join(f"{task} {n}" for task, n in version["members"].items()),
        )
    out.print(table)
    for version in found["versions"]:
        if version["specialists"] is not None:
            _say(out, f"  version {version['version']}: {of_specialists(version['specialists'])}")


def as_of(found: Values, out: Console) -> None:
    """What was in use at a time."""
    used = found["champion"]
    if used is None:
        _say(out, f"{found['line']} at {found['as_of']}: no version was in use")
        return
    _say(out, f"{found['line']} at {found['as_of']}: version {used['version']} was in use")
    _say(out, f"  {used['act']} by {used['by']} at {used['since']}: {used['why']}")
    kept = used["retention"]
    ratio = "-" if kept is None else with_interval(kept["ratio"], kept["ratio_interval"])
    _say(
        out,
        f"  normalized {number(used['mean_normalized'])}, retention {ratio}, "
        f"patch {used['patch'][:16]}{', pinned' if found['pinned'] else ''}",
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


def show(found: Values, out: Console) -> None:
    """One merged version."""
    role = f" ({found['role']})" if found["role"] else ""
    made_by = found["made_by"] if isinstance(found["made_by"], dict) else {}
    by = "".join(f" {word} {made_by[key]}" for word, key in _MAKERS if key in made_by)
    made = f"made {found['created_at'][:19]} UTC{by}"
    _say(out, f"{found['line']} version {found['version']}{role}, {made}")
    results(found, out)
    _intervals(found["results"], out)
    for gate in found["gates"]:
        mark = "passed" if gate["passed"] else "failed" if gate["action"] == "block" else "warned"
        _say(out, f"  {mark}: {gate['note'] or gate['gate']}{_ends(gate['interval'])}")
    method = found["recipe"]["method"]
    _say(out, f"  method {method['name']} {method['version']} {method['settings']}")
    if "tournament" in found["facts"]:
        _tournament(found["facts"]["tournament"], out)
    _members(found["members"], out)
    _say(
        out,
        f"  recipe {found['recipe_digest'][:16]}, patch {found['patch'][:16]}: "
        f"{found['kept']:,} weights, {size(found['patch_bytes'])}",
    )
    if found["specialists"] is not None:
        _say(out, f"  {of_specialists(found['specialists'])}")
    _say(out, "  seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in found["timings"].items()))
    _say(out, "  with " + ", ".join(f"{k} {v}" for k, v in found["software"].items()))
    for name in ("mlflow", "prefect"):
        if found["links"][name]:
            _say(out, f"  {name} {found['links'][name]}")


def _members(found: Values, out: Console) -> None:
    """The members of a version: what each adds, what finding it took, where it was read."""
    weighed = any("statistics_seconds" in member["facts"] for member in found.values())
    table = table_of(
        *("member", "version", "density", "delta", "seconds"),
        *(["statistics", "seconds"] if weighed else []),
        *("weights", "mask", "source"),
    )
    for task, member in found.items():
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


def _tournament(found: Values, out: Console) -> None:
    """Who competed for the version, the best first; values of the last rows that each was asked."""
    rows = found["rounds"][-1]["rows"]
    _say(out, f"  won by {', '.join(f'{count} rows of {task}' for task, count in rows.items())}:")
    table = table_of(
        "contestant", "score", "mean", "retention", "round", *found["contestants"][0]["tasks"]
    )
    for one in found["contestants"]:
        table.add_row(
            one["label"],
            number(one["score"]),
            number(one["mean"]),
            number(one["retention"]) + ("" if one["meets"] else " (too low)"),
            f"{one['round']} of {len(found['rounds'])}",
            *(number(value) for value in one["tasks"].values()),
        )
    out.print(table)
    if waiting := found.get("waiting"):
        _say(
            out, f"  {len(waiting)} waited for their turn: {', '.join(o['name'] for o in waiting)}"
        )
    if found["reported"]:
        _say(out, f"  {', '.join(found['reported'])}: results are reported on rows that decided")


_MAKERS = (("by", "actor"), ("on", "host"), ("as", "worker"))


def reported(found: Values, out: Console) -> None:
    """What was written."""
    pages = len(found["files"]) - 1
    plots = f" with {pages} plots" if pages else ""
    _say(
        out,
        f"{found['line']} version {found['version']}: {found['out']}/{found['files'][0]}{plots}",
    )


def diff(found: Values, out: Console) -> None:
    """What one version has otherwise than another."""
    _say(out, f"{found['line']}: version {found['b']} against version {found['a']}")
    for word, names in found["members"].items():
        for task, model in names.items():
            _say(out, f"  {word}: {task} {_arrow(model)}")
    for path, old, new in found["settings"]:
        _say(out, f"  {path}: {text(old)} -> {text(new)}")
    rows = found["results"] + ([found["retention"]] if found["retention"] else [])
    table = table_of("task", str(found["a"]), str(found["b"]), "difference", "95 %", "p", "verdict")
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
    weights = found["weights"]
    _say(
        out, f"  {weights['differ']:,} weights differ, of {weights['of']:,} in the tensors touched"
    )
    for kind in ("layer", "component"):
        counts = weights[f"by_{kind}"].items()
        if counts:
            _say(out, f"  by {kind}: " + ", ".join(f"{name} {n:,}" for name, n in counts))


def why(found: Values, out: Console) -> None:
    """How a task fared over the versions."""
    _say(out, f"{found['line']}: {found['task']} over the merged versions")
    table = table_of("version", "made", "model", "merged", "95 %", "change", "p")
    for step in found["versions"]:
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
    for step in found["versions"]:
        if step["significant"] or step["model"] != before:
            changed = _changes(step["members"]) + ("; another method" if step["settings"] else "")
            _say(out, f"  version {step['version']}: {changed}")
        before = step["model"]
    _say(out, "  * more than chance would make of the same rows (McNemar's mid-p test, 5 %)")


def verified(found: Values, out: Console) -> None:
    """What a verification found."""
    rebuilt, looked = len(found["rebuilt"]), len(found["versions"])
    _say(out, f"{found['line']}: {'intact' if found['intact'] else 'DAMAGED'}")
    _say(out, f"  {found['acts']} acts in an unbroken chain, {found['objects']} objects compared")
    _say(out, f"  {rebuilt} of {looked} merged versions rebuilt from their recipes, byte for byte")
    if found["mlflow"]:
        _say(out, "  every act that MLflow shows is in the trail")
    for finding in found["findings"]:
        mark = "DAMAGE" if finding["kind"] == "damage" else "note"
        style = "red" if finding["kind"] == "damage" else "yellow"
        _say(out, f"  {mark}: {finding['subject']}: {finding['text']}", style)
    claim = found["claim"]
    if claim is not None:
        for digest, what in claim["digests"].items():
            _say(out, f"  {digest} is {what}")
        if claim["present_in"]:
            _say(out, f"  it is in version {_list(claim['present_in'])}", "red")
        if claim["absent_from"]:
            said = f"  it is not in version {_list(claim['absent_from'])}: rebuilt without it"
            _say(out, said)


def all_verified(found: Values, out: Console) -> None:
    """What a verification of lines and of their store found."""
    for line in found["lines"]:
        verified(line, out)
    store = found["store"]
    if store is None:
        return
    _say(out, f"the store: {'intact' if store['intact'] else 'DAMAGED'}")
    _say(out, f"  {store['objects']} objects ({size(store['bytes'])})")
    _say(out, f"  {store['compared']} of them compared with the digests that they are stored under")
    if store["mlflow"]:
        _say(out, f"  MLflow compared with line {', '.join(store['mlflow'])}")
    for one in store["damaged"]:
        _damaged(one, out)
    if store["orphans"]:
        many, much = len(store["orphans"]), size(store["orphan_bytes"])
        _say(out, f"  nothing refers to {many} objects ({much}); `restitch gc` removes them")
    for note in store["notes"]:
        _say(out, f"  note: {note}", "yellow")


def _damaged(one: Values, out: Console) -> None:
    word, style = ("MENDED", "yellow") if one["mended"] else ("DAMAGE", "red")
    _say(out, f"  {word}: {one['object']}: {one['problem']}", style)
    for what in one["what"]:
        _say(out, f"    it is {what}")
    if one["depends"]:
        _say(out, f"    needed by {', '.join(one['depends'])}")
    if one["outcome"] is not None:
        _say(out, f"    {one['outcome']}")
    elif one["remedy"] is None:
        _say(out, "    it can only be restored from a backup")
    else:
        _say(out, f"    --repair can make it again from {one['remedy']}")


def decided(found: Values, out: Console) -> None:
    """What a decision did."""
    if not found["done"]:
        _say(out, f"{found['line']}: nothing to do, it was decided before")
    else:
        _say(out, f"{found['line']}: {found['act']}: {found['reason']}")
        used = "no version" if found["champion"] is None else f"version {found['champion']}"
        _say(out, f"  {used} is in use{', pinned' if found['pinned'] else ''}")
    for note in found["notes"]:
        _say(out, f"  {note}", "yellow")
    if found["handed_over"]:
        _say(out, "  the workers merge: `restitch status --watch` follows them")
    if found["merged"] is not None:
        remerged(found["merged"], out)


def _intervals(measured: Values, out: Console) -> None:
    """The 95 % intervals beside those of the merged values, which the results show."""
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


def _say(out: Console, line: str, style: str | None = None) -> None:
    out.print(line, style=style, markup=False, soft_wrap=True)
