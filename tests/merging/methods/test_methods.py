from pathlib import Path

import pytest

from restitch.merging.errors import BadInput
from restitch.merging.files.edits import Edits, edited
from restitch.merging.methods.registry import get_method, method, method_names, resolve_settings
from restitch.merging.rules.stitch import stitch
from tests import tiny

PAPER = "localize-and-stitch"


def test_methods_are_found_by_scanning_the_folder() -> None:
    assert PAPER in method_names()
    found = get_method(PAPER)
    assert (found.exact, found.kind, found.settings) == (True, "merged", {"overlap": "mean"})


def test_every_method_names_its_source() -> None:
    for name in method_names():
        found = get_method(name)
        assert found.version >= 1
        assert found.source


def test_every_method_and_setting_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    listed = page.partition("\n## ")[0].splitlines()
    rows = {row.split("`")[1]: row for row in listed if row.startswith("| `")}
    assert set(rows) == set(method_names())
    for name, row in rows.items():
        found = get_method(name)
        assert ("whole task vectors" in row) == found.whole
        assert ("(numeric)" in row) == (not found.exact)
        assert all(f"`{key}: {value}`" in row for key, value in found.settings.items())


def test_only_settings_can_be_tuned() -> None:
    with pytest.raises(ValueError, match="no setting 'beta' to tune"):

        @method(name="odd", version=1, source="none", exact=True, tunes=("beta", (1.0,)))
        def odd(base: object, members: object, *, alpha: float = 1.0) -> Edits:
            raise AssertionError


def test_localize_and_stitch_is_stitching(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.base_tensors())
    members = [tiny.member(tmp_path, base, task, i) for i, task in enumerate("ab")]
    edits, plain = get_method(PAPER)(base, members), stitch(base, members)
    assert isinstance(edits, Edits)
    assert edits.names == plain.names
    for name in edits.names:
        assert edited(base, edits, name).equal(edited(base, plain, name))


def test_defaults_are_filled_in() -> None:
    assert resolve_settings(PAPER, {}) == {"overlap": "mean"}


def test_an_added_setting_with_its_default_changes_no_recipe() -> None:
    before = {"alpha": 1.0}
    assert resolve_settings("tsv-m", {}) == before
    assert resolve_settings("tsv-m", {"rank": 1}) == before
    assert resolve_settings("tsv-m", {"rank": 0.25}) == before | {"rank": 0.25}


def test_errors_about_unknown_names_suggest_the_nearest_one() -> None:
    with pytest.raises(BadInput, match="did you mean 'overlap'"):
        resolve_settings(PAPER, {"overlaps": "mean"})
    with pytest.raises(BadInput, match=f"did you mean '{PAPER}'"):
        get_method("localise-and-stitch")


def test_a_setting_of_another_type_is_an_error() -> None:
    with pytest.raises(BadInput, match="overlap"):
        resolve_settings(PAPER, {"overlap": 3})


def test_settings_need_defaults_and_names_are_unique() -> None:
    with pytest.raises(ValueError):

        @method(name="bare", version=1, source="none", exact=True)
        def bare(base: object, members: object, *, scale: float) -> Edits:
            raise AssertionError

    with pytest.raises(ValueError):

        @method(name=PAPER, version=1, source="none", exact=True)
        def again(base: object, members: object) -> Edits:
            raise AssertionError
