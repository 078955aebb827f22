"""What the masks of a merged version have in common, kept in the store once per set of members.

A pure function of the base and the members' deltas, so the key holds these and the version of
the analysis, and an analysis that is there needs neither base nor deltas to be read. Beside the
overlaps it says where each mask lies: its share by layer and by component.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from restitch.merging.analysis.masks import VERSION as ANALYSIS_VERSION
from restitch.merging.analysis.masks import MaskAnalysis, analyze_masks
from restitch.merging.digests import digest_json
from restitch.merging.files.sparse import SparseFile
from restitch.merging.order import by_bytes
from restitch.modeling.tensor_location import COMPONENTS, Place, place_of
from restitch.registry.ledger.records import MergedRecord
from restitch.tasks.inputs.checkpoints import open_base
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, made_by, workspace

# Raised when places or their names change; the analysis itself has its own version.
VERSION = 1

OUTSIDE = "outside"  # of the blocks that have a number


@step("analyze", "analyze version {record.version}")
def analyze(line: LineRef, record: MergedRecord) -> dict[str, Any] | Cached[dict[str, Any]]:
    """The analysis of a merged version's masks: from the store, or made now.

    Args:
        line: with the base that the version lies on.
        record: the version.

    Returns:
        `MaskAnalysis.to_json`, and under `places` the names of `layers` and `components` with
        the share of each mask in them by task, and that of the coordinates of all tensors
        that some mask touches.
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
    found = space.objects.lookup("analysis", key)
    if found is not None:
        return Cached(_read(space, found.blob))
    base = open_base(line, space)
    with working("comparing the masks") as progress:
        files = {
            t: SparseFile.open(space.objects.blob_path(d), base.checkpoint)
            for t, d in deltas.items()
        }
        analysis = analyze_masks(base.checkpoint, files, progress)
    blob = space.objects.put_json({**analysis.to_json(), "places": places_of(analysis)})
    # Read back, for another worker may have been first, and its sums rounded otherwise.
    return _read(space, space.objects.publish("analysis", key, blob, made_by()).blob)


def _read(space: Workspace, blob: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(space.objects.read_blob(blob))
    return found


def places_of(analysis: MaskAnalysis) -> dict[str, Any]:
    """Where the masks lie, by layer and by component."""
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
    """What each place's layer is called, towers and layers in order, what has no layer last."""
    found = set(places)
    towers = len({place.tower for place in found if place.layer is not None}) > 1

    def order(place: Place) -> tuple[bool, str, int, str]:
        tower = place.tower or ""
        return (place.layer is None, tower, place.layer or 0, place.component)

    def name(place: Place) -> str:
        if place.layer is None:
            return OUTSIDE
        return f"{place.tower or 'other'} {place.layer}" if towers else str(place.layer)

    return {place: name(place) for place in sorted(found, key=order)}


def _shares(analysis: MaskAnalysis, group: Callable[[str], str]) -> dict[str, Any]:
    return {
        "tasks": {task: _share(kept, group) for task, kept in analysis.kept.items()},
        "all": _share(analysis.coordinates, group),
    }


def _share(counts: Mapping[str, int], group: Callable[[str], str]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for name, count in counts.items():
        sums[group(name)] += count
    return {name: count / sums.total() for name, count in sorted(sums.items())} if sums else {}
