"""A small world, made once."""

from pathlib import Path

import pytest

from playground.make import World, make_world


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read it, never write to it."""
    return make_world(Path(tmp_path_factory.mktemp("playground")) / "world", "small")
