"""Open weights in a bucket as a checkpoint that fetches tensors when they are read.

Registration reads all weights once and stores a listing: one line per tensor with its digest. The
digest of the listing is the model's digest. Later, each fetched tensor is compared with the
listing, and a tensor that the base has too is copied from the base: tensors that finetuning did
not change are never fetched.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.plain_weights import check_plain
from restitch.merging.files.shards import choose_shards
from restitch.registry.sources.bucket import RemoteWeights
from restitch.registry.sources.resolve import Source
from restitch.registry.store.disk import explained
from restitch.tasks.runtime.workspace import Workspace

_MOST_OPEN, _MOST_READS = 2, 3

_open: dict[tuple[str, str], Checkpoint] = {}


def remote_checkpoint(
    source: Source, space: Workspace, weights: str, like: Checkpoint | None = None
) -> Checkpoint:
    """Open the registered weights of a model in a bucket; the last few stay open.

    Args:
        source: the source, with `remote`.
        space: the workspace whose store has the listing.
        weights: the digest of the weights.
        like: a checkpoint that may share some of the tensors, such as the base.

    Raises:
        BadInput: the weights are missing or have changed.
        Unavailable: the bucket cannot be read.
    """
    key = (source.uri, weights)
    if key not in _open:
        _remember(key, _opened(source, space, weights, like))
    return _open[key]


def list_remote(source: Source, space: Workspace) -> Checkpoint:
    """Read all weights of a model in a bucket once, and store their listing.

    Raises:
        BadInput: it is no checkpoint, an adapter, or quantized.
        Unavailable: the bucket cannot be read.
    """
    checkpoint, fetcher = _over(source, space)
    check_plain(checkpoint, source.uri)
    fetcher.fetch_all()
    listing = checkpoint.listing()
    fetcher.expected = _digests(listing)
    _remember((source.uri, space.objects.put_blob(listing)), checkpoint)
    return checkpoint


def _opened(source: Source, space: Workspace, weights: str, like: Checkpoint | None) -> Checkpoint:
    checkpoint, fetcher = _over(source, space)
    try:
        listing = space.objects.read_blob(weights)
    except Damage:  # the listing is missing: compute it from all weights
        fetcher.fetch_all()
        listing = checkpoint.listing()
        if digest_bytes(listing) != weights:
            raise _changed(source.uri) from None
        space.objects.put_blob(listing)
    expected = _digests(listing)
    if set(expected) != set(checkpoint.names):
        raise _changed(source.uri)
    fetcher.expected = expected
    fetcher.like = {} if like is None else {like.tensor_digest(n): n for n in like.names}
    fetcher.base = like
    return checkpoint


def _over(source: Source, space: Workspace) -> "tuple[Checkpoint, _Fetcher]":
    folder, place = source.remote, space.home.scratch
    assert folder is not None, "its weights are not local"
    with explained(place, "write"):
        place.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="s3-", dir=place))
        try:
            chosen = choose_shards(source.uri, source.local, folder.files)
            index = None if chosen.index is None else source.local / chosen.index
            fetcher = _Fetcher(source.uri, RemoteWeights(folder, list(chosen.names), scratch))
            files = fetcher.weights.files
            checkpoint = Checkpoint.from_files(
                Path(source.uri), files, index, fetcher.fill, chosen.notes
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # mapped files stay until they are closed
    fetcher.checkpoint = checkpoint
    return checkpoint, fetcher


class _Fetcher:
    """Fetches a checkpoint tensor by tensor."""

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
        """Fetch a tensor into its file and compare its digest, once."""
        if name in self._done:
            return
        with self._one:
            if name not in self._done:
                self._fill(name)
                self._done.add(name)

    def fetch_all(self) -> None:
        """Fetch all files."""
        assert self.checkpoint is not None, "set when the files are opened"
        for shard in self.weights.files:
            self.weights.fill_whole(shard)
        self._done.update(self.checkpoint.names)

    def _fill(self, name: str) -> None:
        assert self.checkpoint is not None, "set when the files are opened"
        place, length = self.checkpoint.location(name), self.checkpoint.info(name).nbytes
        if not length:
            return
        expected = self.expected.get(name)
        same = None if expected is None else self.like.get(expected)
        if same is not None and self.base is not None:
            self.weights.write(place.shard, place.start, self.base.tensor_bytes(same))
            return
        for _ in range(_MOST_READS):  # a transfer may damage the bytes
            self.weights.fill(place.shard, place.start, length)
            digest = self.weights.digest(place.shard, place.start, length)
            if expected in (None, digest):
                return
        raise _changed(self.uri, f"a different tensor {name}")


def _digests(listing: bytes) -> dict[str, str]:
    rows = (json.loads(line) for line in listing.splitlines())
    return {name: digest for name, _, _, digest in rows}


def _remember(key: tuple[str, str], checkpoint: Checkpoint) -> None:
    while len(_open) >= _MOST_OPEN:
        del _open[next(iter(_open))]
    _open[key] = checkpoint


def _changed(uri: str, found: str = "different tensors") -> BadInput:
    return BadInput(
        f"the weights at {uri} changed since they were registered",
        expected="the registered tensors",
        found=found,
        hint="put the files back, or register the changed model as a new version",
    )
