import pytest

from restitch.merging.errors import BadInput
from restitch.merging.files.coordinates import select_tensors

NAMES = ["m.layers.10.w", "m.layers.2.w", "m.layers.2.norm", "m.embed", "head"]


def test_globs_match_across_dots_and_the_result_is_sorted() -> None:
    assert select_tensors(NAMES, ["m.layers.*"]) == [
        "m.layers.10.w",
        "m.layers.2.norm",
        "m.layers.2.w",
    ]


def test_include_adds_and_exclude_wins() -> None:
    chosen = select_tensors(NAMES, ["m.layers.*"], include=["*embed", "head"], exclude=["*d"])
    assert chosen == ["m.layers.10.w", "m.layers.2.norm", "m.layers.2.w"]


def test_case_matters() -> None:
    with pytest.raises(BadInput):
        select_tensors(NAMES, ["M.layers.*"])


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(key: str) -> None:
    with pytest.raises(BadInput, match=r"typo\.\*"):
        select_tensors(NAMES, ["m.*"], **{key: ["typo.*"]})
