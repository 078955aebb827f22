"""Invented JSON of a line with a long history, as input for the report."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from restitch.registry.gates.gate import GateOutcome
from restitch.registry.ledger.records import (
    DataUsed,
    MergedMember,
    MergedRecord,
    Retention,
    TaskResult,
)
from restitch.registry.record import Interval
from restitch.tasks.report import ReportInput
from tests.registry.builders import digest

TASKS = (
    *("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"),
    *("cifar100", "stl10", "flowers102", "oxford-iiit-pet"),
)
HOSTILE = (
    "<script>alert('task')</script>",
    "$x^2$ & \"quotes\" 'and' {{ 7 * 7 }} {% raw %}",
    "a_very_long_name_that_goes_on_" * 4,
    "]]> --> </svg></title><b>bold</b>",
    "línea 漢字\twith\na break",
)
COMPONENTS = ("layer norm", "attention", "mlp", "bias")
LAYERS = 12


def task_names(count: int) -> tuple[str, ...]:
    return tuple(sorted((*TASKS, *(f"task{i:02d}" for i in range(100)))[:count]))


def interval(value: float, half: float) -> Interval:
    return Interval(low=value - half, high=min(value + half, 1.0))


def result(draw: random.Random, *, measured: bool = True) -> TaskResult:
    if not measured:
        return TaskResult(notes=("no data: not evaluated",))
    base = draw.uniform(0.25, 0.6)
    values = {
        "base": base,
        "finetuned": draw.uniform(0.88, 0.995),
        "grafted": draw.uniform(0.84, 0.95),
        "merged": draw.uniform(0.66, 0.9),
    }
    return TaskResult(
        split="test",
        **values,
        normalized=values["merged"] / values["finetuned"],
        interval=interval(values["merged"], 0.019),
        intervals={n: interval(v, 0.02) for n, v in values.items() if n != "merged"},
        count=draw.randint(1000, 9000),
        evaluations={name: digest(f"{name} {base}") for name in values},
        data=DataUsed(path="/data/some/where", split="test", digest=digest("rows")),
        notes=("the validation rows are a part of train: the model may have seen them",),
    )


def retention(ratio: float) -> Retention:
    return Retention(
        task="imagenet",
        value=ratio * 0.633,
        more={"top5": ratio * 0.888},
        base=0.633,
        base_more={"top5": 0.888},
        ratio=ratio,
        interval=interval(ratio * 0.633, 0.006),
        base_interval=interval(0.633, 0.006),
        ratio_interval=interval(ratio, 0.0112),
        count=10000,
        evaluations={"base": digest("base"), "merged": digest("merged")},
        data=DataUsed(path="/data/imagenet", split="validation", digest=digest("imagenet")),
    )


def gates(task: str | None) -> tuple[GateOutcome, ...]:
    kept = GateOutcome(
        gate="min_retention",
        limit=0.95,
        value=0.9712,
        interval=interval(0.9712, 0.0112),
        passed=True,
        note="retention 0.9712 is at least 0.95",
    )
    drop = GateOutcome(
        gate="max_task_drop",
        limit=0.02,
        value=0.031,
        passed=False,
        action="warn",
        task=task,
        note="the drop of 0.0310 is more than 0.02",
    )
    size = GateOutcome(gate="max_patch_bytes", limit=5e7, value=31457280.0, passed=True)
    return (kept, size) if task is None else (kept, drop, size)


def tournament(tasks: Sequence[str]) -> dict[str, Any]:
    """A tournament whose second contestant was eliminated after the first round."""
    contestants = [
        {
            "label": label,
            "score": score,
            "mean": score,
            "retention": None if score < 0.8 else 0.95,
            "meets": score > 0.8,
            "round": number,
            "tasks": dict.fromkeys(tasks, score),
        }
        for label, score, number in (("ties (alpha 0.5)", 0.875, 2), ("averaging", 0.625, 1))
    ]
    return {
        "winner": "ties (alpha 0.5)",
        "contestants": contestants,
        "waiting": [{"label": "wudi", "name": "wudi", "settings": {}}],
        "rounds": [{"share": 0.5, "contestants": 2, "rows": dict.fromkeys(tasks, 250)}] * 2,
        "reported": [tasks[0]],
    }


def record(tasks: Sequence[str], version: int, **changes: Any) -> MergedRecord:
    draw = random.Random(version)
    members = {
        task: MergedMember(
            version=draw.randint(1, 3),
            uri=f"models/{task}" if i % 2 else f"someone/clip-vit-base-patch32_{task}@{'a' * 40}",
            weights=digest(task),
            config=digest(f"config {task}"),
            mask=digest(f"mask {task}"),
            delta=digest(f"delta {task}"),
            facts={
                "localizer": "dataless/1",
                "density": 0.05,
                "kept": 4252742,
                "delta_bytes": 22114300 + i,
                "seconds": 3.25,
                **({"statistics_bytes": 8512345, "statistics_seconds": 41.5} if i else {}),
                "localized_by": {"actor": "nightly", "host": "worker-1", "device": "cpu"},
            },
        )
        for i, task in enumerate(tasks)
    }
    values = {
        "line": "vision-b32",
        "version": version,
        "recipe": {
            "format": 1,
            "base": {"weights": digest("base"), "config": digest("base config")},
            "family": "clip",
            "method": {
                "name": "localize-and-stitch",
                "version": 1,
                "settings": {"overlap": "mean"},
            },
            "members": [
                {"task": t, "model": m.weights, "mask": m.mask, "delta": m.delta}
                for t, m in members.items()
            ],
            "code": 1,
            "other": {},
        },
        "recipe_digest": digest(f"recipe {version}"),
        "patch": digest(f"patch {version}"),
        "patch_bytes": 31457280,
        "kept": 6123456,
        "members": members,
        "results": {t: result(draw, measured=i != 1) for i, t in enumerate(tasks)},
        "retention": retention(0.9712),
        "gates": gates(tasks[0] if tasks else None),
        "facts": {
            "overlapping": 1234567,
            "note": "made for a test",
            **({"tournament": tournament(tasks)} if tasks else {}),
        },
        "files": {"line": digest("line file")},
        "created_at": "2026-03-01T12:34:56.789012+00:00",
        "made_by": {"actor": "nightly", "host": "worker-1", "pid": 4242, "flow_run": "a1b2"},
        "timings": {"stitch": 1.234, "evaluate": 98.765},
        "software": {"restitch": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
    }
    return MergedRecord.model_validate(values | changes)


def specialists(made: MergedRecord) -> dict[str, Any] | None:
    """The specialists of a version; none without members."""
    if not made.members:
        return None
    sizes = {task: 1234567 + i for i, task in enumerate(made.members)}
    return {
        "line": made.line,
        "version": made.version,
        "method": "tall",
        "method_version": 1,
        "settings": {"threshold": dict.fromkeys(made.members, 0.4)},
        "bytes": {"shared": 98765432, "tasks": sizes, "all": 98765432 + sum(sizes.values())},
        "made_at": "2026-03-02T08:00:00.123456+00:00",
        "made_by": {"actor": "<ann>", "host": "worker-1"},
        "manifest": digest("specialists"),
    }


def show(made: MergedRecord, role: str | None = "champion") -> dict[str, Any]:
    """As `restitch show LINE VERSION --json` prints it."""
    return {
        **made.to_json(),
        "role": role,
        "mean_accuracy": made.mean_accuracy,
        "mean_normalized": made.mean_normalized,
        "verdict": made.verdict,
        "losses": list(made.losses),
        "digest": made.digest,
        "specialists": specialists(made),
        "links": {
            "mlflow": "https://mlflow.example/#/experiments/1/runs/2",
            "mlflow_filter": "tags.`restitch.digest` = 'abc'",
            "prefect": None,
        },
    }


def brief(shown: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As `restitch history LINE --versions --json` lists a version."""
    kept = shown["retention"]
    return {
        "version": shown["version"],
        "role": shown["role"],
        "members": {task: member["version"] for task, member in shown["members"].items()},
        "mean_accuracy": shown["mean_accuracy"],
        "mean_normalized": shown["mean_normalized"],
        "retention": kept and kept["ratio"],
        "general": kept and kept["value"],
        "passed": True,
        "verdict": shown["verdict"],
        "failed": [],
        "created_at": shown["created_at"],
        "made_by": shown["made_by"],
        "acts": [],
        **changes,
    }


def older(shown: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A history, newest first, that leads to the version."""
    draw, found = random.Random(7), [brief(shown)]
    for version in range(shown["version"] - 1, shown["version"] - count, -1):
        failed = ["retention 0.9301 is less than 0.95"] if version % 7 == 3 else []
        ratio = 0.93 if failed else 1 - 0.03 * version / shown["version"] + draw.uniform(0, 0.008)
        held = dict(list(found[0]["members"].items())[: max(1, version // 2)])
        values = {
            "version": version,
            "role": None,
            "members": held,
            "mean_accuracy": draw.uniform(0.7, 0.84),
            "mean_normalized": draw.uniform(0.8, 0.93),
            "retention": ratio if found[0]["retention"] is not None else None,
            "general": ratio * 0.633 if found[0]["general"] is not None else None,
            "passed": not failed,
            "verdict": "failed" if failed else "passed",
            "failed": failed,
            "created_at": f"2026-02-{1 + version % 28:02d}T06:00:00.000000+00:00",
        }
        found.append(brief(shown, **values))
    return found


def changes(shown: dict[str, Any], before: int) -> dict[str, Any]:
    """As `restitch diff LINE A B --json` prints it."""
    verdicts = ("better", "worse", "same", "unknown")
    tasks = list(shown["results"])
    rows: list[dict[str, Any]] = []
    nothing = dict.fromkeys(("a", "difference", "interval", "p_value", "gained", "lost", "rows"))
    for i, task in enumerate(tasks):
        last = task == tasks[-1]
        now, verdict = shown["results"][task]["merged"], "joined" if last else verdicts[i % 4]
        moved = {"better": 0.0312, "worse": -0.0208, "same": 0.0004}.get(verdict)
        untold = "joined" if last else "unknown"
        rows.append({"task": task, **nothing, "b": now, "verdict": untold})
        if now is not None and moved is not None:
            rows[-1] |= {
                "a": now - moved,
                "difference": moved,
                "interval": {"low": moved - 0.01, "high": moved + 0.01},
                "p_value": {"better": 1.2e-7, "worse": 0.0031}.get(verdict, 0.71),
                "gained": 210 + i,
                "lost": 120,
                "verdict": verdict,
                "rows": shown["results"][task]["count"],
            }
    kept = shown["retention"]
    return {
        "line": shown["line"],
        "a": before,
        "b": shown["version"],
        "members": {
            "joined": {tasks[-1]: 1} if tasks else {},
            "left": {"emnist": 2},
            "replaced": {tasks[0]: [1, 2]} if len(tasks) > 1 else {},
            "relocalized": {tasks[1]: 1} if len(tasks) > 2 else {},
        },
        "settings": [["localize.density", 0.01, 0.05], ["gates.min_retention", None, 0.95]],
        "results": rows,
        "retention": kept
        and {
            "task": kept["task"],
            "a": kept["value"] + 0.004,
            "b": kept["value"],
            "difference": -0.004,
            "interval": {"low": -0.009, "high": 0.001},
            "p_value": 0.12,
            "gained": 80,
            "lost": 120,
            "verdict": "same",
            "rows": kept["count"],
        },
        "weights": {
            "differ": 812345,
            "of": 85054464,
            "by_layer": {str(layer): 50000 + layer for layer in range(LAYERS)},
            "by_component": {"attention": 300000, "mlp": 500000, "layer norm": 12345},
            "by_tensor": {"encoder.layers.0.mlp.fc1.weight": 812345},
        },
    }


def acts(
    version: int, tasks: Sequence[str], reason: str = "nightly remerge"
) -> list[dict[str, Any]]:
    """As `restitch history LINE --json` lists them, newest first."""
    kinds = (("promoted", version), ("rejected", version - 1), ("merged", version - 1))
    return [
        {
            "sequence": 40 - i,
            "time": f"2026-03-01T12:{40 - i}:00.000000+00:00",
            "kind": kind,
            "actor": "nightly",
            "reason": f"version {version}: {reason}",
            "models": [{"task": task, "version": 1} for task in tasks[:2]],
            "versions": [version],
            "champion": champion,
            "digests": {"patch": digest("patch")},
            "entry": digest(f"entry {i}"),
            "previous": digest(f"entry {i + 1}"),
        }
        for i, (kind, champion) in enumerate(kinds)
    ]


def analysis(tasks: Sequence[str]) -> dict[str, Any]:
    """As the step `analyze` returns it."""
    draw, count, kept = random.Random(3), len(tasks), 4252742
    jaccard: list[list[float | None]] = [[1.0] * count for _ in tasks]
    cosine: list[list[float | None]] = [[1.0] * count for _ in tasks]
    shared = [[kept] * count for _ in tasks]
    for i in range(count):
        for j in range(i):
            overlap = draw.random() ** 3 * 0.16 + 0.005
            jaccard[i][j] = jaccard[j][i] = overlap
            cosine[i][j] = cosine[j][i] = overlap * draw.uniform(-0.6, 1)
            shared[i][j] = shared[j][i] = round(2 * kept * overlap / (1 + overlap))
    owners = [round(kept * count * 0.8 / 9**i) for i in range(count)]

    def shares(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        found = [w * draw.uniform(0.6, 1.4) for w in weights]
        return {n: f / sum(found) for n, f in zip(names, found, strict=True)}

    layers = [str(layer) for layer in range(LAYERS)]
    by_component = {task: shares(COMPONENTS, (0.3, 0.35, 0.25, 0.1)) for task in tasks}
    by_layer = {task: shares(layers, range(1, LAYERS + 1)) for task in tasks}
    return {
        "tasks": list(tasks),
        "kept": {task: {"w": kept} for task in tasks},
        "coordinates": {"w": 85054464},
        "shared": shared,
        "jaccard": jaccard,
        "cosine": cosine,
        "owners": owners,
        "places": {
            "layers": layers if tasks else [],
            "components": list(COMPONENTS) if tasks else [],
            "by_layer": {
                "tasks": by_layer,
                "all": dict.fromkeys(layers, 1 / LAYERS) if tasks else {},
            },
            "by_component": {
                "tasks": by_component,
                "all": dict(zip(COMPONENTS, (0.001, 0.33, 0.66, 0.009), strict=True))
                if tasks
                else {},
            },
        },
    }


def report_input(tasks: Sequence[str] = task_names(12), versions: int = 30) -> ReportInput:
    """A version that has everything."""
    shown = show(record(tasks, version=versions))
    return ReportInput(
        version=shown,
        versions=older(shown, versions),
        changes=changes(shown, versions - 1) if versions > 1 else None,
        acts=acts(versions, tasks),
        analysis=analysis(tasks),
    )


def whole_input() -> ReportInput:
    """A version that merges whole task vectors."""
    found = report_input(task_names(3), 2)
    assert found.analysis is not None
    sizes = found.analysis["coordinates"]
    kept = dict.fromkeys(found.analysis["tasks"], sizes)
    return replace(found, analysis={**found.analysis, "kept": kept})


def bare_input(tasks: Sequence[str] = ("colour",)) -> ReportInput:
    """A first version of which nothing was measured."""
    nothing = {task: TaskResult(notes=("no data: not evaluated",)) for task in tasks}
    made = record(
        tasks,
        version=1,
        results=nothing,
        retention=None,
        gates=(),
        facts={},
        files={},
        timings={},
        software={},
        made_by=None,
    )
    shown = show(made, role=None)
    return ReportInput(shown, [brief(shown)], None, [], None)


def hostile_input() -> ReportInput:
    """Names, reasons and sources that are meant to break out of the page."""
    evil = HOSTILE[0]
    found = report_input(HOSTILE, versions=3)
    found.version["members"][HOSTILE[0]]["uri"] = f"https://evil.example/{evil}?a=1&b=2"
    found.version["results"][HOSTILE[0]]["notes"] = [f"javascript:alert(1) {evil}"]
    found.version["made_by"]["actor"] = evil + "unbroken" * 40
    found.version["links"]["mlflow"] = "javascript:alert('link')"
    found.version["software"][evil] = evil
    found.version["gates"][0]["note"] = evil
    found.version["recipe"]["other"] = {evil: "</pre><script>alert('recipe')</script>"}
    found.acts[0]["reason"] = found.acts[0]["actor"] = f"{evil} " + "unbroken" * 40
    assert found.changes is not None
    found.changes["settings"].append([evil, evil, {"nested": evil}])
    return found
