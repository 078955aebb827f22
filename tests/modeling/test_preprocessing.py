"""Tokenizer, image processor and chat template of a finetuned folder against its base's."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from restitch.modeling.preprocessing import Preprocessing, compare_preprocessing, unused_modules

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def edited(bert, clip, tmp_path):
    """A copy of a folder with one changed JSON file."""

    def edit(file: str, change: Edit, base: Path | None = None) -> Path:
        folder: Path = tmp_path / f"edited{len(list(tmp_path.iterdir()))}"
        shutil.copytree(base or bert, folder)
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))
        return folder

    return edit


def renamed_token(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["@@"] = vocabulary.pop("!")


def added_token(tokenizer: dict[str, Any]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": 260, "content": "[ENT]", "special": True, **flags})


def merged_bytes(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["ab"] = 260
    tokenizer["model"]["merges"] = [["a", "b"]]


TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "lower case": (
        lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}),
        "tokenizer normalizer.type: base None, finetuned 'Lowercase'",
    ),
    "other splitting": (
        lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True),
        "tokenizer pre_tokenizer.add_prefix_space: base False, finetuned True",
    ),
    "other special tokens around a text": (
        lambda tokenizer: tokenizer.update(post_processor=None),
        "tokenizer post_processor",
    ),
    "another token": (
        renamed_token,
        "tokenizer vocabulary: 1 token (base 260 tokens, finetuned 260): '!'",
    ),
    "other merges": (merged_bytes, "tokenizer merges"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_another_tokenizer_is_a_difference(bert, edited, case):
    change, named = TOKENIZERS[case]
    found = compare_preprocessing(bert, edited("tokenizer.json", change))
    assert any(line.startswith(named) for line in found.differences), found


TRUNCATION = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 258,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.update(truncation={**TRUNCATION, "max_length": 7}),
        lambda tokenizer: tokenizer.update(padding=PADDING),
        lambda tokenizer: tokenizer.update(decoder={"type": "Fuse"}),
    ],
)
def test_what_the_last_call_left_in_the_file_does_not_count(bert, edited, change):
    assert compare_preprocessing(bert, edited("tokenizer.json", change)) == Preprocessing()


def test_the_side_of_padding_counts_and_the_longest_text_is_a_note(bert, edited):
    other = edited("tokenizer_config.json", lambda config: config.update(padding_side="left"))
    found = compare_preprocessing(bert, other)
    assert found.differences == ("tokenizer padding_side: base 'right', finetuned 'left'",)
    shorter = edited("tokenizer_config.json", lambda config: config.update(model_max_length=32))
    found = compare_preprocessing(bert, shorter)
    assert found.differences == ()
    assert found.notes == (
        "tokenizer model_max_length: base 64, finetuned 32; the task's max_length counts",
    )


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def test_what_the_folder_leaves_out_is_the_base_s(bert, clip, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json")
    shutil.copytree(bert, tmp_path / "bert")
    found = compare_preprocessing(bert, without(tmp_path / "bert", *names))
    assert found == Preprocessing((), ("it has no tokenizer: the base's is used",))
    shutil.copytree(clip, tmp_path / "clip")
    without(tmp_path / "clip", *names, "preprocessor_config.json")
    found = compare_preprocessing(clip, tmp_path / "clip")
    assert found.differences == ()
    assert found.notes == (
        "it has no tokenizer: the base's is used",
        "it has no image processor: the base's is used",
    )


def test_a_broken_tokenizer_is_a_difference(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (found,) = compare_preprocessing(bert, tmp_path / "broken").differences
    assert "cannot be read" in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_mean": [0.5] * 3}, "image processor image_mean"),
        ({"image_std": [0.5] * 3}, "image processor image_std"),
        ({"size": {"shortest_edge": 48}}, "image processor size.shortest_edge"),
        ({"crop_size": {"height": 8, "width": 8}}, "image processor crop_size.height"),
        ({"resample": 2}, "image processor resample"),
        ({"do_center_crop": False}, "image processor do_center_crop"),
        ({"rescale_factor": 1.0}, "image processor rescale_factor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_image_processor_is_a_difference(clip, edited, change, named):
    other = edited("preprocessor_config.json", lambda values: values.update(change), clip)
    found = compare_preprocessing(clip, other)
    assert found.differences
    assert found.differences[0].startswith(named)


def test_the_name_of_the_processor_does_not_count(clip, edited):
    change = {"image_processor_type": "CLIPImageProcessorFast", "processor_class": "CLIPProcessor"}
    other = edited("preprocessor_config.json", lambda values: values.update(change), clip)
    assert compare_preprocessing(clip, other) == Preprocessing()


@pytest.fixture
def with_template(edited):
    """A copy of the tiny BERT with a chat template."""

    def make(text: str) -> Path:
        folder: Path = edited(
            "tokenizer_config.json", lambda values: values.update(chat_template=text)
        )
        return folder

    return make


def test_a_chat_template_is_compared_if_the_base_has_one(bert, with_template):
    ours, theirs = with_template("{{ a }}"), with_template("{{ b }}")
    found = compare_preprocessing(bert, ours)
    assert found.differences == ()
    assert found.notes == ("it has a chat template, the base has none: it is not used",)
    differences = compare_preprocessing(ours, theirs).differences
    assert differences == ("chat template: base '{{ a }}', finetuned '{{ b }}'",)
    assert compare_preprocessing(ours, bert) == Preprocessing()


def test_a_long_value_is_cut_to_where_it_differs(with_template):
    start, end = "x" * 500, "y" * 500
    ours, theirs = with_template(f"{start}one{end}"), with_template(f"{start}two{end}")
    (found,) = compare_preprocessing(ours, theirs).differences
    assert len(found) < 200
    assert "one" in found
    assert "two" in found


def test_folders_of_another_layout_are_not_compared(tmp_path):
    assert compare_preprocessing(tmp_path, tmp_path) == Preprocessing()


def test_files_that_only_a_family_can_read_are_compared_by_bytes(tmp_path):
    for name, text in (("base", "one"), ("same", "one"), ("other", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    assert compare_preprocessing(tmp_path / "base", tmp_path / "same") == Preprocessing()
    found = compare_preprocessing(tmp_path / "base", tmp_path / "other")
    assert found.differences == ("tokenizer.json: other bytes than the base's",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"type": "sentence_transformers.models.Transformer"}]', []),
        (
            '[{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.models.Dense"}]',
            ["Dense"],
        ),
        ("{", []),
        ("[1]", []),
        ('{"a": {}}', []),
    ],
)
def test_layers_after_the_encoder_are_named(tmp_path, text, expected):
    (tmp_path / "modules.json").write_text(text)
    assert unused_modules(tmp_path) == expected
    assert unused_modules(tmp_path / "nothing") == []


def test_a_token_that_only_the_finetuned_model_has_is_a_note(bert, edited):
    found = compare_preprocessing(bert, edited("tokenizer.json", added_token))
    assert found.differences == ()
    assert found.notes == (
        "texts are read without 1 token that the base's tokenizer lacks: '[ENT]'",
    )


def test_a_word_of_both_that_becomes_a_token_of_its_own_is_a_difference(bert, edited):
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    added = {"id": 33, "content": "A", "special": True, **flags}
    other = edited("tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(added))
    assert compare_preprocessing(bert, other).differences == ("tokenizer added tokens: 'A'",)


names = st.sampled_from("abcdefgh")


@settings(max_examples=60, deadline=None)
@given(st.lists(names, unique=True, min_size=1), st.lists(names, unique=True, min_size=1))
def test_tokenizers_agree_if_every_token_of_the_base_has_the_same_id(ours, theirs):
    with tempfile.TemporaryDirectory() as root:
        base, finetuned = Path(root, "base"), Path(root, "finetuned")
        words(ours).save_pretrained(base)
        words(theirs).save_pretrained(finetuned)
        found = compare_preprocessing(base, finetuned)
    assert (found.differences == ()) == (theirs[: len(ours)] == ours)
    more = sorted({*theirs} - {*ours})
    assert len(found.notes) == bool(more)
    assert all(repr(token) in found.notes[0] for token in more[:3])


def words(tokens: list[str]) -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(tokens)}
    model = Tokenizer(models.WordLevel(vocab=ids, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model)
