"""Map the names of a file's tensors to the live tensors of a model of transformers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.configs import read_config
from restitch.modeling.joined_tensors import Pieces, pieces_of


def named_tensors(model: Any, file: Checkpoint, prefixes: Sequence[str]) -> dict[str, str]:
    """The names of a file's tensors in a model of transformers, for those that it has.

    A tensor that is joined with others has the name that transformers saves it by.
    """
    return matched_names(model, file, prefixes, pieces_of(model))


def matched_names(
    model: Any, file: Checkpoint, prefixes: Sequence[str], pieces: Pieces
) -> dict[str, str]:
    """The names of a file's tensors in a model with these pieces of joined tensors."""
    shapes = {name: file.info(name).shape for name in file.names}
    live = live_tensors(model)
    for each in pieces.values():
        live |= each
    return match_names(shapes, live, prefixes, _conversion(model))


def present_names(folder: Path, file: Checkpoint, prefixes: Sequence[str]) -> dict[str, str]:
    """The names of a file's tensors in a loaded base model, where they differ, with the file's.

    Args:
        folder: holds the configuration.
        file: the weights.
        prefixes: what the file may carry before all of its names.
    """
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(read_config(folder), trust_remote_code=False)
    except Exception:  # a configuration of another layout has no such names
        return {}
    named = named_tensors(model, file, prefixes)
    return {live: name for name, live in named.items() if live not in file}


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; tied tensors under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def match_names(
    shapes: Mapping[str, Sequence[int]],
    live: Mapping[str, Tensor],
    prefixes: Sequence[str],
    convert: Callable[[str], str] = str,
) -> dict[str, str]:
    """Map the names of a file to live tensors, by one common prefix on either side.

    The prefix that maps most names wins; the plain names win a tie. A name without a live tensor
    of its shape is left out. `convert` gives a name of the file its present name in transformers.
    """
    best: dict[str, str] = {}
    for candidate in _renamings(prefixes):
        matched = {}
        for name, shape in shapes.items():
            own = _modern(candidate(name))
            own = own if own in live else convert(own)
            if own in live and tuple(live[own].shape) == tuple(shape):
                matched[name] = own
        if len(matched) > len(best):
            best = matched
    return best


def _renamings(prefixes: Sequence[str]) -> Iterable[Any]:
    yield lambda name: name
    for prefix in prefixes:
        yield lambda name, prefix=prefix: name.removeprefix(prefix)
        yield lambda name, prefix=prefix: prefix + name


def _conversion(model: Any) -> Callable[[str], str]:
    """The present name of a tensor whose name transformers has changed since it was saved."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    changes = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def convert(name: str) -> str:
        for change in changes:
            name, _ = change.rename_source_key(name)
        return name

    return convert


def _modern(name: str) -> str:
    """Rename gamma and beta of norms, which checkpoints from before 2019 have."""
    stem, _, last = name.rpartition(".")
    if stem.endswith("LayerNorm") and last in ("gamma", "beta"):
        return f"{stem}.{'weight' if last == 'gamma' else 'bias'}"
    return name
