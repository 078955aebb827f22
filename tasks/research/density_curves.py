"""Measure accuracy as masks grow: of one member by localizer, and of several merged members.

Each localizer ranks once and its ranking is cut at every density, so masks are nested. All values
are measured on the rows that results are reported on; no decision depends on them. They are stored
under all that they depend on, so that nothing is ranked or evaluated twice.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from restitch.merging.analysis.masks import VERSION as ANALYSIS_VERSION
from restitch.merging.analysis.masks import analyze_masks
from restitch.merging.digests import digest_json
from restitch.merging.files.sparse import SparseFile, write_sparse
from restitch.merging.localize.dataless import kept_count
from restitch.merging.methods.registry import Method, get_method, resolve_settings
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.ranking.top_k import top_k
from restitch.merging.rules.stitch import DeltaMember, sparse_delta
from restitch.modeling.evaluation import Evaluation
from restitch.registry.ledger.finetuned_models import Member
from restitch.tasks.density import Grafted
from restitch.tasks.evaluate import Exam, result_inputs
from restitch.tasks.inputs.checkpoints import Base, open_base, open_vector
from restitch.tasks.localize import kept_values
from restitch.tasks.localizers import Localizer, Ranking, named_localizer
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.workspace import Workspace, workspace

# Raised when the same inputs would give other values.
VERSION = 1

AVERAGING, STITCHING = "averaging", "localize-and-stitch"


@step("curve", "{localizer} masks of {member.task}")
def curve(
    line: LineRef,
    member: Member,
    localizer: str,
    densities: tuple[float, ...],
    whole: dict[str, Any],
) -> dict[str, Any] | Cached[dict[str, Any]]:
    """Evaluate the base on a member's task with grafts of rising density.

    Args:
        line: the line.
        member: the member.
        localizer: one of `localizers.LOCALIZERS` that the task has the data for.
        densities: the densities of the masks.
        whole: the value of the base with all localizable weights replaced, which is the graft of
            every localizer at density 1.

    Returns:
        The localizer's `label`, and `points` by rising density.
    """
    space = workspace()
    base = open_base(line, space)
    ranker = _localizer(line, member, localizer, base, space)
    inputs = {"version": VERSION, **_inputs(member, ranker, base)}
    counts, all_of_them = _counts(base, densities), _coordinates(base)
    keys = {kept: digest_json({**inputs, "kept": kept}) for kept in counts.values()}
    known = {kept: space.stored("graft", key) for kept, key in keys.items()}
    known[all_of_them] = {**whole, **Ranking(None).facts()}
    missing = [kept for kept, value in known.items() if value is None]
    if missing:
        with space.scratch() as scratch, open_vector(line, member.model.model, space) as opened:
            base, vector = opened
            exam = Exam(base, member.spec, member.model.model, space)
            ranking = _rank(ranker, member, vector, scratch)
            with working(f"grafting {member.task}") as progress:
                for done, kept in enumerate(missing, 1):
                    mask = _mask(ranking, kept, scratch)
                    with exam.live.edited(Grafted(vector.finetuned, mask)):
                        value = {**_measured(exam.take()), **ranking.facts()}
                    known[kept] = space.keep("graft", keys[kept], value)
                    progress(done, len(missing))
    points = [{"density": density, "kept": kept, **known[kept]} for density, kept in counts.items()]
    result = {"label": ranker.label, "points": points}
    return result if missing else Cached(result)


@step("conflict", "{localizer} masks together")
def conflict(
    line: LineRef, members: tuple[Member, ...], localizer: str, densities: tuple[float, ...]
) -> dict[str, Any] | Cached[dict[str, Any]]:
    """Evaluate a merge of two or more members with masks of rising density.

    The line's method merges them if it takes sparse deltas; otherwise localize-and-stitch does.

    Returns:
        `points` by rising density, each with the number of coordinates in two or more masks
        (`shared`), their `share` of those in any mask (for two masks the Jaccard index) and the
        value of each task; and the values of plain `averaging` of whole task vectors.
    """
    space = workspace()
    base = open_base(line, space)
    method, settings = _method(line)
    rankers = [_localizer(line, member, localizer, base, space) for member in members]
    counts = _counts(base, densities)
    average = get_method(AVERAGING)
    key = digest_json(
        {
            "version": [VERSION, ANALYSIS_VERSION],
            "method": [method.name, method.version, settings],
            "averaging": average.version,
            "tasks": [_inputs(m, one, base) for m, one in zip(members, rankers, strict=True)],
            "kept": list(counts.items()),
        }
    )
    known = space.stored("conflict", key)
    if known is not None:
        return Cached(known)
    with space.scratch() as scratch, ExitStack() as opened:
        vectors = [
            opened.enter_context(open_vector(line, m.model.model, space))[1] for m in members
        ]
        exams = [Exam(base, m.spec, m.model.model, space) for m in members]
        whole = _coordinates(base)

        def parts(kept: int, rankings: Sequence[Ranking]) -> list[DeltaMember]:
            return [
                _part(m, v, r, kept, scratch)
                for m, v, r in zip(members, vectors, rankings, strict=True)
            ]

        def measured(by: Method, given: list[DeltaMember], **chosen: Any) -> dict[str, Any]:
            with exams[0].live.edited(by(base.checkpoint, given, **chosen)):
                tasks = {m.task: _measured(e.take()) for m, e in zip(members, exams, strict=True)}
            return {"mean": sum(v["value"] for v in tasks.values()) / len(tasks), "tasks": tasks}

        averaged = measured(average, parts(whole, [Ranking(vector) for vector in vectors]))
        # Localizers use the same file names for every member.
        rankings = [
            _rank(by, m, v, Path(mkdtemp(dir=scratch)))
            for by, m, v in zip(rankers, members, vectors, strict=True)
        ]
        points = []
        with working(f"merging {' and '.join(m.task for m in members)}") as progress:
            for done, (density, kept) in enumerate(counts.items(), 1):
                given = parts(kept, rankings)
                masks = analyze_masks(
                    base.checkpoint, {part.task: sparse_delta(part) for part in given}
                )
                shared, kept_by_any = sum(masks.owners[1:]), sum(masks.owners)
                overlap = {
                    "shared": shared,
                    "share": shared / kept_by_any if kept_by_any else None,
                }
                reached = measured(method, given, **settings)
                points.append({"density": density, "kept": kept, **overlap, **reached})
                progress(done, len(counts))
    result = {
        "tasks": [m.task for m in members],
        "localizers": [by.label for by in rankers],
        "method": method.name,
        "settings": dict(settings),
        "points": points,
        "averaging": averaged,
    }
    return space.keep("conflict", key, result)


def _localizer(line: LineRef, member: Member, name: str, base: Base, space: Workspace) -> Localizer:
    return named_localizer(name, line, member.spec, base, member.model.model, space)


def _method(line: LineRef) -> tuple[Method, dict[str, Any]]:
    own = line.spec.method
    if get_method(own.name).whole:
        return get_method(STITCHING), dict(resolve_settings(STITCHING, {}))
    return get_method(own.name), dict(resolve_settings(own.name, own.settings))


def _inputs(member: Member, ranker: Localizer, base: Base) -> dict[str, Any]:
    """All that a graft depends on, in addition to its density."""
    model = member.model.model
    whole = WeightsRef("localizable", model.weights)
    return {
        "result": result_inputs(member.spec, base, whole, model),
        "localizer": ranker.inputs(),
    }


def _counts(base: Base, densities: Sequence[float]) -> dict[float, int]:
    return {density: kept_count(density, _coordinates(base)) for density in sorted(densities)}


def _coordinates(base: Base) -> int:
    return sum(base.checkpoint.info(name).numel for name in base.names)


def _rank(ranker: Localizer, member: Member, vector: TaskVector, scratch: Path) -> Ranking:
    with working(f"localizing {member.task}, {ranker.label}") as progress:
        return ranker.rank(vector, scratch, progress)


def _mask(ranking: Ranking, kept: int, scratch: Path) -> Any:
    assert ranking.scores is not None, "these localizers return scores"
    return top_k(ranking.scores, kept, scratch=scratch)


def _part(
    member: Member, vector: TaskVector, ranking: Ranking, kept: int, scratch: Path
) -> DeltaMember:
    """A member with the sparse delta of one density; its file is already unlinked."""
    file = scratch / f"{member.task}.delta"
    values = kept_values(vector.finetuned, _mask(ranking, kept, scratch), ranking.factors)
    write_sparse(file, values, kind="delta", metadata={})
    delta = SparseFile.open(file)
    file.unlink()
    return DeltaMember(member.task, delta)


def _measured(result: Evaluation) -> dict[str, Any]:
    low, high = result.interval
    interval = {"low": low, "high": high}
    return {"value": result.value, "interval": interval, "count": result.count}
