"""Methods that look at each coordinate by itself: by hand, against a dense reference, streamed."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, StreamedEdits, edited
from restitch.merging.files.mask import Mask
from restitch.merging.methods.registry import get_method
from restitch.merging.numerics.rounding import round_once
from restitch.merging.ranking.kept_vector import KeptVector
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.rules.stitch import DeltaMember, sparse_delta, write_patch
from tests import tiny

METHODS = ("averaging", "task-arithmetic", "ties", "consensus-ta", "consensus-ties")
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "averaging": ({},),
    "task-arithmetic": ({}, {"alpha": 1.0}),
    "ties": ({}, {"density": 0.5, "alpha": 0.7}, {"trim": "tensor"}),
    "consensus-ta": ({}, {"alpha": 1.0, "threshold": 0.6, "agreement": 1}),
    "consensus-ties": ({}, {"agreement": 2, "density": 0.5}, {"trim": "tensor"}),
}
CASES = [(name, given) for name in METHODS for given in SETTINGS[name]]


def whole_member(folder: Path, base: Checkpoint, task: str, finetuned: Checkpoint) -> DeltaMember:
    """A member whose delta keeps every coordinate of the localizable tensors."""
    names = [name for name in tiny.LOCALIZABLE if name in finetuned.names]
    mask = Mask.of({name: torch.arange(base.info(name).numel) for name in names})
    return DeltaMember(task, tiny.write_delta(folder / f"{task}.safetensors", finetuned, mask))


def members_of(folder: Path, base: Checkpoint, dtype: torch.dtype, count: int) -> list[DeltaMember]:
    tensors = {name: base.tensor(name) for name in base.names}
    found = []
    for seed in range(count):
        finetuned = tiny.save(folder / f"{seed}", tiny.finetuned_tensors(tensors, seed))
        found.append(whole_member(folder, base, "zyxw"[seed], finetuned))
    return found


# --- the reference: whole models in float64, one coordinate after the other where it decides ---


def trimmed(vectors: list[dict[str, Tensor]], share: float, over: str) -> list[dict[str, Tensor]]:
    found = []
    for vector in vectors:
        groups = [list(vector)] if over == "model" else [[name] for name in vector]
        kept = {name: torch.zeros_like(value) for name, value in vector.items()}
        for names in groups:
            ranked = sorted(
                ((-abs(float(v)), name, i) for name in names for i, v in enumerate(vector[name]))
            )
            for _, name, i in ranked[: int(share * len(ranked) + 0.5)]:
                kept[name][i] = vector[name][i]
        found.append(kept)
    return found


def agreeing(values: list[float], *, mean: bool) -> float:
    sign = np.sign(sum(values))
    same = [value for value in values if value and np.sign(value) == sign]
    return sum(same) / (len(same) if mean else 1) if same else 0.0


def consensus(own: list[float], together: float, threshold: float, agreement: int) -> float:
    votes = sum(abs(value) >= threshold * abs(together - value) for value in own)
    return together if votes >= agreement else 0.0


def reference(
    name: str, given: dict[str, Any], vectors: list[dict[str, Tensor]]
) -> dict[str, list[float]]:
    use = {**get_method(name).settings, **given}
    alpha = use.get("alpha", 1.0)
    cut = trimmed(vectors, use["density"], use["trim"]) if "density" in use else vectors
    result: dict[str, list[float]] = {}
    for tensor in vectors[0]:
        result[tensor] = []
        for i in range(len(vectors[0][tensor])):
            own = [float(vector[tensor][i]) for vector in vectors]
            kept = [float(vector[tensor][i]) for vector in cut]
            if name == "averaging":
                found = sum(own) / len(own)
            elif name in ("task-arithmetic", "consensus-ta"):
                found = sum(own)
            else:
                found = agreeing(kept, mean=name == "ties")
            if name.startswith("consensus"):
                found = consensus(own, found, use["threshold"], use["agreement"])
            result[tensor].append(alpha * found)
    return result


@pytest.mark.parametrize(("name", "given"), CASES)
def test_it_matches_the_dense_reference(tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = members_of(tmp_path, base, torch.float32, 3)
    edits = get_method(name)(base, members, **given)
    ordered = sorted(members, key=lambda member: member.task)
    vectors = [
        {
            n: sparse_delta(m).values(n).double() - base.tensor(n).view(-1).double()
            for n in sorted(m.delta.names)
        }
        for m in ordered
    ]
    expected = reference(name, given, vectors)
    for tensor in base.names:
        before = base.tensor(tensor)
        if tensor in expected:
            change = torch.tensor(expected[tensor], dtype=torch.float64)
            after = round_once(before.view(-1).double() + change, before.dtype)
            assert torch.equal(edited(base, edits, tensor).view(-1), after)
        else:
            assert torch.equal(edited(base, edits, tensor), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_do_not_depend_on_the_streamed_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors(dtype=dtype))
    members = members_of(tmp_path, base, dtype, 3)
    edits = get_method(name)(base, members)
    assert isinstance(edits, StreamedEdits)
    whole = {tensor: edited(base, edits, tensor) for tensor in edits.names}
    monkeypatch.setattr("restitch.merging.rules.elementwise.BLOCK", 7)
    for tensor in edits.names:
        flat = base.tensor(tensor).clone().view(-1)
        edit = edits.editor(tensor)
        for part in torch.split(flat, 13):
            edit(part)
        assert flat.view(torch.uint8).equal(whole[tensor].view(-1).view(torch.uint8))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_do_not_depend_on_order_or_threads(
    tmp_path: Path, name: str, threads: int
) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = members_of(tmp_path, base, torch.float32, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        digests = set()
        for order in itertools.permutations(members):
            edits = get_method(name)(base, order)
            write_patch(tmp_path / "patch", base, edits, {})
            digests.add((tmp_path / "patch").read_bytes())
        assert len(digests) == 1
    finally:
        torch.set_num_threads(before)


def by_hand(
    tmp_path: Path, vectors: dict[str, list[float]]
) -> tuple[Checkpoint, list[DeltaMember]]:
    base = tiny.save(tmp_path / "base", {"w": torch.full((4,), 10.0), "other": torch.ones(2)})
    members = []
    for task, change in vectors.items():
        mask = Mask.of({"w": torch.arange(4)})
        tensors = {"w": 10 + torch.tensor(change), "other": torch.ones(2)}
        finetuned = tiny.save(tmp_path / task, tensors)
        members.append(DeltaMember(task, tiny.write_delta(tmp_path / f"{task}.d", finetuned, mask)))
    return base, members


HAND = {"a": [4.0, -1.0, 0.0, 2.0], "b": [2.0, 3.0, 0.0, -3.0], "c": [0.0, -8.0, 1.0, -1.0]}


@pytest.mark.parametrize(
    ("name", "given", "change"),
    [
        ("averaging", {}, [2.0, -2.0, 1 / 3, -2 / 3]),
        ("task-arithmetic", {"alpha": 0.5}, [3.0, -3.0, 0.5, -1.0]),
        # Half of each: a keeps 4 and 2, b keeps 3 and -3, c keeps -8 and one of its two 1s: the
        # lower coordinate. Signs of the sums 4, -5, 1, -1; those that agree: 4; -8; 1; -3.
        ("ties", {"density": 0.5}, [4.0, -8.0, 1.0, -3.0]),
        # Nothing trimmed; sums 6, -6, 1, -2 elect; agreeing: 4 and 2; -1 and -8; 1; -3 and -1.
        ("ties", {"density": 1.0, "alpha": 0.5}, [1.5, -2.25, 0.5, -1.0]),
        # Sums 6, -6, 1, -2. Masks at 0.4, |own| >= 0.4 |sum - own|: first 4 >= .8, 2 >= 1.6, 0;
        # second 1 < 2, 3 < 3.6, 8 >= .8; third only c; fourth 2 >= 1.6, 3 >= .4, 1 >= .4.
        ("consensus-ta", {"alpha": 1.0}, [6.0, 0.0, 0.0, -2.0]),
        ("consensus-ta", {"alpha": 1.0, "agreement": 1}, [6.0, -6.0, 1.0, -2.0]),
        # TIES with sums and nothing trimmed: 6, -9, 1, -4; at 0.6 the masks: 4 >= 1.2 | 2 < 2.4,
        # 8 >= .6 | 1 >= 0 | 3 >= .6 and 1 < 1.8 and 2 < 3.6.
        (
            "consensus-ties",
            {"density": 1.0, "alpha": 0.5, "threshold": 0.6, "agreement": 2},
            [0.0, 0.0, 0.0, 0.0],
        ),
        (
            "consensus-ties",
            {"density": 1.0, "alpha": 0.5, "threshold": 0.6},
            [3.0, -4.5, 0.5, -2.0],
        ),
    ],
)
def test_a_case_by_hand(
    tmp_path: Path, name: str, given: dict[str, Any], change: list[float]
) -> None:
    base, members = by_hand(tmp_path, HAND)
    edits = get_method(name)(base, members, **given)
    found = edited(base, edits, "w")
    assert torch.equal(found, (10 + torch.tensor(change, dtype=torch.float64)).float())
    assert edits.names == ("w",)


def test_opposite_changes_elect_no_sign(tmp_path: Path) -> None:
    base, members = by_hand(tmp_path, {"a": [1.0, 2.0, 0.0, 1.0], "b": [-1.0, 2.0, 0.0, 1.0]})
    edits = get_method("ties")(base, members, density=1.0)
    assert torch.equal(edited(base, edits, "w"), torch.tensor([10.0, 12.0, 10.0, 11.0]))


def test_where_nothing_changes_the_bits_of_the_base_stay(tmp_path: Path) -> None:
    tensors = {"w": torch.tensor([-0.0, 0.0, 1.0, -0.0])}
    base = tiny.save(tmp_path / "base", tensors)
    mask = Mask.of({"w": torch.arange(4)})
    other = tiny.save(tmp_path / "a", {"w": torch.tensor([-0.0, 0.0, 2.0, 0.0])})
    member = DeltaMember("a", tiny.write_delta(tmp_path / "d", other, mask))
    edits = get_method("task-arithmetic")(base, [member], alpha=1.0)
    found = edited(base, edits, "w").view(torch.int32).tolist()
    assert found == torch.tensor([-0.0, 0.0, 2.0, -0.0]).view(torch.int32).tolist()


def test_a_kept_vector_of_everything_is_the_task_vector(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    base = tiny.save(tmp_path / "base", tensors)
    finetuned = tiny.save(tmp_path / "f", tiny.finetuned_tensors(tensors, 1))
    member = whole_member(tmp_path, base, "a", finetuned)
    kept, vector = (
        KeptVector(base, sparse_delta(member)),
        TaskVector(base, finetuned, tiny.LOCALIZABLE),
    )
    assert all(sparse_delta(member).info(name).kept == kept.numel(name) for name in kept.names)
    for name in vector.names:
        assert torch.equal(kept.difference(name).float(), vector.difference(name))
        scores = torch.cat([chunk.clone() for chunk in kept.chunks(name)])
        assert torch.equal(scores, kept.difference(name).abs().view(-1))
        assert torch.equal(torch.cat(list(kept.chunks(name, 3))), scores[3:])
        assert torch.equal(
            kept.sample(name, 5, 2), scores[: len(scores) // 5 * 5].view(-1, 5)[:, :2].reshape(-1)
        )


def test_the_task_vector_of_a_sparse_delta_is_0_elsewhere(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    member = tiny.member(tmp_path, base, "a", 1)
    kept = KeptVector(base, sparse_delta(member))
    assert any(sparse_delta(member).info(name).kept < kept.numel(name) for name in kept.names)
    for name in kept.names:
        flat, places = kept.difference(name).view(-1), sparse_delta(member).coordinates(name)
        rest = torch.ones(len(flat), dtype=torch.bool)
        rest[places] = False
        assert not flat[rest].any()
        wanted = (
            sparse_delta(member).values(name).double() - base.tensor(name).view(-1)[places].double()
        )
        assert torch.equal(flat[places], wanted)
        assert torch.equal(torch.cat(list(kept.chunks(name, 3))), flat[3:].abs())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("task-arithmetic", {"alpha": -0.1}),
        ("ties", {"trim": "layer"}),
        ("ties", {"density": 1.5}),
        ("consensus-ta", {"agreement": 0}),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    with pytest.raises(BadInput):
        get_method(name)(base, (), **given)


@pytest.mark.parametrize("name", METHODS)
def test_no_members_give_the_base(tmp_path: Path, name: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    edits: Edits = get_method(name)(base, ())
    assert edits.names == ()
