"""Analyze the overlaps of masks or subspaces of a merged version, and where they lie.

The analysis is a pure function of the base and the members' deltas. It is stored under their
digests, so that a stored analysis is returned without reading base or deltas.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from restitch.merging.analysis.masks import VERSION as ANALYSIS_VERSION
from restitch.merging.analysis.masks import MaskAnalysis, analyze_masks
from restitch.merging.analysis.subspaces import SubspaceAnalysis, analyze_subspaces
from restitch.merging.digests import digest_json
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.delta import Delta, open_delta
from restitch.merging.files.sparse import SparseFile
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress
from restitch.modeling.tensor_location import COMPONENTS, Place, place_of
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

# Raised when locations or their names change; the analysis itself has its own version.
VERSION = 1

OUTSIDE = "outside"  # of all numbered layers


@step("analyze", "analyze version {record.version}")
def analyze(line: LineRef, record: MergedRecord) -> dict[str, Any] | Cached[dict[str, Any]]:
    """The analysis of a merged version's masks or subspaces, from the store or made now.

    Returns:
        `MaskAnalysis.to_json` or `SubspaceAnalysis.to_json`, and under `places` the names of
        `layers` and `components`, with the share of each mask or subspace in them by task, and the
        share of all coordinates of the tensors that any of them touches.
    """
    space = workspace()
    deltas = {t: record.members[t].delta for t in sorted(record.members, key=by_bytes)}
    key = digest_json(
        {
            "version": [ANALYSIS_VERSION, VERSION],
            "base": line.base.weights,
            "members": list(deltas.items()),
        }
    )
    known = space.stored("analysis", key)
    if known is not None:
        return Cached(known)
    base = open_base(line, space)
    with working("comparing the masks") as progress:
        files = {
            t: open_delta(space.objects.blob_path(d), base.checkpoint) for t, d in deltas.items()
        }
        analysis = _compared(base.checkpoint, files, progress)
    value = {**analysis.to_json(), "places": places_of(analysis)}
    # Another worker may have been first, with differently rounded sums.
    return space.keep("analysis", key, value)


def _compared(
    base: Checkpoint, files: Mapping[str, Delta], progress: Progress
) -> MaskAnalysis | SubspaceAnalysis:
    masks = {t: file for t, file in files.items() if isinstance(file, SparseFile)}
    if len(masks) < len(files):
        return analyze_subspaces(base, files, progress)
    return analyze_masks(base, masks, progress)


def places_of(analysis: MaskAnalysis | SubspaceAnalysis) -> dict[str, Any]:
    """The share of each mask by layer and by component."""
    places = {name: place_of(name) for name in analysis.coordinates}
    layers = _layer_names(places.values())
    used = {place.component for place in places.values()}
    return {
        "layers": list(dict.fromkeys(layers.values())),
        "components": [name for name in COMPONENTS if name in used],
        "by_layer": _shares(analysis, lambda name: layers[places[name]]),
        "by_component": _shares(analysis, lambda name: places[name].component),
    }


def _layer_names(places: Iterable[Place]) -> dict[Place, str]:
    """The name of each place's layer, sorted by tower and layer; places without layer last."""
    distinct = set(places)
    towers = len({place.tower for place in distinct if place.layer is not None}) > 1

    def order(place: Place) -> tuple[bool, str, int, str]:
        tower = place.tower or ""
        return (place.layer is None, tower, place.layer or 0, place.component)

    def name(place: Place) -> str:
        if place.layer is None:
            return OUTSIDE
        return f"{place.tower or 'other'} {place.layer}" if towers else str(place.layer)

    return {place: name(place) for place in sorted(distinct, key=order)}


def _shares(
    analysis: MaskAnalysis | SubspaceAnalysis, group: Callable[[str], str]
) -> dict[str, Any]:
    return {
        "tasks": {task: _share(kept, group) for task, kept in analysis.kept.items()},
        "all": _share(analysis.coordinates, group),
    }


def _share(counts: Mapping[str, int], group: Callable[[str], str]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for name, count in counts.items():
        sums[group(name)] += count
    return {name: count / sums.total() for name, count in sorted(sums.items())} if sums else {}
