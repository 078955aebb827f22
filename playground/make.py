"""Make the playground's world: a base model, finetuned models, their data and their files.

    python -m playground.make OUT [--seed 0] [--size small|demo]

`make_world` writes a folder that is complete when it has a manifest. It returns at once if there
is a world of the same code and settings with every file intact. Parts are either complete or
missing, so the next run after a killed one continues with the part that it was making; two runs
at the same time wait for each other. The same seed and size give the same bytes on one machine.
"""

import argparse
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from restitch.merging.digests import digest_bytes, digest_file, digest_json
from restitch.merging.errors import BadInput, RestitchError, Unavailable, UsageError
from restitch.merging.progress import Progress, ignore

MANIFEST = "manifest.json"
LOCK = ".making"
"""Locked while a run works in the folder; contains the fingerprint of the world being made."""
PARTS = ("base", "data", "models", "tasks", "general.yaml", "line.yaml", MANIFEST)
SOURCES = (
    "building.py",
    "captions.py",
    "folders.py",
    "make.py",
    "scenes.py",
    "skills.py",
    "training.py",
)
"""The code that determines a world."""
SIZES = ("small", "demo")


@dataclass(frozen=True)
class World:
    """A made world.

    Attributes:
        root: its folder.
        tasks: the names of its tasks, in the best order of registration.
    """

    root: Path
    tasks: tuple[str, ...]

    @property
    def base(self) -> Path:
        """The folder of the pretrained model."""
        return self.root / "base"

    @property
    def line(self) -> Path:
        """The file that describes the line."""
        return self.root / "line.yaml"

    @property
    def retention(self) -> Path:
        """The task file of the general benchmark."""
        return self.root / "general.yaml"

    def model(self, task: str) -> Path:
        """The folder of a finetuned model."""
        return self.root / "models" / task

    def task_file(self, task: str) -> Path:
        """The file that describes a task."""
        return self.root / "tasks" / f"{task}.yaml"

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """The test accuracy of `base` and `finetuned` by task, from the manifest."""
        manifest = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        accuracy: dict[str, dict[str, float]] = manifest["accuracy"]
        return accuracy


def make_world(
    out: Path, size: str = "demo", seed: int = 0, progress: Progress | None = None
) -> World:
    """The world in `out`, which is made if it is missing.

    Args:
        out: its folder: missing, empty, or a world of any code and settings.
        size: `demo` learns its tasks; `small` is made in seconds and learns nothing.
        seed: the seed of all random numbers.
        progress: called with the pictures that the models have seen and the total.

    Raises:
        UsageError: the size is unknown.
        BadInput: the folder is not a world.
        Unavailable: the folder cannot be written.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size of a world: {size!r}", expected=" or ".join(SIZES))
    out = Path(out).absolute()
    try:
        made = _made(out, _fingerprint(size, seed))
        return made or _make(out, size, seed, progress or ignore)
    except OSError as error:
        raise Unavailable(
            f"the world in {out} cannot be written",
            found=error,
            hint="choose a folder that you may write to, on a disk with 100 MB free",
        ) from error


def _make(out: Path, size: str, seed: int, progress: Progress) -> World:
    """Make the missing parts in order, and the manifest last."""
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(size, seed)
    with _locked(out / LOCK) as note:
        if world := _made(out, fingerprint):
            return world  # made by another run in the meantime
        if note.read_text(encoding="utf-8") != fingerprint or (out / MANIFEST).exists():
            _clear(out)
            note.write_text(fingerprint, encoding="utf-8")
        # Imported here, so that an existing world needs no heavy imports.
        from playground.building import build

        accuracy = build(out, size, seed, progress)
        files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != LOCK]
        manifest = {
            "fingerprint": fingerprint,
            "size": size,
            "seed": seed,
            "tasks": [name for name in accuracy if name != "general"],
            "accuracy": accuracy,
            "files": {str(p.relative_to(out)): digest_file(p) for p in files},
        }
        part = out / f".{MANIFEST}.part"
        part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        part.replace(out / MANIFEST)
    world = _made(out, fingerprint)
    assert world is not None
    return world


def _made(out: Path, fingerprint: str) -> World | None:
    """The world in `out` if it is complete and intact and has this fingerprint."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return None
        for name, digest in manifest["files"].items():
            if digest_file(out / name) != digest:
                return None
        return World(out, tuple(manifest["tasks"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(size: str, seed: int) -> str:
    """The digest of the generating code and the settings."""
    here = Path(__file__).parent
    sources = {name: digest_bytes((here / name).read_bytes()) for name in SOURCES}
    return digest_json({"sources": sources, "size": size, "seed": seed})


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that is not a world, which must not be cleared."""
    if out.is_dir() and ((out / LOCK).exists() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise BadInput(
            f"{out} exists and is not a world of the playground",
            expected="a missing or empty folder, or a world of the playground",
            hint="choose another folder",
        )


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the folder's lock; the kernel releases it when the process ends or dies."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _clear(out: Path) -> None:
    """Remove the parts of an earlier run, the manifest first."""
    (out / MANIFEST).unlink(missing_ok=True)
    for path in [*(out / part for part in PARTS), *out.glob(".part-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a world and print the accuracy of its models."""
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TimeElapsedColumn

    parser = argparse.ArgumentParser(prog="python -m playground.make", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="demo")
    options = parser.parse_args(arguments)
    out = Console(highlight=False)
    try:
        with Bars(*Bars.get_default_columns(), TimeElapsedColumn(), console=out) as bars:
            bar = bars.add_task("making the world", total=None)
            world = make_world(
                options.out,
                options.size,
                options.seed,
                lambda done, total: bars.update(bar, completed=done, total=total),
            )
    except RestitchError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    for name, accuracy in world.accuracy.items():
        values = ", ".join(f"{model} {value:.3f}" for model, value in accuracy.items())
        out.print(f"{name}: {values}")
    out.print(str(world.root), soft_wrap=True)


if __name__ == "__main__":
    main()
