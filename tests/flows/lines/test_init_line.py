"""A line takes bases and finetuned models of its family's kind only, and `init` proposes one."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from restitch.modeling.families.clip import Clip
from restitch.modeling.families.family import family_names
from restitch.modeling.families.text_encoder import TextEncoder
from restitch.modeling.kinds import Kind
from tests.shell import Shell
from tests.tiny_models import (
    byte_tokenizer,
    tiny_bert,
    tiny_clip,
    tiny_image_model,
    tiny_siglip,
    tiny_t5,
)
from tests.worlds import World, write_yaml

pytestmark = pytest.mark.usefixtures("without_mlflow")


def tiny_gpt2(folder: Path) -> Path:
    tokenizer = byte_tokenizer(48)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vit(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def bert_decoder(folder: Path) -> Path:
    tiny_bert(folder)
    config = json.loads((folder / "config.json").read_text()) | {"is_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def line_file(folder: Path, base: Path, family: str | None) -> Path:
    values = {"line": "kinds", "base": str(base), "method": "localize-and-stitch"}
    named = {} if family is None else {"family": family}
    return write_yaml(folder / "kinds.yaml", values | named)


REFUSED = [
    (tiny_gpt2, "text-encoder", "GPT2LMHeadModel (model_type 'gpt2'), a decoder language model"),
    (bert_decoder, "text-encoder", "BertModel (model_type 'bert'), a decoder language model"),
    (tiny_t5, "text-encoder", "T5ForConditionalGeneration (model_type 't5'), an encoder-decoder"),
    (tiny_vit, "text-encoder", "ViTForImageClassification (model_type 'vit'), an image model"),
    (tiny_clip, "text-encoder", "CLIPModel (model_type 'clip'), an image-text model"),
    (tiny_bert, "clip", "BertModel (model_type 'bert'), a text encoder"),
    (tiny_vit, "clip", "ViTForImageClassification (model_type 'vit'), an image model"),
]


@pytest.mark.parametrize(("make", "family", "found"), REFUSED)
def test_a_base_of_another_kind_is_refused_by_what_it_is(tmp_path, shell, make, family, found):
    base = make(tmp_path / "base")
    done = shell("init", line_file(tmp_path, base, family), code=3)
    assert f"the base {base} is not of family {family}" in done.err
    assert f"found:    {found}" in done.err
    assert shell.json("status")["lines"] == []


@pytest.mark.parametrize(
    ("make", "family", "right"),
    [(tiny_clip, "text-encoder", "clip"), (tiny_bert, "clip", "text-encoder")],
)
def test_the_right_family_is_named(tmp_path, shell, make, family, right):
    file = line_file(tmp_path, make(tmp_path / "base"), family)
    advice = shell("init", file, code=3).err.partition("to do:")[2].strip()
    assert advice.startswith("write `family: ")
    assert advice.endswith("into the line file")
    assert f"`family: {right}`" in advice
    assert shell("init", line_file(tmp_path, tmp_path / "base", right)).code == 0


def test_where_no_family_fits_the_message_says_so(tmp_path, shell):
    base = tiny_image_model(tmp_path / "base", "resnet")  # with BatchNorm
    for family in ("clip", None):
        done = shell("init", line_file(tmp_path, base, family), code=3)
        assert "no family of restitch takes an image model" in done.err
        assert "text-encoder for a text encoder" in done.err


@pytest.mark.parametrize(
    ("make", "family", "kind"),
    [
        (tiny_bert, "text-encoder", "BertModel (model_type 'bert'), a text encoder"),
        (tiny_siglip, "clip", "SiglipModel (model_type 'siglip'), an image-text model"),
    ],
)
def test_init_proposes_the_family_of_a_file_without_one(tmp_path, shell, make, family, kind):
    base = make(tmp_path / "base")
    file = line_file(tmp_path, base, None)
    done = shell("init", file, code=3)
    assert f"{file} names no family" in done.err
    assert f"the base {base} is {kind}" in done.err
    advice = done.err.partition("add this line to the file: ")[2]
    assert f"`family: {family}`" in advice
    assert shell.json("status")["lines"] == []
    file.write_text(f"{file.read_text()}family: {family}\n")
    assert "made line kinds" in shell("init", file).out


def test_families_that_take_the_same_base_say_how_they_score(tmp_path, shell, monkeypatch):
    monkeypatch.setattr(Clip, "kinds", (Kind.TEXT_ENCODER,))
    monkeypatch.setattr(Clip, "model_types", ())
    base = tiny_bert(tmp_path / "base")
    done = " ".join(shell("init", line_file(tmp_path, base, None), code=3).err.split())
    for family in (Clip, TextEncoder):
        assert f"`family: {family.name}` ({family.summary})" in done


def test_a_base_that_lacks_what_a_family_needs_is_refused(tmp_path, shell, monkeypatch):
    monkeypatch.setattr(Clip, "kinds", (Kind.TEXT_ENCODER,))
    monkeypatch.setattr(Clip, "model_types", ())
    monkeypatch.setattr(Clip, "lacks", lambda *_: "a second tower")
    base = tiny_bert(tmp_path / "base")
    done = " ".join(shell("init", line_file(tmp_path, base, "clip"), code=3).err.split())
    assert f"the base {base} lacks a second tower, which the family clip needs" in done
    assert "`family: text-encoder`" in done
    assert "family: clip" not in done
    done = " ".join(shell("init", line_file(tmp_path, base, None), code=3).err.split())
    assert "family: clip" not in done


def test_other_faults_of_a_file_without_a_family_come_first(tmp_path, shell):
    file = line_file(tmp_path, tiny_bert(tmp_path / "base"), None)
    file.write_text(f"{file.read_text()}gatess: 1\n")
    done = shell("init", file, code=3)
    assert "unknown key 'gatess'" in done.err


def test_a_file_without_the_family_of_its_line_is_told_it(tmp_path, shell):
    base = tiny_bert(tmp_path / "base")
    shell("init", line_file(tmp_path, base, "text-encoder"))
    done = shell("init", line_file(tmp_path, base, None), code=3)
    assert "line kinds exists, with the family text-encoder" in done.err
    assert "`family: text-encoder`" in done.err


def test_a_base_that_says_nothing_needs_a_named_family(tmp_path, shell):
    base = tiny_bert(tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "of-somebody"}')
    done = shell("init", line_file(tmp_path, base, None), code=3)
    assert "does not describe a known architecture" in done.err
    assert f"one of {', '.join(family_names())}" in done.err


def test_a_line_from_before_keeps_working_with_a_warning(tmp_path, shell, monkeypatch):
    base = tiny_gpt2(tmp_path / "base")
    file = line_file(tmp_path, base, "text-encoder")
    monkeypatch.setattr(TextEncoder, "kinds", ())
    shell("init", file)
    monkeypatch.undo()
    done = shell("init", file)
    assert "line kinds is unchanged" in done.out
    assert "is not of family text-encoder" in done.err
    assert "the line works as before" in done.err


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (tiny_gpt2, "a decoder language model"),
        (bert_decoder, "a decoder language model"),
        (tiny_t5, "an encoder-decoder language model"),
        (tiny_clip, "an image-text model with two towers"),
    ],
)
def test_a_finetuned_model_of_another_kind_is_quarantined_by_what_it_is(
    world: World, shell: Shell, tmp_path, make, found
):
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = make(tmp_path / "model")
    done = shell("register", "demo", "--task", world.task("colour"), "--model", model, code=4)
    text = " ".join((done.out + done.err).split())
    assert f"{model} is {found}, and the base of this line is a text encoder" in text
    assert shell.json("status")["lines"][0]["champion"] is None


@pytest.mark.parametrize(
    ("make", "family", "proposed"),
    [
        (tiny_bert, "text-encoder", "method: tsv-m\nlocalize: {mode: subspace}"),
        (tiny_clip, "clip", "method: tsv-m\nlocalize: {mode: subspace, rank: 0.167}"),
        (
            tiny_gpt2,
            "causal-lm",
            "method: {tournament: [tsv-m, task-arithmetic]}\nlocalize: {mode: subspace}",
        ),
    ],
)
def test_init_proposes_the_family_and_then_the_method_of_a_file_with_neither(
    tmp_path, shell, make, family, proposed
):
    file = tmp_path / "line.yaml"
    file.write_text(f"line: kinds\nbase: {make(tmp_path / 'base')}\n")
    assert f"`family: {family}`" in shell("init", file, code=3).err
    file.write_text(f"{file.read_text()}family: {family}\n")
    done = shell("init", file, code=3)
    assert f"{file} names no method" in done.err
    asked = " and ".join(f"`{line}`" for line in proposed.splitlines())
    assert asked in " ".join(done.err.split())
    assert shell.json("status")["lines"] == []
    file.write_text(f"{file.read_text()}{proposed}\n")
    assert "made line kinds" in shell("init", file).out
