from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restitch.merging.errors import BadInput
from restitch.merging.files.coordinates import covering_globs, select_tensors

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


def test_covering_globs_are_the_shortest_prefixes_that_match_nothing_else() -> None:
    names = ["v.embed.a", "v.embed.b", "v.post.w", "logit", "t.x.w"]
    assert covering_globs(names, ["t.x.b", "t.layers.0"]) == ("logit", "t.x.w", "v.*")
    assert covering_globs(names, ["v.layers.w"]) == ("logit", "t.*", "v.embed.*", "v.post.*")
    assert covering_globs([], names) == ()


PARTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)


@given(st.sets(PARTS), st.sets(PARTS))
def test_covering_globs_match_all_names_and_no_other(names: set[str], others: set[str]) -> None:
    others -= names
    globs = covering_globs(names, others)
    matched = {n for n in names | others if any(fnmatchcase(n, glob) for glob in globs)}
    assert matched == names
