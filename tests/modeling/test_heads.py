"""Heads: what users may describe, the bytes that are stored, and their key."""

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from restitch.merging.digests import digest_json
from restitch.merging.errors import Damage
from restitch.modeling.heads import Head, embed_prompts, head_key
from restitch.registry.specs.head import HeadSpec

SPEC = HeadSpec(labels=("a", "b"), templates=("{}", "the {}"), scale=3.0, max_length=7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ()}, "needs labels"),
        ({"labels": ("a",), "templates": ()}, "needs at least one template"),
        ({"labels": ("a",), "templates": ("a photo",)}, "has no '{}' for the label"),
        ({"labels": ("a",), "scale": 0.0}, "scale\\n.*greater than 0"),
        ({"labels": ("a",), "scale": float("nan")}, "scale\\n.*finite"),
        ({"labels": ("a",), "scale": float("inf")}, "scale\\n.*finite"),
        ({"labels": ("a",), "max_length": 0}, "max_length\\n.*greater than or equal to 1"),
    ],
)
def test_an_impossible_description_is_an_error(fields, message):
    with pytest.raises(ValidationError, match=message):
        HeadSpec(**fields)


def test_labels_are_put_into_templates_as_they_are():
    spec = HeadSpec(labels=("{x}", "{}"), templates=("a {} and {}", "{{}}"))
    assert spec.prompts() == ["a {x} and {x}", "{{x}}", "a {} and {}", "{{}}"]


def test_a_stored_head_is_exactly_these_bytes():
    head = Head({"weight": torch.tensor([[1.0, -2.0]])}, HeadSpec(labels=("é",)))
    metadata = (
        '{"__metadata__":{"restitch_head":"{\\"format\\":1,\\"spec\\":{\\"labels\\":[\\"é\\"],'
        '\\"max_length\\":null,\\"scale\\":null,\\"templates\\":[\\"{}\\"]}}"},'
        '"weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    ).encode()
    padded = metadata + b" " * (-len(metadata) % 8)
    assert head.to_bytes() == (
        len(padded).to_bytes(8, "little") + padded + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    )


def test_a_head_survives_storing_with_any_tensors():
    tensors = {
        "weight": torch.randn(2, 3).T,
        "tokens": torch.arange(4),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    stored = Head.from_bytes(Head(tensors, SPEC).to_bytes())
    assert stored.spec == SPEC
    assert set(stored.tensors) == set(tensors)
    assert all(torch.equal(stored.tensors[n], tensors[n]) for n in tensors)
    assert stored.to_bytes() == Head(tensors, SPEC).to_bytes()


def test_bytes_that_are_not_a_head_are_damage():
    from safetensors.torch import save

    good = Head({"weight": torch.zeros(1)}, SPEC).to_bytes()
    newer = {"restitch_head": json.dumps({"format": 2})}
    for data in (
        b"",
        b"no head",
        good[:-2],
        save({"weight": torch.zeros(1)}),
        save({"weight": torch.zeros(1)}, metadata=newer),
    ):
        with pytest.raises(Damage):
            Head.from_bytes(data)


def test_every_input_of_a_head_changes_its_key():
    inputs: dict[str, Any] = {
        "family": "clip",
        "version": 1,
        "base": "b",
        "assets": "a",
        "spec": SPEC,
        "finetuned": None,
    }
    others = {
        "family": "text-encoder",
        "version": 2,
        "base": "c",
        "assets": "d",
        "finetuned": "f",
    }
    keys = {digest_json(head_key(**inputs))}
    keys |= {digest_json(head_key(**(inputs | {name: v}))) for name, v in others.items()}
    for spec in (
        HeadSpec(labels=("b", "a"), templates=SPEC.templates, scale=3.0, max_length=7),
        HeadSpec(labels=SPEC.labels, templates=("the {}", "{}"), scale=3.0, max_length=7),
        HeadSpec(labels=SPEC.labels, templates=SPEC.templates, scale=3.5, max_length=7),
        HeadSpec(labels=SPEC.labels, templates=SPEC.templates, scale=3.0, max_length=8),
        HeadSpec(labels=SPEC.labels, templates=SPEC.templates),
    ):
        keys.add(digest_json(head_key(**(inputs | {"spec": spec}))))
    assert len(keys) == 11


def test_each_distinct_text_is_embedded_once_and_progress_reaches_their_number():
    seen, done = [], []

    def embed(texts):
        seen.extend(texts)
        return torch.tensor([[float(len(t)), float(ord(t[0]))] for t in texts])

    spec = HeadSpec(labels=("cat", "dog", "cat"), templates=("{}", "{}", "a {}"))
    weight = embed_prompts(spec, embed, batch_size=3, progress=lambda *p: done.append(p))
    assert sorted(seen) == ["a cat", "a dog", "cat", "dog"]
    assert done == [(3, 4), (4, 4)]
    assert torch.equal(weight[0], weight[2])
    cat, a_cat = (
        torch.nn.functional.normalize(torch.tensor([float(len(t)), float(ord(t[0]))]), dim=0)
        for t in ("cat", "a cat")
    )
    expected = torch.nn.functional.normalize((2 * cat + a_cat) / 3, dim=0)
    torch.testing.assert_close(weight[0], expected)
