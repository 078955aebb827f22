"""The licence that a model's card states: read to a bound, taken literally, never guessed."""

import os
from pathlib import Path

import pytest

from restitch.modeling import licence
from restitch.modeling.licence import Licence, read_licence


def stated(tmp_path: Path, front: str, rest: str = "# A model\n") -> Licence | None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n{rest}", encoding="utf-8")
    return read_licence(tmp_path)


def test_a_licence_is_read_from_the_front_matter(tmp_path: Path) -> None:
    front = "language: en\nlicense: apache-2.0\ntags: [a, b]\ndate: 2020-01-01"
    assert stated(tmp_path, front) == Licence(("apache-2.0",))
    assert read_licence(tmp_path / "README.md") == Licence(("apache-2.0",))


def test_a_licence_of_its_own_keeps_its_name_and_link(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: llama3\nlicense_link: https://example.org/LICENSE"
    found = stated(tmp_path, front)
    assert found == Licence(("other",), "llama3", "https://example.org/LICENSE")
    assert str(found) == "other, llama3, https://example.org/LICENSE"


def test_several_licences_are_all_kept(tmp_path: Path) -> None:
    assert stated(tmp_path, "license: [mit, apache-2.0]") == Licence(("apache-2.0", "mit"))


def test_a_card_with_windows_line_ends_and_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# A model")
    assert read_licence(tmp_path) == Licence(("mit",))


def test_a_card_is_read_through_a_link_as_the_hub_cache_has_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "blob")
    assert read_licence(folder) == Licence(("mit",))


def test_no_licence_is_guessed(tmp_path: Path) -> None:
    assert read_licence(tmp_path) is None
    assert read_licence(tmp_path / "gone") is None
    (tmp_path / "LICENSE").write_text("MIT License", encoding="utf-8")
    assert stated(tmp_path, "tags: [a]") is None
    (tmp_path / "README.md").write_text("license: mit\n", encoding="utf-8")
    assert read_licence(tmp_path) is None


def test_a_long_text_after_the_front_matter_is_ignored(tmp_path: Path) -> None:
    assert stated(tmp_path, "license: mit", "é" * licence.MAX_BYTES) == Licence(("mit",))


@pytest.mark.parametrize(
    "front",
    [
        "license:",
        "license: 1",
        "license: true",
        "license: {a: b}",
        "license: [mit, {a: b}]",
        "license: []",
        "license: 'mit | <b>x</b>'",
        "license: |\n  mit\n  gpl",
        "license: mit\nlicense: gpl-3.0",
        "license: [",
        "license: &a mit\nx: *a",
        "license: mit\nx: " + "[" * 5_000 + "]" * 5_000,
        "license: mit\nx: [" + "1, " * 10_000 + "]",
        "license: !!python/object/apply:os.system ['true']",
        "- license: mit",
        "license: " + "a" * 65,
        "license: mit\nx: " + "a" * licence.MAX_BYTES,
    ],
)
def test_hostile_or_unusual_front_matter_states_no_licence(tmp_path: Path, front: str) -> None:
    assert stated(tmp_path, front) is None


def test_an_odd_name_or_link_is_left_out(tmp_path: Path) -> None:
    assert stated(tmp_path, "license: other\nlicense_name: 5\nlicense_link: 'javascript:x'") == (
        Licence(("other",))
    )
    assert stated(tmp_path, 'license: other\nlicense_name: "a\\nb"') == Licence(("other",))


def test_bytes_that_are_not_text_state_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert read_licence(tmp_path) is None


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert read_licence(tmp_path) is None
