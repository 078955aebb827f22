from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restitch.merging.errors import BadInput
from restitch.merging.files.mask import Mask
from restitch.merging.localize.dataless import kept_count, localize_dataless
from restitch.merging.ranking.task_vector import TaskVector
from tests import tiny


def slow_mask(
    base: dict[str, Tensor], finetuned: dict[str, Tensor], names: tuple[str, ...], k: int
) -> Mask:
    """The reference: every score in one float64 array, sorted stably."""
    scores = []
    for name in names:
        pair = {base[name].dtype, finetuned[name].dtype}
        wide = torch.float64 if torch.float64 in pair else torch.float32
        scores.append((finetuned[name].to(wide) - base[name].to(wide)).abs().double().view(-1))
    flat = torch.cat(scores).numpy()
    kept = np.zeros(len(flat), dtype=bool)
    kept[np.argsort(-flat, kind="stable")[:k]] = True
    parts = torch.split(torch.from_numpy(kept), [score.numel() for score in scores])
    return Mask.of({name: part.nonzero().view(-1) for name, part in zip(names, parts, strict=True)})


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=60)
@given(st.data())
def test_the_mask_is_that_of_a_stable_sort_for_every_mix_of_types(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = ("a", "b", "c")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    base, finetuned = {}, {}
    for name in names:
        plain = torch.randn(data.draw(st.integers(1, 60)), generator=generator)
        noise = torch.randn(plain.shape, generator=generator) * 0.01
        base[name] = plain.to(data.draw(st.sampled_from(DTYPES)))
        finetuned[name] = (plain + noise).to(data.draw(st.sampled_from(DTYPES)))
    folder = tmp_path_factory.mktemp("pair")
    vector = TaskVector(tiny.save(folder / "b", base), tiny.save(folder / "f", finetuned), names)
    density = data.draw(st.floats(0, 1))
    mask = localize_dataless(vector, density)
    k = kept_count(density, vector.coordinates)
    assert mask.total == k
    assert mask.digest() == slow_mask(base, finetuned, names, k).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_the_same_bytes_with_one_and_two_threads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(700, 1000, generator=generator).to(dtype)}
    noise = torch.randn(700, 1000, generator=generator) * 0.01
    finetuned = {"w": (base["w"].float() + noise).to(dtype)}
    vector = TaskVector(tiny.save(tmp_path / "b", base), tiny.save(tmp_path / "f", finetuned), "w")
    expected = slow_mask(base, finetuned, ("w",), 35_000).digest()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert localize_dataless(vector, 0.05).digest() == expected
    finally:
        torch.set_num_threads(before)


def test_an_unchanged_model_keeps_the_lowest_coordinates(tmp_path: Path) -> None:
    tensors = tiny.base_tensors()
    base, same = tiny.save(tmp_path / "b", tensors), tiny.save(tmp_path / "f", tensors)
    mask = localize_dataless(TaskVector(base, same, tiny.LOCALIZABLE), 0.5)
    assert mask.names == ("layers.0.attn.weight", "layers.0.norm.weight")
    assert mask.coordinates("layers.0.norm.weight").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("density", "coordinates", "kept"),
    [
        (0.15, 10, 2),
        (0.05, 10, 1),
        (0.05, 9, 0),
        (0.0, 9, 0),
        (1.0, 9, 9),
        (0.01, 10_616_832, 106_168),
    ],
)
def test_k_is_the_density_of_the_coordinates_rounded_half_up(
    density: float, coordinates: int, kept: int
) -> None:
    assert kept_count(density, coordinates) == kept


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_is_a_fraction(density: float) -> None:
    with pytest.raises(BadInput, match="density"):
        kept_count(density, 10)
