"""Measure how long a merge takes on this host; the time is stored with all that it depends on."""

import socket
import time

from restitch.merging.digests import digest_json
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.modeling.device import device
from restitch.registry.ledger.finetuned_models import Member
from restitch.tasks.merge import make_recipe, write_patch_of
from restitch.tasks.runtime.engine import Cached, step
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import workspace

# Raised when the timed work changes.
VERSION = 1


@step("time a merge", "time {line.spec.method.name}")
def merging_seconds(line: LineRef, members: tuple[Member, ...]) -> float | Cached[float]:
    """Seconds to merge the members' deltas into a temporary patch file."""
    space = workspace()
    recipe = make_recipe(line, members)
    key = digest_json([VERSION, recipe.digest(), fingerprint(device()), socket.gethostname()])
    known = space.stored("timing", key)
    if known is not None:
        return Cached(float(known))
    with space.scratch() as scratch:
        began = time.perf_counter()
        write_patch_of(scratch / "patch.safetensors", line, recipe, space, None)
        seconds = round(time.perf_counter() - began, 4)
    return space.keep("timing", key, seconds)
