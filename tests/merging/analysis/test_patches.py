"""Two patches on one base: how many weights differ, against the models themselves."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restitch.merging.analysis.patches import count_differences
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse


def patch(path: Path, **tensors: dict[int, float]) -> SparseFile:
    write_sparse(
        path,
        [
            SparseTensor(
                name,
                (12,),
                torch.tensor(sorted(kept), dtype=torch.int64),
                torch.tensor([kept[k] for k in sorted(kept)], dtype=torch.float32),
            )
            for name, kept in sorted(tensors.items())
        ],
        kind="patch",
        metadata={},
    )
    return SparseFile.open(path)


def test_differences_by_hand(tmp_path: Path) -> None:
    first = patch(tmp_path / "a", x={0: 1.0, 3: 2.0, 11: 5.0}, y={1: 1.0})
    second = patch(tmp_path / "b", x={0: 1.0, 3: 2.5, 4: 1.0}, z={0: 1.0, 1: 1.0})
    # In x: 3 has other values, 4 and 11 are in one of them; y and z are in one of them whole.
    assert count_differences(first, second) == {"x": 3, "y": 1, "z": 2}
    assert count_differences(first, first) == {}


def test_weights_are_compared_as_bits(tmp_path: Path) -> None:
    first = patch(tmp_path / "a", x={0: 0.0, 1: float("nan"), 2: 1.0})
    second = patch(tmp_path / "b", x={0: -0.0, 1: float("nan"), 2: 1.0})
    assert count_differences(first, second) == {"x": 1}


kept = st.dictionaries(st.integers(0, 11), st.sampled_from([1.0, 2.0, 3.0]), min_size=1)


@settings(max_examples=60)
@given(kept, kept)
def test_the_count_is_that_of_the_whole_models(tmp_path_factory, one, other) -> None:
    folder = tmp_path_factory.mktemp("patches")
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Ranges shorter than the tensor, so that seams are crossed.
        monkeypatch.setattr("restitch.merging.analysis.patches._RANGE", 5)
        found = count_differences(patch(folder / "a", x=one), patch(folder / "b", x=other))
    models = [torch.zeros(12), torch.zeros(12)]
    for model, changes in zip(models, (one, other), strict=True):
        for place, value in changes.items():
            model[place] = value
    assert sum(found.values()) == int((models[0] != models[1]).sum())
