"""The site's generator, which mkdocs loads by its path."""

import importlib.util
from types import ModuleType

from tests.shell import ROOT

DOCS = ROOT / "docs"


def generator() -> ModuleType:
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
