"""A large file to a bucket and back: restitch's store compared with plain boto3 in the same run.

`python -m benchmarks.s3 [--bytes 2e9] [--rounds 3] [--folder DIR] [--json FILE]` starts a small S3
server in another process, which checks nothing, so that its cost does not matter. Each transfer
runs in a separate process to measure its memory, and the two alternate. Plain boto3 means
`upload_file` and `download_file` with their default settings, parts and threads.

The store's time includes its additional work: the digests of all ranges, computed before the
upload and compared after the download.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.s3_server import s3_stand_in

GOAL = "goal: at most 1.2 of boto3's time, less than 200 MB"
_ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Transfer:
    """One direction with one of the two ways.

    Attributes:
        seconds: the median of all rounds.
        memory: the peak memory of its process, the largest of all rounds.
        started: the memory of the process before the transfer, after its imports.
    """

    way: str
    direction: str
    seconds: float
    memory: int
    started: int


def measure(folder: Path, size: int, rounds: int) -> list[Transfer]:
    """Upload and download a file of `size` bytes with both ways, alternating."""
    file = folder / "file"
    _fill(file, size)
    taken: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    with s3_stand_in(folder / "server") as url:
        os.environ.update({**_ACCOUNT, "AWS_ENDPOINT_URL": url})
        for number in range(rounds):
            for direction in ("up", "down"):
                for way in ("boto3", "restitch"):
                    name = f"{way}-{number}"
                    cost = _in_a_process(way, direction, name, file, folder / f"down-{name}")
                    taken.setdefault((way, direction), []).append(cost)
            for way in ("boto3", "restitch"):
                _remove(folder / f"down-{way}-{number}")
    return [
        Transfer(
            way,
            direction,
            statistics.median(seconds for seconds, *_ in found),
            max(memory for _, memory, _ in found),
            max(started for *_, started in found),
        )
        for (way, direction), found in taken.items()
    ]


def _in_a_process(
    way: str, direction: str, name: str, file: Path, target: Path
) -> tuple[float, int, int]:
    context = multiprocessing.get_context("spawn")
    answer, send = context.Pipe(duplex=False)
    process = context.Process(target=_move, args=(send, way, direction, name, file, target))
    process.start()
    send.close()
    try:
        seconds, memory, started = answer.recv()
    finally:
        process.join()
    return float(seconds), int(memory), int(started)


def _move(send: Any, way: str, direction: str, name: str, file: Path, target: Path) -> None:
    """Transfer the file, and send its seconds and its memory."""
    from restitch.registry.s3.store import S3Store

    store = S3Store("bucket", "store", target.parent / f"cache-{name}")
    store.put(f"warm/{name}-{direction}", b"connected")
    plain = _plain_client()
    plain.head_bucket(Bucket="bucket")
    before = _most_memory()
    started = time.perf_counter()
    if way == "boto3" and direction == "up":
        plain.upload_file(str(file), "bucket", name)
    elif way == "boto3":
        plain.download_file("bucket", name, str(target))
    elif direction == "up":
        store.put(name, file)
    else:
        target = store.local_path(name)
    seconds = time.perf_counter() - started
    memory = _most_memory()
    if direction == "down":
        if not _same(file, target):
            raise SystemExit(f"{way} downloaded wrong bytes")
        _remove(target)
    send.send((seconds, memory, before))


def _plain_client() -> Any:
    import boto3

    return boto3.session.Session().client("s3")


def _most_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fill(file: Path, size: int) -> None:
    block = os.urandom(1 << 24)
    with file.open("wb") as out:
        for start in range(0, size, len(block)):
            at = (start >> 24).to_bytes(8, "big")
            out.write((at + block[8:])[: size - start])


def _same(first: Path, second: Path) -> bool:
    from restitch.merging.digests import digest_file

    return digest_file(first) == digest_file(second)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def table(found: list[Transfer], size: int) -> Table:
    """A table of the transfers, with their ratios to boto3."""
    shown = Table("transfer", "seconds", "MB/s", "of boto3's time", "most memory, MB", caption=GOAL)
    by = {(each.way, each.direction): each for each in found}
    for each in found:
        ratio = each.seconds / by["boto3", each.direction].seconds
        shown.add_row(
            f"{each.way} {each.direction}",
            f"{each.seconds:.2f}",
            f"{size / each.seconds / 1e6:.0f}",
            f"{ratio:.2f}",
            f"{each.memory / 1e6:.0f} ({each.started / 1e6:.0f} before)",
        )
    return shown


def main() -> None:
    """Measure, print, and write the JSON file if requested."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bytes", type=float, default=2e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = int(args.bytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), size, args.rounds)
    Console().print(table(found, size))
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
