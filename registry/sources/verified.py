"""Check the files of a model against its registered digests, so that a change is an error."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from restitch.merging.adapters.config import CONFIG as ADAPTER_CONFIG
from restitch.merging.digests import digest_file, digest_json
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.registry.ledger.finetuned_models import ModelRef

# Larger than any vocabulary; a sparse file of a terabyte is easy to make.
MOST_ASSET = 1 << 28

# Name, inode, size and time of each file. Not ctime: a new hard link changes it too.
State = tuple[tuple[str, int, int, int], ...]


def state_of(local: Path) -> State:
    """The state of a model's weights, which changes when somebody writes to them."""
    named = ("*.safetensors*", ADAPTER_CONFIG)
    files = sorted(f for n in named for f in local.glob(n)) if local.is_dir() else [local]
    stats = [(str(file), file.stat()) for file in files if file.exists()]
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in stats)


def opened(local: Path) -> Checkpoint:
    """Open the weights in a folder or file; while they stay unchanged, they are hashed once.

    Raises:
        BadInput: they are no checkpoint.
    """
    return _opened(local, state_of(local))


@lru_cache(maxsize=16)
def _opened(local: Path, _state: State) -> Checkpoint:
    return Checkpoint.open(local)


def verified_weights(local: Path, weights: str) -> Checkpoint:
    """Open the weights in a folder or file; they are read once while they stay unchanged.

    Raises:
        BadInput: they have another digest.
    """
    checkpoint = opened(local)
    check_weights(checkpoint, local, weights)
    return checkpoint


def check_weights(checkpoint: Checkpoint, local: Path, weights: str) -> None:
    """Refuse weights of another digest.

    Raises:
        BadInput: the digests differ.
    """
    digest = checkpoint.digest()
    if digest != weights:
        raise BadInput(
            f"the weights in {local} changed since they were registered",
            expected=f"digest {weights[:12]}",
            found=f"digest {digest[:12]}",
            hint="put the files back, or register the changed model as a new version",
        )


def assets_digest(folder: Path, names: Sequence[str]) -> str:
    """The digest of a model's configuration, tokenizer and processor files.

    Raises:
        BadInput: one of them is too large.
    """
    for name in names:
        size = (folder / name).stat().st_size
        if size > MOST_ASSET:
            raise BadInput(
                f"{folder / name} is too large",
                expected=f"at most {MOST_ASSET:,} bytes of configuration or vocabulary",
                found=f"{size:,} bytes",
                hint="check that the file belongs to this model",
            )
    return digest_json({name: digest_file(folder / name) for name in names})


def check_assets(ref: ModelRef, digest: str) -> None:
    """Refuse configuration files of another digest.

    Raises:
        BadInput: the digests differ.
    """
    if digest != ref.config:
        raise BadInput(
            f"the configuration files of {ref.uri} changed since it was registered",
            expected=f"digest {ref.config[:12]}",
            found=f"digest {digest[:12]}",
            hint="put the files back, or register the changed model as a new version",
        )
