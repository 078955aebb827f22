"""Methods that give one model per task: by hand, against a dense reference, streamed and stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from restitch.merging.errors import BadInput, Damage
from restitch.merging.experts.files import open_expert, write_experts
from restitch.merging.experts.specialists import Experts
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, StreamedEdits, edited
from restitch.merging.files.export import export_weights
from restitch.merging.methods.registry import get_method, method, method_names
from restitch.merging.numerics.rounding import round_once
from restitch.merging.rules.stitch import DeltaMember, sparse_delta
from tests import tiny
from tests.merging.rules.test_elementwise import HAND, agreeing, by_hand, members_of, trimmed

METHODS = tuple(name for name in method_names() if get_method(name).kind == "experts")
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "tall": ({}, {"threshold": {"x": 0.2, "y": 0.6, "z": 1.5}}),
    "tall-ties": ({}, {"threshold": 0.6, "density": 0.5}, {"trim": "tensor"}),
    "emr": ({},),
    "magnitude-masking": ({}, {"density": 0.4}),
    "magnitude-pruning": ({},),
}
CASES = [(name, given) for name in METHODS for given in SETTINGS[name]]


def of_hand(folder: Path, name: str, **given: Any) -> dict[str, list[float]]:
    """What each specialist of the case by hand adds to its base of tens."""
    base, members = by_hand(folder, HAND)
    experts = get_method(name).experts(base, members, **given)
    assert experts.tasks == ("a", "b", "c")
    found = {task: edited(base, experts.for_task(task), "w") for task in experts.tasks}
    return {task: (value - 10).tolist() for task, value in found.items()}


def test_tall_by_hand(tmp_path: Path) -> None:
    # Sums 6, -6, 1, -2; at 0.4 the masks |own| >= 0.4 |sum - own|:
    # a 4 >= .8, 1 < 2, 0 < .4, 2 >= 1.6; b 2 >= 1.6, 3 < 3.6, 0 < .4, 3 >= .4;
    # c 0 < 2.4, 8 >= .8, 1 >= 0, 1 >= .4.
    assert of_hand(tmp_path, "tall") == {
        "a": [6, 0, 0, -2],
        "b": [6, 0, 0, -2],
        "c": [0, -6, 1, -2],
    }


def test_each_task_can_have_its_own_threshold(tmp_path: Path) -> None:
    # At 0.2 a takes its second, 1 >= 1; at 0.6 b loses its first, 2 < 2.4.
    found = of_hand(tmp_path, "tall", threshold={"a": 0.2, "b": 0.6, "c": 0.4})
    assert found == {"a": [6, -6, 0, -2], "b": [0, 0, 0, -2], "c": [0, -6, 1, -2]}


def test_tall_on_ties_by_hand(tmp_path: Path) -> None:
    # Half of each kept: a 4 and 2, b 3 and -3, c -8 and 1 at its third; signs +, -, +, -;
    # sums 4, -8, 1, -3. At 0.4: a 4 >= 0, 1 < 2.8, 0 < .4, 2 >= 2; b 2 >= .8, 3 < 4.4, 0, 3 >= 0;
    # c 0 < 1.6, 8 >= 0, 1 >= 0, 1 >= .8.
    assert of_hand(tmp_path, "tall-ties", density=0.5) == {
        "a": [4, 0, 0, -3],
        "b": [4, 0, 0, -3],
        "c": [0, -8, 1, -3],
    }


def test_emr_by_hand(tmp_path: Path) -> None:
    # Signs +, -, +, -; largest that agree 4, -8, 1, -3. a takes 4 and -8: 7 / 12 of them; b takes
    # 4 and -3: 8 / 7; c takes -8, 1 and -3: 10 / 12.
    found = of_hand(tmp_path, "emr")
    expected = {
        "a": np.array([4, -8, 0, 0]) * 7 / 12,
        "b": np.array([4, 0, 0, -3]) * 8 / 7,
        "c": np.array([0, -8, 1, -3]) * 10 / 12,
    }
    for task, change in expected.items():
        assert found[task] == (10 + torch.from_numpy(change)).float().sub(10).tolist()


def test_magnitude_masking_by_hand(tmp_path: Path) -> None:
    # Half of each as a mask of the sums 6, -6, 1, -2.
    assert of_hand(tmp_path, "magnitude-masking", density=0.5) == {
        "a": [6, 0, 0, -2],
        "b": [0, -6, 0, -2],
        "c": [0, -6, 1, 0],
    }


def test_magnitude_pruning_keeps_one_part_in_the_number_of_tasks(
    tmp_path: Path,
) -> None:
    # A third of four weights is one.
    assert of_hand(tmp_path, "magnitude-pruning") == {
        "a": [4, 0, 0, 0],
        "b": [0, 3, 0, 0],
        "c": [0, -8, 0, 0],
    }


# --- the reference: whole models in float64, one coordinate after the other ---


def reference(
    name: str, given: dict[str, Any], vectors: Mapping[str, dict[str, Tensor]]
) -> dict[str, dict[str, list[float]]]:
    """What each specialist adds to the base, by task and tensor."""
    use = {**get_method(name).settings, **given}
    tasks, own = list(vectors), list(vectors.values())
    share = 1 / len(own) if name == "magnitude-pruning" else use.get("density", 1.0)
    cut = trimmed(own, share, use.get("trim", "model"))
    threshold: Any = use.get("threshold")
    found: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}
    for tensor in own[0]:
        for number, task in enumerate(tasks):
            limit: Any = threshold[task] if isinstance(threshold, dict) else threshold
            added = []
            for i in range(len(own[0][tensor])):
                values = [float(vector[tensor][i]) for vector in own]
                kept = [float(vector[tensor][i]) for vector in cut]
                mine, together = values[number], sum(values)
                if name == "tall-ties":
                    together = agreeing(kept, mean=False)
                if name.startswith("tall"):
                    takes = abs(mine) >= limit * abs(together - mine)
                elif name == "emr":
                    sign = np.sign(together)
                    together = sign * max((abs(v) for v in values if np.sign(v) == sign), default=0)
                    takes = np.sign(mine) == sign
                elif name == "magnitude-masking":
                    takes = kept[number] != 0
                else:
                    takes, together = True, kept[number]
                added.append(together if takes else 0.0)
            found[task][tensor] = added
    if name == "emr":
        for number, task in enumerate(tasks):
            magnitude = sum(float(value.abs().sum()) for value in own[number].values())
            scale = magnitude / sum(abs(v) for part in found[task].values() for v in part)
            found[task] = {n: [scale * v for v in part] for n, part in found[task].items()}
    return found


def three(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, list[DeltaMember]]:
    base = tiny.save(folder / "base", tiny.base_tensors(dtype=dtype))
    return base, members_of(folder, base, dtype, 3)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_it_matches_the_dense_reference(tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    base, members = three(tmp_path)
    experts = get_method(name).experts(base, members, **given)
    vectors = {
        m.task: {
            n: sparse_delta(m).values(n).double() - base.tensor(n).view(-1).double()
            for n in sorted(m.delta.names)
        }
        for m in sorted(members, key=lambda member: member.task)
    }
    expected = reference(name, given, vectors)
    for task in experts.tasks:
        for tensor in base.names:
            before, found = base.tensor(tensor), edited(base, experts.for_task(task), tensor)
            if tensor not in expected[task]:
                assert torch.equal(found, before)
                continue
            change = torch.tensor(expected[task][tensor], dtype=torch.float64)
            after = round_once(before.view(-1).double() + change, before.dtype)
            if name == "emr":  # the scale is a sum of many; the reference adds in another order
                torch.testing.assert_close(found.view(-1), after, rtol=1e-6, atol=0)
            else:
                assert torch.equal(found.view(-1), after)


def stored(folder: Path, base: Checkpoint, experts: Experts) -> dict[str, Edits]:
    """The specialists as they are read back from files."""
    folder.mkdir()
    files = write_experts(folder, base, experts, {"base": "b"})

    def patch(_: str) -> Path:
        assert files.shared is not None
        return files.shared

    return {task: open_expert(path, patch) for task, path in files.tasks.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_streamed_and_stored_specialists_have_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    base, members = three(tmp_path, dtype)
    experts = get_method(name).experts(base, members)
    whole = {
        (task, tensor): edited(base, experts.for_task(task), tensor)
        for task in experts.tasks
        for tensor in base.names
    }
    for tensor in tiny.LOCALIZABLE:
        assert any(not whole[t, tensor].equal(base.tensor(tensor)) for t in experts.tasks)
    monkeypatch.setattr("restitch.merging.rules.elementwise.BLOCK", 7)
    read = stored(tmp_path / "files", base, experts)
    for (task, tensor), wanted in whole.items():
        for edits in (experts.for_task(task), read[task]):
            flat = base.tensor(tensor).clone().view(-1)
            assert isinstance(edits, StreamedEdits)
            edit = edits.editor(tensor) if tensor in edits.names else len
            for part in torch.split(flat, 13):
                edit(part)
            assert flat.view(torch.uint8).equal(wanted.view(-1).view(torch.uint8))


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_members_changes_no_byte_of_any_file(tmp_path: Path, name: str) -> None:
    base, members = three(tmp_path)
    written = set()
    for number, order in enumerate((members, members[::-1])):
        folder = tmp_path / f"order-{number}"
        folder.mkdir()
        files = write_experts(folder, base, get_method(name).experts(base, order), {})
        shared = b"" if files.shared is None else files.shared.read_bytes()
        written.add((shared, *(path.read_bytes() for path in files.tasks.values())))
    assert len(written) == 1


def test_an_exported_specialist_is_base_plus_mask_times_multi_task_vector(tmp_path: Path) -> None:
    base, members = three(tmp_path)
    read = stored(tmp_path / "files", base, get_method("tall").experts(base, members))
    by_task = {member.task: sparse_delta(member) for member in members}
    for task, edits in read.items():
        out = tmp_path / "out" / task
        out.mkdir(parents=True)
        export_weights(base, edits, out)
        found = Checkpoint.open(out)
        for name in base.names:
            before = base.tensor(name)
            if name in tiny.LOCALIZABLE:
                start = before.double().view(-1)
                own = {t: delta.values(name).double() - start for t, delta in by_task.items()}
                together = own["x"] + own["y"] + own["z"]
                mask = own[task].abs() >= 0.4 * (together - own[task]).abs()
                merged = (start + together).to(before.dtype)
                before = torch.where(mask, merged, before.view(-1)).view(before.shape)
            assert torch.equal(found.tensor(name), before)


def test_all_specialists_take_less_space_than_the_models(tmp_path: Path) -> None:
    base, members = three(tmp_path)
    for name in METHODS:
        (folder := tmp_path / name).mkdir()
        files = write_experts(folder, base, get_method(name).experts(base, members), {})
        paths = [*files.tasks.values(), *([files.shared] if files.shared else [])]
        sections = [Checkpoint.open(path).nbytes for path in paths]
        weights = sum(base.info(tensor).numel for tensor in tiny.LOCALIZABLE)
        # 32 bits of the multi-task vector and one of each mask per weight; a little per tensor.
        assert sum(sections) <= weights * (32 + 3) / 8 + 8 * len(paths) * len(tiny.LOCALIZABLE)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_for_experts_gives_no_merged_model_and_explains_why(
    tmp_path: Path, name: str
) -> None:
    base, members = three(tmp_path)
    with pytest.raises(BadInput, match="one for each task") as refused:
        get_method(name)(base, members)
    assert f"compare --methods {name}" in refused.value.message()
    assert get_method(name).experts(base, ()).tasks == ()


def test_a_merged_method_gives_no_experts_and_other_kinds_are_refused(tmp_path: Path) -> None:
    base, _ = three(tmp_path)
    with pytest.raises(ValueError, match="gives no experts"):
        get_method("ties").experts(base, ())
    with pytest.raises(ValueError, match="unknown kind"):

        @method(name="odd", version=1, source="none", exact=True, kind="both")
        def odd(base: object, members: object) -> Edits:
            raise AssertionError


@pytest.mark.parametrize(
    "given", [{"threshold": -0.1}, {"threshold": {"x": 0.4, "y": 11, "z": 1}}, {"threshold": {}}]
)
def test_bad_thresholds_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    base, members = three(tmp_path)
    with pytest.raises(BadInput, match="threshold"):
        get_method("tall").experts(base, members, **given)


@pytest.mark.parametrize("scale", ["nan", "inf", "-1", "1x", "0x1p+99999"])
def test_a_scale_that_is_not_a_number_is_damage(tmp_path: Path, scale: str) -> None:
    from restitch.merging.files.mask_file import MaskWriter

    with MaskWriter(tmp_path) as writer:
        writer.finish(tmp_path / "mask", {"shared": "d", "scale": scale})
    with pytest.raises(Damage, match="mask is damaged"):
        open_expert(tmp_path / "mask", lambda _: tmp_path)
