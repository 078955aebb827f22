import time

import pytest

from restitch.merging.errors import BadInput
from restitch.registry.specs.strict_yaml import MAX_BYTES, parse_mapping, read_text


def refused(text: str) -> str:
    began = time.process_time()
    with pytest.raises(BadInput) as raised:
        parse_mapping(text, "file.yaml")
    assert time.process_time() - began < 2
    assert "file.yaml" in str(raised.value)
    return str(raised.value)


def test_plain_values_are_what_they_look_like():
    text = "a: 1e-3\nb: 1.5\nc: -2\nd: 2026-03-01\ne: x\nf: null\ng: [1, {h: true}]\ni: '1'\nj: 1E5"
    assert parse_mapping(text, "file.yaml") == {
        "a": 0.001,
        "b": 1.5,
        "c": -2,
        "d": "2026-03-01",
        "e": "x",
        "f": None,
        "g": [1, {"h": True}],
        "i": "1",
        "j": 100000.0,
    }


def test_a_key_may_occur_once():
    assert "line 2: the key 'a' occurs twice" in refused("a: 1\na: 2\n")
    assert "occurs twice" in refused("a:\n  b: 1\n  b: 1\n")


def test_a_key_is_a_text():
    assert "the key 1 is not a text" in refused("1: a")
    assert "is not a text" in refused("? [a]\n: b")
    assert "the key True is not a text" in refused("yes: b")


def test_a_few_aliases_are_accepted():
    assert parse_mapping("a: &x [1]\nb: *x", "f") == {"a": [1], "b": [1]}
    assert parse_mapping("a: &x {k: 1}\nb:\n  <<: *x\n  l: 2", "f")["b"] == {"k": 1, "l": 2}


def test_aliases_that_multiply_are_refused_before_they_do():
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for n in range(1, 30):
        text += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n"
    assert "more than 50,000 values" in refused(text)


def test_merge_keys_that_multiply_are_refused():
    text = "a0: &a0 {x: 1}\n"
    for n in range(1, 40):
        text += f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n"
    assert "more than 50,000 values" in refused(text)


def test_a_document_that_contains_itself_is_refused():
    assert "contains itself" in refused("a: &a [*a]")
    assert "contains itself" in refused("a: &a\n  b: *a")


def test_nesting_has_a_limit():
    assert "nested" in refused("a: " + "[" * 60 + "]" * 60)
    assert "nested" in refused("a: " + "[" * 100_000)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch /tmp/never']",
        "a: !!python/name:os.system",
        "!!python/object:os.system {}",
        "a: !custom b",
    ],
)
def test_only_plain_values_are_made(text):
    assert "not valid YAML" in refused(text)


@pytest.mark.parametrize("text", ["", "# nothing", "- a", "text", "3"])
def test_a_document_that_is_not_a_mapping_is_refused(text):
    assert "does not hold keys and values" in refused(text)


@pytest.mark.parametrize(
    "text", ["a: b: c", "a: [", "a: 'x", "\x00", "a: 1\n---\nb: 2", "a: \ud800"]
)
def test_broken_yaml_is_refused(text):
    assert "not valid YAML" in refused(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: c: d", "line 2, column 5: mapping values are not allowed here: b: c: d"),
        ("a: 1\n\tb: 2", "line 2, column 1: found character"),
        ("a: [1, 2", "line 1, column 9: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_broken_yaml_is_refused_with_its_place_in_one_line(text, problem):
    found = refused(text)
    assert problem in found
    assert len(found.splitlines()) == 2


def test_a_file_is_read_whole_or_refused(tmp_path):
    file = tmp_path / "line.yaml"
    for content, part in (
        (b"\xff\xfe", "not UTF-8"),
        (b"a" * (MAX_BYTES + 1), "too large"),
    ):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=part):
            read_text(file, "line file")
    with pytest.raises(BadInput, match=f"No such file[^$]*it means {tmp_path / 'gone'}"):
        read_text(tmp_path / "gone", "line file")
    with pytest.raises(BadInput, match="directory"):
        read_text(tmp_path, "line file")
    file.write_bytes("\ufeffa: ä".encode())
    assert read_text(file, "line file") == "a: ä"
