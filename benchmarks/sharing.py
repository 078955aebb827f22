"""A merge and its evaluation by several workers, as ratios against one process.

    python -m benchmarks.sharing --home HOME --line LINE [--method tsv-m] [--workers 3]
        [--part-size 10MB] [--json FILE]

Copies the store of HOME and merges the champion's members of LINE again, by its method or by
another one: alone, by this process and WORKERS - 1 workers of a stack, and once more while one is
killed after its first part. It evaluates the merged model on every task, alone and shared. Every
process has one thread. The bytes of the patch and the digests of the results must be equal.
"""

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console

from restitch.deployments.local import stack
from restitch.flows.promotion.versions import members_of, open_version
from restitch.registry.home import Home, prepare_environment
from restitch.registry.specs.method import MethodSpec
from restitch.tasks.evaluate import Evaluations
from restitch.tasks.merge import PatchParts, make_recipe, stitch
from restitch.tasks.runtime.refs import LineRef, WeightsRef
from restitch.tasks.runtime.sharing import PART_SIZE, SHARE_AFTER, Work, part_size, sharing
from restitch.tasks.runtime.workspace import workspace


@dataclass(frozen=True)
class Figure:
    """One way to do the work.

    Attributes:
        helped: the pieces that other processes did.
        pieces: all pieces.
        result: the digest of the patch, or of the results.
    """

    what: str
    way: str
    seconds: float
    helped: int
    pieces: int
    result: str


class Bench:
    """The work of one version, which can be done again."""

    def __init__(self, line: str, method: str | None) -> None:
        self.space = workspace()
        _, state, record = open_version(line, "champion")
        self.members = members_of(state, record)
        spec = state.spec
        if method is not None:
            spec = spec.model_copy(update={"method": MethodSpec(name=method)})
        self.line = LineRef(spec, state.base)
        self.recipe = make_recipe(self.line, self.members)

    def merge(self, way: str, *, kill: bool = False) -> Figure:
        """Stitch; with `kill`, kill a helper when it has made its first part."""
        work = PatchParts(self.line, self.recipe, part_size(), self.space).work
        self._forget(work)
        self.space.objects.store.remove(f"keys/patch/{self.recipe.digest()}")
        if kill:
            threading.Thread(target=self._kill_a_helper, args=(work,), daemon=True).start()
        began = time.perf_counter()
        patch = stitch(self.line, self.recipe)
        return self._figure("merge", way, time.perf_counter() - began, work, patch.blob)

    def evaluate(self, way: str) -> Figure:
        """Evaluate the merged model on every task."""
        patch = WeightsRef("merged", stitch(self.line, self.recipe).blob)
        exams = [(member.spec, member.model.model) for member in self.members]
        evaluations = Evaluations(self.line, patch, exams, self.space)
        self._forget(evaluations.work)
        began, blobs = time.perf_counter(), {}
        with sharing(self.space, evaluations.work) as turns:
            for number in turns:
                blobs[number] = evaluations.do(number).blob
        seconds = time.perf_counter() - began
        found = ",".join(blobs[number][:8] for number in sorted(blobs))
        return self._figure("evaluate", way, seconds, evaluations.work, found)

    def _figure(self, what: str, way: str, seconds: float, work: Work, result: str) -> Figure:
        records = [self.space.objects.lookup(work.results, key) for key in work.keys]
        makers = [record.made_by for record in records if record is not None]
        helped = sum(isinstance(one, dict) and one["pid"] != os.getpid() for one in makers)
        return Figure(what, way, round(seconds, 1), helped, len(work.keys), result)

    def _forget(self, work: Work) -> None:
        for key in work.keys:
            self.space.objects.store.remove(f"keys/{work.results}/{key}")

    def _kill_a_helper(self, work: Work) -> None:
        while True:
            for key in work.keys:
                record = self.space.objects.lookup(work.results, key)
                maker = None if record is None else record.made_by
                if isinstance(maker, dict) and maker["pid"] != os.getpid():
                    psutil.Process(int(str(maker["pid"]))).send_signal(signal.SIGKILL)
                    return
            time.sleep(0.2)


def measure(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Do everything on a copy of the store."""
    shutil.copytree(options.home / "store", folder / "home" / "store")
    os.environ |= {
        "RESTITCH_HOME": str(folder / "home"),
        PART_SIZE: options.part_size,
        SHARE_AFTER: "inf",
    }
    home = Home.from_environment()
    prepare_environment(home)
    bench = Bench(options.line, options.method)
    figures = [bench.merge("alone"), bench.evaluate("alone")]
    os.environ[SHARE_AFTER] = str(options.share_after)
    try:
        stack.up(home, options.workers - 1, say=lambda _: None)
        shared = f"{options.workers} processes"
        figures += [bench.merge(shared), bench.evaluate(shared)]
        figures.append(bench.merge(f"{shared}, one is killed", kill=True))
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        stack.down(home)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--line", required=True)
    parser.add_argument("--method")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--part-size", default="10MB")
    parser.add_argument("--share-after", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="restitch-bench-") as folder:
        figures = measure(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in figures], indent=2))
    out = Console(width=120)
    alone = {one.what: one for one in figures if one.way == "alone"}
    for one in figures:
        assert one.result == alone[one.what].result, "the bytes differ"
        ratio = one.seconds / alone[one.what].seconds
        out.print(
            f"{one.what:9} {one.way:28} {one.seconds:7.1f} s  {ratio:5.2f} x  "
            f"{one.helped} of {one.pieces} pieces by helpers"
        )


if __name__ == "__main__":
    main()
