"""Adapters as finetuned models: opened on the base of their line.

The weights are computed when they are read. Of the other files, an adapter has its own tokenizer at
most: `whole_folder` puts the base's configuration next to it, and the head of a classifier.
"""

import json
import shutil
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from restitch.merging.adapters.checkpoint import AdapterCheckpoint, holds_factors
from restitch.merging.adapters.config import CONFIG as ADAPTER
from restitch.merging.adapters.config import AdapterConfig
from restitch.merging.digests import canonical_json, digest_file, digest_json
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.shards import MERGE_ADAPTER, holds_adapter
from restitch.modeling.families.family import Family
from restitch.modeling.tensor_names import present_names
from restitch.registry.access_policy import check_path
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.paths import is_there, named_path
from restitch.registry.sources.resolve import cached_folder
from restitch.registry.specs.hub_id import split_pin

_CONFIG = "config.json"


def is_adapter(local: Path) -> bool:
    """True if a folder holds an adapter alone, or its factors next to frozen weights."""
    if not local.is_dir():
        return False
    return holds_adapter([path.name for path in local.iterdir()]) or holds_factors(local)


def open_adapter(
    local: Path, where: str, base: Checkpoint, ref: ModelRef, prefixes: tuple[str, ...]
) -> AdapterCheckpoint:
    """Open an adapter on the base of its line.

    Args:
        local: its folder.
        where: its name in messages.
        base: the weights of the base.
        ref: the base.
        prefixes: what the names of either side may have before all of them.

    Raises:
        BadInput: it cannot be read, or does not fit the base.
    """
    aliases = partial(present_names, base.path, base, prefixes)
    adapter = AdapterCheckpoint.read(local, base, prefixes=prefixes, where=where, aliases=aliases)
    kind = "LoRA" if adapter.config.kind == "LORA" else "(IA)^3"
    frozen = " next to frozen weights" if holds_factors(local) else ""
    adapter.notes = (
        f"an adapter ({'DoRA' if adapter.config.dora else kind}){frozen} of {adapter.size:,} bytes"
        f" on {len(adapter.touched)} tensors of the base",
        *_names_another(adapter.config, ref),
    )
    return adapter


def check_same_base(adapter: AdapterCheckpoint, ref: ModelRef, where: str) -> None:
    """Refuse an adapter that was trained on another base, if that base lies on this machine.

    Args:
        adapter: the adapter on the base of the line.
        ref: the base of the line.
        where: the adapter's name in messages.

    Raises:
        BadInput: the base that it names has other weights, or is an adapter.
    """
    named = adapter.config.base
    folder = None if named is None else _readable(named)
    if folder is None:
        return
    if is_adapter(folder):
        raise BadInput(
            f"{where} is an adapter on an adapter",
            expected="an adapter on the whole weights of the line's base",
            found=f"base_model_name_or_path: {named}, which holds an adapter",
            hint="merge the first adapter into its base, and the second one into the result: "
            f"{MERGE_ADAPTER}",
        )
    try:
        digest = Checkpoint.open(folder).digest()
    except BadInput:
        return  # its name is compared instead
    if digest != ref.weights:
        raise BadInput(
            f"{where} was trained on another base than that of this line",
            expected=f"{ref.uri} (digest {ref.weights[:12]})",
            found=f"base_model_name_or_path: {named} (digest {digest[:12]})",
            hint="register an adapter that was trained on this base; if it was, correct "
            "base_model_name_or_path in its adapter_config.json",
        )


def _readable(named: str) -> Path | None:
    """The folder that a base's name is on this machine, if this process may read it."""
    try:
        path = named_path(named)
        if not path.is_dir() or not any(is_there(path / name) for name in (_CONFIG, ADAPTER)):
            return None
        check_path(path, "the base of the adapter")
    except (BadInput, OSError):
        return None
    return path


def _names_another(config: AdapterConfig, ref: ModelRef) -> tuple[str, ...]:
    """A note if a configuration does not name the base of the line."""
    if config.base is None:
        return ("it does not name the base that it was trained on: that of the line is taken",)
    ours, revision = split_pin(ref.uri)
    same = Path(config.base).name.lower() == Path(ours).name.lower()
    moved = config.revision is not None and revision is not None and config.revision != revision
    if same and not moved:
        return ()
    theirs = config.base if config.revision is None else f"{config.base}@{config.revision}"
    return (
        f"it was trained on {theirs}, by its adapter_config.json; it is read on {ref.uri}:"
        " check that both are the same weights",
    )


def whole_folder(
    local: Path, adapter: AdapterCheckpoint, family: Family, base: Path, home: Home
) -> Path:
    """A folder with an adapter's own files, the configuration of its model, and its head.

    Args:
        local: the folder of the adapter.
        adapter: its weights on the base.
        family: the family of the line.
        base: the folder of the base.
        home: the installation, whose cache holds the folder.
    """
    own = {name: local / name for name in family.asset_files(local)}
    config = own.pop(_CONFIG, None) or base / _CONFIG
    values = json.loads(config.read_bytes()) if config.is_file() else None
    heads = family.task_heads
    if heads is not None and config == base / _CONFIG:
        trained = not frozenset(adapter.touched).isdisjoint(heads.tensors(base, adapter.names))
        classes = heads.count_classes(base, adapter) if trained else None
        if classes is not None:
            # An adapter does not name its classes: those of the task count, in their order.
            values = heads.whole_config(base, [f"LABEL_{index}" for index in range(classes)])

    def build(folder: Path) -> None:
        folder.mkdir()
        for name, path in own.items():
            shutil.copyfile(path, folder / name)
        if values is not None:
            (folder / _CONFIG).write_bytes(canonical_json(values))
            if heads is not None:
                names = heads.tensors(folder, adapter.names)
                head = {name: adapter.tensor(name).clone() for name in names}
                save_file(head, folder / "model.safetensors", {"format": "pt"})

    digests = {name: digest_file(path) for name, path in own.items()}
    return cached_folder(digest_json([adapter.digest(), values, digests]), build, home)
