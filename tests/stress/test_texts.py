"""Hostile line and task files give a specification or an explained error, quickly."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from restitch.flows.lines.adopt_mlflow import _parsed
from restitch.merging.errors import BadInput
from restitch.registry.home import Home
from restitch.registry.sources.resolve import pin_data, resolve_source
from restitch.registry.specs.files import load_line, load_task
from restitch.registry.specs.strict_yaml import parse_mapping
from tests.stress.hostile_texts import LINE, TASK, check_line, check_task, lines, tasks


@settings(max_examples=100)
@given(lines())
def test_any_line_file_is_refused_or_survives_a_round_trip(data: bytes) -> None:
    check_line(data)


@settings(max_examples=100)
@given(tasks())
def test_any_task_file_is_refused_or_survives_a_round_trip(data: bytes) -> None:
    check_task(data)


def test_the_files_that_the_fuzzer_damages_are_valid() -> None:
    assert check_line(json.dumps(LINE).encode()) == "read"
    assert check_task(json.dumps(TASK).encode()) == "read"


# Found by the fuzzer: each one caused an error without an explanation.
NO_PATHS = ["n" * 300, "a/" * 3000, "~nobody-at-all/x", "a\0b", "\ud800"]


@pytest.mark.parametrize("text", NO_PATHS, ids=ascii)
def test_impossible_paths_are_refused(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path / "home")
    for base in (LINE | {"base": text}, LINE | {"retention": text}):
        with pytest.raises(BadInput):
            load_line(written(tmp_path, base))
    for task in (TASK | {"head": {"labels": text}}, TASK | {"data": {"path": text}}):
        with pytest.raises(BadInput):
            load_task(written(tmp_path, task))
    with pytest.raises(BadInput):
        resolve_source(text, home)
    if "a/" in text or "nnn" in text:
        with pytest.raises(BadInput):
            pin_data(text)


@pytest.mark.parametrize("name", ["pipe", "pipe.json", "loop"])
def test_a_pipe_or_a_loop_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BadInput):
        load_task(written(tmp_path, {"task": "t", "head": {"labels": name}}))
    with pytest.raises(BadInput):
        load_line(written(tmp_path, LINE | {"retention": f"./{name}"}))
    with pytest.raises(BadInput):
        load_line(tmp_path / name)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e400", "0x" + "f" * 5000])
def test_a_setting_must_be_a_finite_number(tmp_path: Path, number: str) -> None:
    text = f"line: demo\nbase: o/b\nfamily: text\nmethod: {{name: m, settings: {{a: {number}}}}}\n"
    with pytest.raises(BadInput):
        load_line(written(tmp_path, text))


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\0"', '["a", "\\udfff"]', '{"a\\0": 1}'])
def test_half_a_surrogate_pair_and_nul_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not allowed in text"):
        parse_mapping(f"a: {text}", "the file")


@pytest.mark.parametrize(
    "number", ["1" + ":1" * 500_000, "9" * 1_000_000, "0x" + "f" * 5000, "1" + ":1" * 300 + ".5"]
)
def test_a_number_of_a_megabyte_is_refused_without_parsing_it(number: str) -> None:
    # In base 60, which is part of YAML 1.1, the first one would take hours.
    with pytest.raises(BadInput, match="is too long"):
        parse_mapping(f"a: {number}", "the file")


def test_anchors_that_explode_cost_nothing() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    with pytest.raises(BadInput, match="with its aliases"):
        parse_mapping("\n".join(rows), "the file")


def test_a_megabyte_of_values_is_refused_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from restitch.registry.specs.strict_yaml import _Loader

    composed = 0
    compose = _Loader.compose_node

    def counted(self: _Loader, *args: Any) -> Any:
        nonlocal composed
        composed += 1
        return compose(self, *args)

    monkeypatch.setattr("restitch.registry.specs.strict_yaml._MAX_VALUES", 2000)
    monkeypatch.setattr(_Loader, "compose_node", counted)
    with pytest.raises(BadInput, match="more than 2,000 values"):
        parse_mapping("a:\n" + "- b\n" * 250_000, "the file")
    assert composed <= 2001


@pytest.mark.parametrize(
    "tag", ["file://[", "file:///a%00b", "/a\0b", "/" + "n" * 300, "file:///" + "a/" * 3000]
)
def test_an_mlflow_tag_without_a_file_is_refused(tag: str) -> None:
    # Anyone who can register a version can set its tags; the line must continue.
    with pytest.raises(BadInput):
        _parsed("colour", tag)


def written(folder: Path, values: object) -> Path:
    file = folder / "file.yaml"
    text = values if isinstance(values, str) else json.dumps(values)
    file.write_text(text, encoding="utf-8")
    return file
