"""Compare the weights that MLflow keeps of merged versions with base and patch, byte for byte."""

from pathlib import Path

import torch

from restitch.merging.errors import BadInput, counted, shortlist
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, edited
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.mlflow.merged_models import WEIGHT_FOLDERS
from restitch.registry.sources.verified import assets_digest
from restitch.serving.served_version import ServedVersion, served_version
from restitch.serving.version_folder import ServedBase, open_patch, open_served_base
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.workspace import Workspace


def compare_weights(ledger: Ledger, space: Workspace) -> dict[int, str | None]:
    """Compare the weights in MLflow of each version of a line that has them there.

    Memory holds one tensor. Artifacts on another machine are downloaded, one version at a time.

    Returns:
        The first difference of each version, or None.

    Raises:
        BadInput: the base of the line cannot be read, or has changed.
        Damage: a patch or a record is damaged.
        Unavailable: MLflow, its artifacts or the base cannot be reached.
    """
    line_state = ledger.state()
    found: dict[int, str | None] = {}
    for version, folder in space.mlflow.weights_shown(line_state):
        served = served_version(space.home, line_state, ledger.merged(version))
        found[version] = _difference(served, folder, space)
    return found


def _difference(served: ServedVersion, folder: Path, space: Workspace) -> str | None:
    weights, components = (folder / name for name in WEIGHT_FOLDERS)
    base = open_served_base(served)
    try:
        copy = Checkpoint.open(weights)
    except BadInput as error:
        return f"cannot be read: {error.summary}"
    title = f"comparing the weights of {served.name} in MLflow"
    altered = _altered(served, base, copy, space, title)
    if altered:
        many = counted(len(altered), "tensor")
        return f"differ from base and patch in {many}: {shortlist(altered)}"
    for place in (weights, *sorted(components.iterdir())):
        if _assets(base, place) != served.base.config:
            return f"have another configuration, tokenizer or processor in {place.name}/"
    return None


def _altered(
    served: ServedVersion, base: ServedBase, copy: Checkpoint, space: Workspace, title: str
) -> list[str]:
    """The tensors that are missing, surplus, or have other bytes."""
    edits = open_patch(served, base, space.objects)
    checkpoint = base.checkpoint
    altered = sorted({*checkpoint.names} ^ {*copy.names})
    done = 0
    with working(title) as progress:
        for name in checkpoint.names:
            if name in copy and not _is_equal(checkpoint, edits, copy, name):
                altered.append(name)
            done += checkpoint.info(name).nbytes
            progress(done, checkpoint.nbytes)
    return altered


def _is_equal(base: Checkpoint, edits: Edits, copy: Checkpoint, name: str) -> bool:
    if base.info(name) != copy.info(name):
        return False
    tensors = (edited(base, edits, name), copy.tensor(name))
    made, kept = (tensor.reshape(-1).view(torch.uint8) for tensor in tensors)
    return torch.equal(made, kept)


def _assets(base: ServedBase, place: Path) -> str:
    return assets_digest(place, base.family.asset_files(place))
