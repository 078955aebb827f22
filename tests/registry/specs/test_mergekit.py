"""mergekit files: what they become, and everything that is refused at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from restitch.merging.errors import BadInput
from restitch.registry.specs.files import parse_merge
from restitch.registry.specs.once import MergeSpec


def read(values: dict[str, Any], folder: Path) -> MergeSpec:
    for name in ("base", "a", "b"):
        (folder / name).mkdir(exist_ok=True)
    return parse_merge(yaml.safe_dump(values), "kit.yaml", folder)


def models(*parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"model": f"./{name}", "parameters": given}
        for name, given in zip("ab", parameters, strict=False)
    ]


def test_ties_becomes_ties_over_all_tensors(tmp_path: Path) -> None:
    given = {"weight": 1.0, "density": 0.4}
    found = read(
        {
            "merge_method": "ties",
            "base_model": "./base",
            "models": [{"model": "./base"}, *models(given, given)],
            "parameters": {"normalize": True, "lambda": 0.8, "int8_mask": True},
            "dtype": "bfloat16",
            "tokenizer_source": "base",
        },
        tmp_path,
    )
    assert found.method.name == "ties"
    assert found.method.settings == {"density": 0.4, "alpha": 0.8, "trim": "tensor"}
    assert found.include == ("*",)
    assert found.base == str(tmp_path / "base")
    assert sorted(found.models.values()) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert found.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("values", "method", "settings"),
    [
        (
            {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5, "lambda": 0.8}},
            "task-arithmetic",
            {"alpha": 0.4},
        ),
        ({"merge_method": "linear", "parameters": {"weight": 0.3}}, "averaging", {}),
        (
            {"merge_method": "ties", "parameters": {"density": 0.3}},
            "ties",
            {"density": 0.3, "alpha": 1.0, "trim": "tensor"},
        ),
    ],
)
def test_parameters_of_all_models_count_for_each(
    tmp_path: Path, values: dict[str, Any], method: str, settings: dict[str, Any]
) -> None:
    found = read({"base_model": "./base", "models": models({}, {}), **values}, tmp_path)
    assert (found.method.name, found.method.settings) == (method, settings)


def test_everything_that_we_lack_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read(
            {
                "merge_method": "dare_ties",
                "base_model": "./base",
                "models": models({"weight": 0.5, "gamma": 1}, {"weight": [0.1, 0.9]}),
                "parameters": {"normalize": True, "rescale": False},
                "tokenizer_source": "union",
                "chat_template": "auto",
                "dtype": "float64",
                "out_dtype": ["bfloat16"],
            },
            tmp_path,
        )
    text = "\n".join(caught.value.details)
    for part in (
        "merge_method: dare_ties",
        "models 1: gamma: 1",
        "weight: [0.5, [0.1, 0.9]]: not one number per model",
        "parameters: rescale: False",
        "tokenizer_source: union",
        "chat_template: auto",
        "dtype: float64: not float32, bfloat16, float16",
        "out_dtype: ['bfloat16']: not float32, bfloat16, float16",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("types", "written"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"out_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "out_dtype": "float16"}, "float16"),
    ],
)
def test_the_type_is_the_one_that_mergekit_writes(
    tmp_path: Path, types: dict[str, str], written: str | None
) -> None:
    values = {"merge_method": "linear", "base_model": "./base", "models": models({}, {})}
    assert read({**values, **types}, tmp_path).dtype == written


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"models": models({"weight": 0.5}, {"weight": 0.4})}, "not the same for all"),
        ({"models": [{"model": "./base"}]}, "none besides the base"),
        ({"models": [{"model": "./a+./lora"}]}, "a model with an adapter on it"),
        ({"slices": [{"sources": []}]}, "slices"),
        ({"models": [3]}, "no mapping of keys"),
        ({"merge_method": "ties", "parameters": {"normalize": False}}, "normalize: false"),
        ({"merge_method": "task_arithmetic", "parameters": {"normalize": True}}, "normalize: true"),
        ({"merge_method": "linear", "models": [{"model": "./base"}]}, "the base as one"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "restitch computes in float32"),
        ({"dtype": "float16", "out_dtype": "bfloat16"}, "restitch computes in float32"),
    ],
)
def test_what_would_be_merged_in_another_way_is_refused(
    tmp_path: Path, values: dict[str, Any], problem: str
) -> None:
    common = {"merge_method": "ties", "base_model": "./base", "models": models({}, {})}
    with pytest.raises(BadInput, match="is a mergekit file that restitch cannot merge") as caught:
        read({**common, **values}, tmp_path)
    assert problem in "\n".join(caught.value.details)
