"""SigLIP in the family `clip`: scale and bias, padded texts, patches, and a tower alone."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.coordinates import select_tensors
from restitch.modeling.data.rows import Example
from restitch.modeling.families.clip import Clip
from restitch.modeling.pretrained_files import load_image_processor
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import png
from tests.tiny_models import tiny_siglip, vision_tower

FAMILY = Clip()
LABELS = ("cat", "dog", "a long name")


@pytest.fixture(params=[False, True], ids=["siglip", "siglip2"])
def folder(request, tmp_path):
    return tiny_siglip(tmp_path / "base", naflex=request.param)


def examples(count: int) -> list[Example]:
    sizes = [(32, 32), (48, 32), (20, 60), (32, 32)]
    images = [Image.open(io.BytesIO(png(i, sizes[i]))) for i in range(count)]
    return [Example((image,), None, "here") for image in images]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("naflex", [False, True])
def test_scores_equal_the_logits_of_transformers_own_forward(tmp_path, naflex, mask):
    """With the inputs of transformers' own processors, and with scale and bias."""
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_siglip(tmp_path / "base", naflex=naflex, mask=mask)
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=LABELS, templates=("a {}",)))
    rows = examples(4)
    texts = AutoTokenizer.from_pretrained(folder)(
        [f"a {label}" for label in LABELS],
        padding="max_length",
        max_length=24,
        return_tensors="pt",
    )
    assert texts["input_ids"].shape == (3, 24)
    images = load_image_processor(folder)([row.inputs[0] for row in rows], return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder)(**images, **texts).logits_per_image
    scores = FAMILY.logits(model, FAMILY.preprocessor(folder)(rows), head)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3


def test_the_bias_is_added_to_the_scaled_cosines(folder):
    model = FAMILY.load(folder)
    head = FAMILY.build_head(model, folder, HeadSpec(labels=LABELS, scale=5.0))
    batch = FAMILY.preprocessor(folder)(examples(2))
    features = FAMILY.features(model, batch)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    expected = 5.0 * features @ head.tensors["weight"].T - 3.0
    torch.testing.assert_close(FAMILY.logits(model, batch, head), expected)


def test_a_text_has_one_embedding_whatever_shares_its_batch_and_cuts_it(folder):
    """Its last token, which the model reads, is always at the same position."""
    model = FAMILY.load(folder)
    assert FAMILY.max_length(folder) == 24
    alone = FAMILY.build_head(model, folder, HeadSpec(labels=("cat",)))
    together = FAMILY.build_head(model, folder, HeadSpec(labels=("cat", "much longer")))
    shorter = FAMILY.build_head(model, folder, HeadSpec(labels=("cat",), max_length=8))
    torch.testing.assert_close(together.tensors["weight"][:1], alone.tensors["weight"])
    torch.testing.assert_close(shorter.tensors["weight"], alone.tensors["weight"])


def test_only_the_vision_tower_s_blocks_are_localizable_and_not_its_pooling(folder):
    file = Checkpoint.open(folder)
    names = select_tensors(file.floating, FAMILY.localizable)
    assert names
    assert all(name.startswith("vision_model.encoder.layers.") for name in names)
    live = FAMILY.parameters(FAMILY.load(folder))
    assert {"vision_model.head.probe", "logit_bias", "logit_scale"} <= set(live)
    assert set(live) == set(file.names)


def test_a_tower_is_compared_with_its_part_of_the_base(folder, tmp_path):
    tower = vision_tower(folder, tmp_path / "tower")
    assert FAMILY.config_differences(folder, tower) == []
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert FAMILY.config_differences(folder, tower) == [
        "vision_config.hidden_act: base 'gelu_pytorch_tanh', finetuned 'gelu'"
    ]


def test_a_base_without_attention_pooling_is_named(tmp_path):
    folder = tiny_siglip(tmp_path / "base")
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    other = tmp_path / "other"
    assert FAMILY.config_differences(other, other) == [
        "vision_config.vision_use_head: the base has no attention pooling"
    ]


def test_comparing_configurations_of_siglip_prints_nothing(tmp_path):
    """The defaults of SigLIP hold ids of CLIP's tokens, of which transformers warns."""
    folder = tiny_siglip(tmp_path / "base")
    code = f"""
from pathlib import Path
from restitch.modeling.families.clip import Clip
folder = Path({str(folder)!r})
assert Clip().config_differences(folder, folder) == []
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
