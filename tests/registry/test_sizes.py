import pytest

from restitch.merging.errors import BadInput
from restitch.registry.sizes import parse_age, parse_size


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "9223372036854775808", "0", "-1"])
def test_a_size_that_no_file_can_have_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not a file size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400 + "d", "999999999d", "12", "-1h"])
def test_an_age_that_no_calendar_holds_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not an age"):
        parse_age(text)


def test_sizes_and_ages_in_their_units() -> None:
    assert (parse_size("1.5 MB"), parse_size("7"), parse_size("1b")) == (1_500_000, 7, 1)
    assert (parse_age("90m"), parse_age("0.5d")) == (5400, 43_200)
