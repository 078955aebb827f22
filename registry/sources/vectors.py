"""The vectors of a line with a space: those of its base, which are all ones."""

from functools import lru_cache
from pathlib import Path

from safetensors.torch import save_file

from restitch.merging.adapters.vectors import VectorSpace
from restitch.merging.digests import digest_json
from restitch.merging.files.checkpoint import Checkpoint
from restitch.registry.home import Home
from restitch.registry.sources.resolve import cached_folder
from restitch.registry.specs.line import SpaceSpec

_FILE = "vectors.safetensors"


@lru_cache(maxsize=16)
def vector_space(space: SpaceSpec, weights: Checkpoint, where: str) -> VectorSpace:
    """The vectors of a line on the weights of its base.

    Raises:
        BadInput: the base lacks a module.
    """
    return VectorSpace.of(weights, space.target_modules, space.feedforward_modules, where)


def ones_of(space: VectorSpace, home: Home) -> Checkpoint:
    """The vectors that change nothing, in a file of this machine's cache."""

    def build(folder: Path) -> None:
        folder.mkdir()
        save_file(space.ones(), folder / _FILE)

    shapes = {name: list(module.shape) for name, module in space.modules.items()}
    return Checkpoint.open(cached_folder(digest_json({"ones": shapes}), build, home) / _FILE)
