from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from restitch.registry.specs.schema import schema_of
from tests.registry.specs.schemas import schema_problems

LINE = "line: demo\nbase: org/model\nfamily: clip\n"


def keys(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of a schema and its parts, as `Owner.key`."""
    for owner in (schema, *schema["$defs"].values()):
        for key, described in owner.get("properties", {}).items():
            yield f"{owner['title']}.{key}", described


@pytest.mark.parametrize("kind", ["line", "task"])
def test_every_key_is_described_in_one_sentence(kind):
    described = dict(keys(schema_of(kind)))
    assert len(described) > 10
    for name, key in described.items():
        assert key.get("description", "").endswith("."), name
        assert "\n" not in key["description"], name


@pytest.mark.parametrize("kind", ["line", "task"])
def test_every_example_and_default_fits_its_own_key(kind):
    schema = schema_of(kind)
    for name, key in keys(schema):
        validator = Draft202012Validator({**key, "$defs": schema["$defs"]})
        values = [*key.get("examples", []), *([key["default"]] if "default" in key else [])]
        for value in values:
            assert not list(validator.iter_errors(value)), f"{name}: {value}"


@pytest.mark.parametrize(
    "text",
    [
        "method: ties",
        "method: {name: ties, settings: {density: 0.2}}",
        "method: {tournament: [ties, {name: linear}], objective: mean, at_most: 2}",
        "method: {tournament: [ties, linear], objective: {accuracy: 1, min_retention: 0.9}}",
        "method: ties\nlocalize:\ngates:\nactors:",
        "method: ties\nlocalize: {density: auto, budget: 20MB}",
        "method: ties\ngates: {max_patch_bytes: 1.5 gb, warn: [max_patch_bytes]}",
        "method: ties\nretention: tasks/imagenet.yaml",
        "method: ties\nretention: {task: x, data: {path: a, input: t, sample: 10}}",
        "method: ties\nactors: [a, b]",
        "method: ties\nactors: {promote: [a]}",
    ],
)
def test_short_forms_are_accepted(text):
    assert schema_problems("line", LINE + text) == []


@pytest.mark.parametrize(
    "text",
    [
        "methd: ties",
        "method: {nam: ties}",
        "method: {tournament: [ties]}",
        "method: {tournament: [ties, linear], objektive: mean}",
        "method: ties\nlocalize: {densty: 1}",
        "method: ties\nlocalize: {density: atuo}",
        "method: ties\nlocalize: {budget: many}",
        "method: ties\ngates: {min_retension: 1}",
        "method: ties\ngates: {warn: [min_retension]}",
        "method: ties\nretention: {task: x, dat: {}}",
        "method: ties\nretention: {task: x, data: {path: a, colour: t}}",
        "method: ties\nactors: {promot: [a]}",
        "method: ties\nrequire_device: tpu",
    ],
)
def test_typos_are_rejected(text):
    assert schema_problems("line", LINE + text)


def test_a_line_or_task_without_its_required_keys_is_rejected():
    assert schema_problems("line", "line: demo")
    assert schema_problems("task", "metric: f1")
    assert schema_problems("task", "task: A B")
