"""Markdown tables of the measurements of `benchmarks.localizers`.

Several seeds are shown as their mean with half of its 95 % interval (Student's t).
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Student's 0.975 quantile for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def tables(work: Path) -> str:
    """All tables whose measurements are in a work folder."""
    texts = []
    for part, table in _TABLES.items():
        path = work / f"{part}.json"
        if path.exists():
            texts.append(table(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(texts)


def mean_text(values: Sequence[float]) -> str:
    """The mean of some seeds, with half of its interval if there are several."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = _T[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def frontier(values: Mapping[str, Any]) -> str:
    """Grafted accuracy by task, localizer and density, and its share of the finetuned model's."""
    finetuned: dict[str, float] = {}
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for key, value in values.items():
        task, mode, *rest = key.split(" | ")
        if mode == "finetuned":
            finetuned[task] = value
        elif rest[0] == "seconds":
            seconds[mode].append(value)
        else:
            found[task, mode, float(rest[0])].append(value)
    densities = sorted({density for *_, density in found})
    modes = list(dict.fromkeys(mode for _, mode, _ in found))
    rows = []
    for task in sorted(finetuned):
        for mode in modes:
            cells = [found.get((task, mode, density)) for density in densities]
            shown = ["" if cell is None else mean_text(cell) for cell in cells]
            rows.append([task, f"{finetuned[task]:.3f}", mode, *shown])
    for mode in modes:
        shares = []
        for density in densities:
            known = [
                fmean(found[task, mode, density]) / whole
                for task, whole in finetuned.items()
                if (task, mode, density) in found
            ]
            shares.append(f"{fmean(known):.3f}" if len(known) == len(finetuned) else "")
        rows.append(["**share of finetuned**", "1", mode, *shares])
    cost = ", ".join(f"{mode} {fmean(known):.0f} s" for mode, known in seconds.items())
    names = [f"{100 * density:g}%" for density in densities]
    return table(["task", "finetuned", "localizer", *names], rows) + f"\n\nOne ranking: {cost}."


def official(values: Mapping[str, Any]) -> str:
    """The authors' code and ours at its density, with the time of each."""
    rows = []
    for task in sorted({key.split(" | ")[0] for key in values}):
        theirs = values[f"{task} | official"]
        for mode in ("official", "distilled", "fisher", "dataless"):
            one = values.get(f"{task} | {mode}")
            if one is not None:
                share = one["seconds"] / theirs["seconds"]
                cells = [f"{one['grafted']:.3f}", f"{one['seconds']:.1f}", f"{share:.2f}"]
                rows.append([task, f"{theirs['kept']:,}", mode, *cells])
    return table(["task", "kept", "localizer", "grafted", "seconds", "of official's"], rows)


def overhead(values: Mapping[str, Any]) -> str:
    """Processor time over that of the passes alone, for each run."""
    ratios: dict[str, list[str]] = defaultdict(list)
    for key, value in values.items():
        ratios[key.split(" | ")[0]].append(f"{value:.2f}")
    return table(["localizer", "over the passes"], [[m, ", ".join(v)] for m, v in ratios.items()])


def merged(values: Mapping[str, Any]) -> str:
    """Normalized accuracy by mask, density and rule, averaged over tasks."""
    found: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    for key, value in values.items():
        parts = key.split(" | ")
        if len(parts) == 6:
            split, mode, density, rule, seed, _ = parts
            found.setdefault((split, mode, density, rule), {}).setdefault(seed, []).append(value)
    rules = list(dict.fromkeys(rule for *_, rule in found))
    rows = []
    for split, mode, density in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((split, mode, density, rule), {}) for rule in rules]
        shown = [
            mean_text([fmean(tasks) for tasks in cell.values()]) if cell else "" for cell in cells
        ]
        rows.append([split, mode, f"{float(density):.0%}", *shown])
    return table(["rows", "masks", "density", *rules], rows)


def storage(values: Mapping[str, Any]) -> str:
    """Bytes per kept weight."""
    names = ("delta", "with_factors", "int8", "csr", "bitmap", "delta_zstd", "masked_zstd")
    rows = [
        [f"{float(key):.1%}", *(f"{one[name]:.2f}" for name in names)]
        for key, one in values.items()
    ]
    shown = ["delta", "with factors", "in 8 bits", "CSR", "bitmap", "delta, zstd", "masked, zstd"]
    return table(["density", *shown], rows)


def int8(values: Mapping[str, Any]) -> str:
    """The effect of values in 8 bits: the mean over tasks, and the largest change of a task."""
    found: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for key, value in values.items():
        density, kind, task, measure = key.split(" | ")
        found[density, kind, measure][task] = value
    rows = []
    for density, kind, _ in dict.fromkeys((d, k, "") for d, k, _ in found):
        cells = []
        for measure in ("grafted", "merged"):
            tasks, exact = found[density, kind, measure], found[density, "exact", measure]
            most = max(abs(tasks[task] - exact[task]) for task in tasks)
            cells += [f"{fmean(tasks.values()):.4f}", f"{most:.3f}"]
        size = fmean(found[density, kind, "bytes"].values())
        rows.append([f"{float(density):.0%}", kind, f"{size:.2f}", *cells])
    change = "largest change"
    return table(["density", "values", "bytes", "grafted", change, "merged", change], rows)


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "frontier": frontier,
    "official": official,
    "overhead": overhead,
    "merged": merged,
    "storage": storage,
    "int8": int8,
}
