"""Weights that lie in a bucket, opened as a checkpoint that fetches what is looked at.

A registration reads all of them once and keeps their listing in the store: a line for each
tensor with its digest, whose own digest is the model's. Whoever opens the model later compares
each tensor that it fetches with that, and takes one that the base has, too, from the base: so
what finetuning left alone is never fetched.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint, index_shards
from restitch.registry.sources.bucket import RemoteWeights, S3Folder
from restitch.registry.sources.resolve import Source
from restitch.registry.store.disk import explained
from restitch.tasks.runtime.workspace import Workspace

_INDEX = "model.safetensors.index.json"
_MOST_OPEN, _MOST_READS = 2, 3

_open: dict[tuple[str, str], Checkpoint] = {}


def remote_checkpoint(
    source: Source, space: Workspace, weights: str, like: Checkpoint | None = None
) -> Checkpoint:
    """The recorded weights of a model in a bucket; the last few stay open in this process.

    Args:
        source: with `remote`.
        space: whose store has the listing.
        weights: their digest.
        like: a checkpoint that may have some of the same tensors, such as the base.

    Raises:
        BadInput: they are gone or have changed.
        Unavailable: the bucket cannot be read.
    """
    key = (source.uri, weights)
    if key not in _open:
        _remember(key, _opened(source, space, weights, like))
    return _open[key]


def list_remote(source: Source, space: Workspace) -> Checkpoint:
    """Read all weights of a model in a bucket once, and keep their listing in the store."""
    checkpoint, filling = _over(source, space)
    filling.fetch_all()
    listing = checkpoint.listing()
    filling.expected = _digests(listing)
    _remember((source.uri, space.objects.put_blob(listing)), checkpoint)
    return checkpoint


def _opened(source: Source, space: Workspace, weights: str, like: Checkpoint | None) -> Checkpoint:
    checkpoint, filling = _over(source, space)
    try:
        listing = space.objects.read_blob(weights)
    except Damage:  # without it, all has to be read to know anything
        filling.fetch_all()
        listing = checkpoint.listing()
        if digest_bytes(listing) != weights:
            raise _other(source.uri) from None
        space.objects.put_blob(listing)
    expected = _digests(listing)
    if set(expected) != set(checkpoint.names):
        raise _other(source.uri)
    filling.expected = expected
    filling.like = {} if like is None else {like.tensor_digest(n): n for n in like.names}
    filling.base = like
    return checkpoint


def _over(source: Source, space: Workspace) -> "tuple[Checkpoint, _Filling]":
    folder, place = source.remote, space.home.scratch
    assert folder is not None, "its weights are not local"
    with explained(place, "write"):
        place.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="s3-", dir=place))
        try:
            names, index = _shards(folder, source.local)
            filling = _Filling(source.uri, RemoteWeights(folder, names, scratch))
            files = filling.weights.files
            checkpoint = Checkpoint.from_files(Path(source.uri), files, index, filling.fill)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what is mapped stays
    filling.checkpoint = checkpoint
    return checkpoint, filling


def _shards(folder: S3Folder, local: Path) -> tuple[list[str], Path | None]:
    """The files of the weights, and their index where there is one."""
    found = [name for name in folder.files if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"], None
    index = local / _INDEX
    if index.is_file():
        shards = index_shards(index)
        lacking = [shard for shard in shards if shard not in found]
        if lacking:
            raise BadInput(
                f"{folder.address} lacks a shard",
                expected=", ".join(lacking),
                found="no such object",
                hint="put the whole checkpoint there",
            )
        return shards, index
    if len(found) != 1:
        raise BadInput(
            f"{folder.address} holds several checkpoints",
            expected="model.safetensors, or shards with model.safetensors.index.json",
            found=", ".join(found),
            hint="give each model a folder of its own",
        )
    return found, None


class _Filling:
    """What is fetched of a checkpoint, tensor by tensor."""

    def __init__(self, uri: str, weights: RemoteWeights) -> None:
        self.uri = uri
        self.weights = weights
        self.checkpoint: Checkpoint | None = None
        self.expected: Mapping[str, str] = {}
        self.like: Mapping[str, str] = {}
        self.base: Checkpoint | None = None
        self._done: set[str] = set()
        self._one = threading.Lock()

    def fill(self, name: str) -> None:
        """Have a tensor's bytes in its file, and be what they were."""
        if name in self._done:
            return
        with self._one:
            if name not in self._done:
                self._fill(name)
                self._done.add(name)

    def fetch_all(self) -> None:
        """Have all bytes of all files."""
        assert self.checkpoint is not None, "it is set when the files are opened"
        for shard in self.weights.files:
            self.weights.fill_whole(shard)
        self._done.update(self.checkpoint.names)

    def _fill(self, name: str) -> None:
        assert self.checkpoint is not None, "it is set when the files are opened"
        place, length = self.checkpoint.location(name), self.checkpoint.info(name).nbytes
        if not length:
            return
        expected = self.expected.get(name)
        same = None if expected is None else self.like.get(expected)
        if same is not None and self.base is not None:
            self.weights.write(place.shard, place.start, self.base.tensor_bytes(same))
            return
        for _ in range(_MOST_READS):  # it may have been altered on its way
            self.weights.fill(place.shard, place.start, length)
            found = self.weights.digest(place.shard, place.start, length)
            if expected in (None, found):
                return
        raise _other(self.uri, f"another {name}")


def _digests(listing: bytes) -> dict[str, str]:
    rows = (json.loads(line) for line in listing.splitlines())
    return {name: digest for name, _, _, digest in rows}


def _remember(key: tuple[str, str], checkpoint: Checkpoint) -> None:
    while len(_open) >= _MOST_OPEN:
        del _open[next(iter(_open))]
    _open[key] = checkpoint


def _other(uri: str, found: str = "other tensors") -> BadInput:
    return BadInput(
        f"the weights at {uri} changed since they were registered",
        expected="the tensors that were there then",
        found=found,
        hint="put the files back, or register the changed model as a new version",
    )
