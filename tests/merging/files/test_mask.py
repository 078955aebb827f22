import pytest
import torch

from restitch.merging.files.mask import Mask, WholeMask


def test_a_mask_is_named_by_its_content_alone() -> None:
    one = Mask.of({"b": torch.tensor([1]), "a": torch.tensor([0, 7])})
    same = Mask.of({"a": torch.tensor([0, 7]), "b": torch.tensor([1]), "c": torch.tensor([])})
    other = Mask.of({"a": torch.tensor([0]), "b": torch.tensor([1, 7])})
    assert one.names == same.names == ("a", "b")
    assert one.total == 3
    assert one.digest() == same.digest() != other.digest()


def test_a_mask_does_not_change_with_what_it_was_made_of() -> None:
    source = torch.tensor([0, 7])
    mask = Mask.of({"a": source})
    source[0] = 3
    assert mask.coordinates("a").tolist() == [0, 7]
    assert mask.coordinates("absent").tolist() == []


@pytest.mark.parametrize("wrong", [[1, 0], [1, 1], [-1, 2], [[1, 2]]])
def test_coordinates_are_sorted_and_distinct(wrong: list[int]) -> None:
    with pytest.raises(ValueError):
        Mask.of({"a": torch.tensor(wrong)})


def test_the_mask_of_everything_has_the_digest_of_its_coordinates() -> None:
    counts = {"b": 3, "a": 5, "empty": 0, "c": 3}
    whole = WholeMask(counts)
    same = Mask.of({name: torch.arange(count) for name, count in counts.items()})
    assert whole.names == same.names == ("a", "b", "c")
    assert whole.digest() == same.digest()
    assert whole.coordinates("a").tolist() == [0, 1, 2, 3, 4]


def test_long_tensors_are_hashed_piece_by_piece() -> None:
    count = 3 * 2**16 + 1
    assert (
        WholeMask({"a": count}).digest()
        == Mask({"a": count}, lambda _: torch.arange(count)).digest()
    )
