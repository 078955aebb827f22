"""Overlaps, Jaccard and cosines of masks: by hand, and against a dense slow reference."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.analysis.masks import MaskAnalysis, analyze_masks
from restitch.merging.errors import BadInput, Damage
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.rules.stitch import sparse_delta
from tests import tiny

Kept = dict[str, dict[int, float]]


def delta(path: Path, base: Checkpoint, kept: Kept, dtype: torch.dtype | None = None) -> SparseFile:
    """A delta with these finetuned values by tensor and coordinate."""

    def tensor(name: str) -> SparseTensor:
        info, at = base.info(name), sorted(kept[name])
        values = torch.tensor([kept[name][c] for c in at], dtype=torch.float64)
        coordinates = torch.tensor(at, dtype=torch.int64)
        return SparseTensor(name, info.shape, coordinates, values.to(dtype or info.dtype))

    write_sparse(path, map(tensor, sorted(kept)), kind="delta", metadata={})
    return SparseFile.open(path)


def slow(base: Checkpoint, deltas: dict[str, SparseFile]) -> MaskAnalysis:
    """The reference: whole dense masks and task vectors."""
    names = [n for n in base.names if any(n in d for d in deltas.values())]
    masks, vectors = [], []
    for file in deltas.values():
        mask = [np.zeros(base.info(n).numel, dtype=bool) for n in names]
        vector = [np.zeros(base.info(n).numel) for n in names]
        for i, name in enumerate(names):
            if name in file:
                at = file.coordinates(name).numpy()
                mask[i][at] = True
                before = base.tensor(name).reshape(-1).double().numpy()[at]
                vector[i][at] = file.values(name).double().numpy() - before
        masks.append(np.concatenate([np.empty(0, bool), *mask]))
        vectors.append(np.concatenate([np.empty(0), *vector]))

    def matrix(entry: Callable[[int, int], Any]) -> Any:
        return tuple(tuple(entry(i, j) for j in range(len(masks))) for i in range(len(masks)))

    def shared(i: int, j: int) -> int:
        return int((masks[i] & masks[j]).sum())

    def jaccard(i: int, j: int) -> float | None:
        union = int((masks[i] | masks[j]).sum())
        return shared(i, j) / union if union else None

    def cosine(i: int, j: int) -> float | None:
        lengths = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        return float(vectors[i] @ vectors[j] / lengths) if lengths else None

    owners = sum((m.astype(int) for m in masks), start=np.zeros(len(masks[0]) if masks else 0))
    return MaskAnalysis(
        tasks=tuple(deltas),
        kept={t: {n: d.info(n).kept for n in d.names} for t, d in deltas.items()},
        coordinates={n: base.info(n).numel for n in names},
        shared=matrix(shared),
        jaccard=matrix(jaccard),
        cosine=matrix(cosine),
        owners=tuple(int((owners == n).sum()) for n in range(1, len(masks) + 1)),
    )


def assert_same(found: MaskAnalysis, expected: MaskAnalysis) -> None:
    for name in ("tasks", "kept", "coordinates", "shared", "jaccard", "owners"):
        assert getattr(found, name) == getattr(expected, name), name
    for row, other in zip(found.cosine, expected.cosine, strict=True):
        assert [v is None for v in row] == [v is None for v in other]
        np.testing.assert_allclose(
            [v for v in row if v is not None], [v for v in other if v is not None], atol=1e-12
        )


def test_a_case_by_hand(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"v": torch.ones(3), "w": torch.zeros(2, 4), "x": torch.ones(2)})
    deltas = {
        "b": delta(tmp_path / "b", base, {"w": {0: 3.0, 1: 4.0}}),
        "a": delta(tmp_path / "a", base, {"v": {2: 1.0}, "w": {1: 2.0, 7: 1.0}}),
        "c": delta(tmp_path / "c", base, {"w": {1: -1.0}}),
    }
    found = analyze_masks(base, deltas)
    assert found.tasks == ("b", "a", "c"), "the order that was given"
    assert found.kept == {"b": {"w": 2}, "a": {"v": 1, "w": 2}, "c": {"w": 1}}
    assert found.coordinates == {"v": 3, "w": 8}, "no mask keeps anything of x"
    assert found.shared == ((2, 1, 1), (1, 3, 1), (1, 1, 1))
    jaccard = [[1, 1 / 4, 1 / 2], [1 / 4, 1, 1 / 3], [1 / 2, 1 / 3, 1]]
    assert [list(row) for row in found.jaccard] == jaccard
    # b = (3, 4) on w0 w1; a = 0 on v2, (2, 1) on w1 w7; c = -1 on w1.
    expected = [
        [1.0, 8 / (5 * 5**0.5), -4 / 5],
        [8 / (5 * 5**0.5), 1.0, -2 / 5**0.5],
        [-4 / 5, -2 / 5**0.5, 1.0],
    ]
    np.testing.assert_allclose(np.array(found.cosine, dtype=float), expected, rtol=1e-15)
    assert found.owners == (3, 0, 1), "w0, w7 and v2 have one owner, w1 has three"


def test_a_kept_value_equal_to_the_base_has_no_direction(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.ones(4)})
    deltas = {
        "a": delta(tmp_path / "a", base, {"w": {0: 1.0}}),
        "b": delta(tmp_path / "b", base, {"w": {0: 2.0}}),
        "none": delta(tmp_path / "none", base, {}),
    }
    found = analyze_masks(base, deltas)
    assert found.cosine == ((None, None, None), (None, 1.0, None), (None, None, None))
    assert [list(row) for row in found.jaccard] == [[1, 1, 0], [1, 1, 0], [0, 0, None]]
    assert found.kept["none"] == {}


def test_no_member_and_one_member_are_analyzed(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, {"w": torch.zeros(4)})
    assert analyze_masks(base, {}).owners == ()
    found = analyze_masks(base, {"a": delta(tmp_path / "a", base, {"w": {3: 2.0}})})
    assert (found.jaccard, found.cosine, found.owners) == (((1.0,),), ((1.0,),), (1,))


values = st.floats(-8, 8, width=16)
masks = st.fixed_dictionaries(
    {}, optional={n: st.dictionaries(st.integers(0, 40), values, min_size=1) for n in ("v", "w")}
)


@settings(max_examples=60)
@given(
    kept=st.lists(masks, max_size=6),
    block=st.sampled_from([1, 7, 41, 1 << 14]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_analysis_is_that_of_dense_masks(
    kept: list[Kept], block: int, dtype: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Ranges shorter than the tensors, so that every seam is crossed.
        patch.setattr("restitch.merging.analysis.masks._RANGE", block)
        generator = torch.Generator().manual_seed(0)
        tensors = {n: torch.randn(41, generator=generator).to(dtype) for n in ("u", "v", "w")}
        base = tiny.save(Path(folder) / "base", tensors)
        deltas = {
            f"t{i}": delta(Path(folder) / f"{i}", base, k, torch.float32)
            for i, k in enumerate(kept)
        }
        assert_same(analyze_masks(base, deltas), slow(base, deltas))


def test_large_tensors_in_several_ranges_with_every_encoding(tmp_path: Path) -> None:
    numel, generator = 300_001, torch.Generator().manual_seed(1)
    weights = torch.randn(numel, generator=generator)
    base = tiny.save(tmp_path, {"w": weights.bfloat16()})
    deltas = {}
    for density in (0.01, 0.3, 0.5, 0.99, 1.0):
        at = (torch.rand(numel, generator=generator) < density).nonzero().view(-1)
        kept = SparseTensor("w", (numel,), at, torch.randn(len(at), generator=generator))
        write_sparse(tmp_path / f"{density}", [kept], kind="delta", metadata={})
        deltas[f"{density}"] = SparseFile.open(tmp_path / f"{density}")
    assert_same(analyze_masks(base, deltas), slow(base, deltas))


def test_progress_ends_with_all_elements(tmp_path: Path) -> None:
    base = tiny.save(tmp_path, tiny.base_tensors())
    seen: list[tuple[int, int]] = []
    member = tiny.member(tmp_path, base, "a", 0)
    analyze_masks(base, {"a": sparse_delta(member)}, lambda *at: seen.append(at))
    assert seen[-1] == (136, 136)


def test_an_analysis_survives_json(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    found = analyze_masks(
        base, {t: sparse_delta(tiny.member(tmp_path, base, t, i)) for i, t in enumerate("ab")}
    )
    assert MaskAnalysis.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(Damage, match="analysis"):
        MaskAnalysis.from_json({"tasks": ["a"]})


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", {"w": torch.zeros(2, 4), "v": torch.zeros(2)})
    file = delta(tmp_path / "a", base, {"v": {0: 1.0}, "w": {3: 2.0}})
    other = tiny.save(tmp_path / "other", {"w": torch.zeros(4, 2)})
    with pytest.raises(BadInput, match="does not fit") as caught:
        analyze_masks(other, {"mnist": file})
    assert "base has none" in str(caught.value)
    assert "base [4, 2], delta [2, 4]" in str(caught.value)
