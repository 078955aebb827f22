"""restitch and mergekit give equal results, and the benchmark measures both.

The comparison runs mergekit's program; it is skipped if MERGEKIT_BIN does not name its folder.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import mergekit, speed
from restitch.merging.files.checkpoint import Checkpoint
from tests.shell import Shell

PROGRAM = os.environ.get("MERGEKIT_BIN", "")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"HIDDEN": 80, "INTERMEDIATE": 160, "KV": 20, "VOCABULARY": 300}
MERGES = {
    "task arithmetic": mergekit.task_arithmetic(0.4),
    "TIES at 20 %": mergekit.ties(0.2, 1.0),
    "TIES at 50 %": mergekit.ties(0.5, 0.7),
}


def models(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Make a Llama with two layers and three finetuned; densities give whole counts per tensor."""
    for module in (speed, mergekit):
        for name, size in SIZES.items():
            monkeypatch.setattr(module, name, size)
    shapes = speed.llama_shapes(0)
    shapes |= {name.replace(".0.", ".1."): shape for name, shape in shapes.items() if ".0." in name}
    speed.make_models(folder, shapes, speed.TASKS, dtype)
    config = mergekit.llama_config(80, 160, 4, 20, 300, 2)
    for task in ("base", *speed.TASKS):
        (folder / task / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Coordinates:
    """Properties of the coordinates of a tensor on which the comparison depends.

    Attributes:
        base: the base's weights.
        largest: the largest weight at the coordinate, of the base and of the members.
        equals: true if a member's value is equal to its trimming threshold.
        opposed: true if the kept values add up to exactly 0.
        positive: the mean of the kept positive values.
    """

    base: Tensor
    largest: Tensor
    equals: Tensor
    opposed: Tensor
    positive: Tensor


def looked_at(folder: Path, name: str, density: float) -> Coordinates:
    base = Checkpoint.open(folder / "base").tensor(name).double().view(-1)
    kept, equals, largest = [], torch.zeros(len(base), dtype=torch.bool), base.abs()
    for task in speed.TASKS:
        finetuned = Checkpoint.open(folder / task).tensor(name).double().view(-1)
        largest = torch.maximum(largest, finetuned.abs())
        vector = finetuned - base
        least = vector.abs().sort().values[-round(density * len(base))]
        equals |= vector.abs() == least
        kept.append(torch.where(vector.abs() >= least, vector, 0))
    stacked = torch.stack(kept)
    owners = (stacked > 0).sum(0)
    opposed = (stacked.sum(0) == 0) & (owners > 0)
    positive = stacked.clamp(min=0).sum(0) / owners.clamp(min=1)
    return Coordinates(base, largest, equals, opposed, positive)


def apart(one: Tensor, other: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The difference of two results, in spacings of the type at the largest weight."""
    spacing = torch.finfo(dtype).eps * 2.0 ** largest.log2().floor()
    return torch.where(one == other, 0, (one - other).abs() / spacing)


@pytest.mark.skipif(not PROGRAM, reason="MERGEKIT_BIN names no environment with mergekit")
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mergekit_gives_the_same_within_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, merge: str
) -> None:
    models(tmp_path, monkeypatch, DTYPES[dtype])
    case = MERGES[merge]
    ours = mergekit.restitch_command(tmp_path, case, tmp_path / "ours")
    subprocess.run(ours, check=True, capture_output=True)
    theirs = tmp_path / "theirs"
    # Computed in float32, as restitch does where weights have 16 bits.
    command = mergekit.mergekit_command(Path(PROGRAM), tmp_path, case, theirs, "float32", dtype)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subprocess.run(command, check=True, capture_output=True)
    first, second = Checkpoint.open(tmp_path / "ours"), Checkpoint.open(theirs)
    assert first.names == second.names
    density = case.member.get("density", 1.0)
    counted = same = decided = 0
    farthest = 0.0
    for name in first.names:
        assert first.info(name) == second.info(name)
        one, other = (found.tensor(name).double().view(-1) for found in (first, second))
        place = looked_at(tmp_path, name, density)
        is_ties = case.method == "ties"
        clear = ~(place.equals | place.opposed) if is_ties else torch.ones_like(place.equals)
        distance = apart(one, other, place.largest, DTYPES[dtype])
        farthest = max(farthest, float(distance[clear].max()))
        counted += len(one)
        decided += int(clear.sum())
        same += int((one == other).sum())
        if is_ties:
            # For opposite values that cancel, restitch elects no sign and mergekit the positive.
            alone = place.opposed & ~place.equals
            alpha = case.settings["alpha"]
            positive = place.base + alpha * place.positive
            assert torch.equal(one[alone], place.base[alone])
            gap = apart(other, positive, place.largest, DTYPES[dtype])[alone]
            assert not len(gap) or float(gap.max()) <= 1
    print(f"{merge}, {dtype}: {same} of {counted} the same bits; {decided} clear, {farthest:.2f}")
    assert farthest <= (4 if dtype == "float32" else 1)
    assert decided > (0.999 if dtype == "float32" else 0.8) * counted
    assert same > 0.9 * counted


def test_each_merge_is_measured_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    for module in (speed, mergekit):
        for name, size in SIZES.items():
            monkeypatch.setattr(module, name, size)

    def at_once(what: str, command: Sequence[str]) -> mergekit.Cost:
        # restitch in this process; of mergekit only its configuration.
        if Path(command[0]).name == "restitch":
            shell(*command[1:])
        else:
            config = json.loads(Path(command[1]).read_text())
            assert config["base_model"] == str(tmp_path / "base")
            assert [Path(model["model"]).name for model in config["models"]] == list(speed.TASKS)
            Path(command[2]).mkdir()
        return mergekit.Cost(what, 1.0, 2.0, 3, 4)

    monkeypatch.setattr(mergekit, "measured", at_once)
    console = Console(file=(tmp_path / "log").open("w"))
    costs = mergekit.measure(tmp_path, Path("/nowhere"), 1e5, console)
    mergekit.show(costs, console)
    names = [cost.name for cost in costs]
    assert names.count("restitch, ties") == 2
    assert names.count("mergekit, ties, bfloat16") == 1
    assert not (tmp_path / "out").exists()


def test_the_output_of_a_failed_process_is_shown() -> None:
    with pytest.raises(SystemExit, match="no such merge"):
        mergekit.measured("it", ["sh", "-c", "echo no such merge >&2; exit 3"])
    cost = mergekit.measured("it", ["sh", "-c", "sleep 0.05"])
    assert cost.resident > 0
    assert cost.seconds >= 0.05
