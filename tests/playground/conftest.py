"""A small world, made once for all tests."""

from pathlib import Path

import pytest

from playground.make import World, make_world


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small world, which tests must not change."""
    return make_world(Path(tmp_path_factory.mktemp("playground")) / "world", "small")
