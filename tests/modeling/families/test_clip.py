"""CLIP: the zero-shot convention, the pixels, the scale, and checkpoints of a part."""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from restitch.merging.errors import BadInput
from restitch.modeling.data.rows import Example
from restitch.modeling.families.clip import Clip
from restitch.modeling.pretrained_files import load_image_processor
from restitch.registry.specs.head import HeadSpec
from tests.modeling.conftest import png
from tests.tiny_models import tiny_clip, vision_tower

FAMILY = Clip()


def examples(count: int) -> list[Example]:
    return [Example((Image.open(io.BytesIO(png(i))),), None, f"row {i}") for i in range(count)]


def test_scores_equal_transformers_own_zero_shot_logits(clip):
    from transformers import AutoTokenizer, CLIPModel

    model = FAMILY.load(clip)
    head = FAMILY.build_head(
        model, clip, HeadSpec(labels=("cat", "dog", "a long name"), templates=("a {}",))
    )
    batch = FAMILY.preprocessor(clip)(examples(4))
    reference = CLIPModel.from_pretrained(clip)
    texts = AutoTokenizer.from_pretrained(clip)(
        ["a cat", "a dog", "a a long name"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = reference(
            pixel_values=batch["pixel_values"],
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
        ).logits_per_image
    scores = FAMILY.logits(model, batch, head)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_class_weights_are_means_over_templates_normalized_before_and_after(clip):
    model = FAMILY.load(clip)
    several = FAMILY.build_head(
        model, clip, HeadSpec(labels=("cat", "dog"), templates=("a {}", "the {}."))
    )
    single = FAMILY.build_head(
        model, clip, HeadSpec(labels=("a cat", "the cat.", "a dog", "the dog."))
    )
    means = single.tensors["weight"].reshape(2, 2, -1).mean(1)
    expected = torch.nn.functional.normalize(means, dim=-1)
    torch.testing.assert_close(several.tensors["weight"], expected)


def test_the_text_tower_reads_no_padding(clip):
    model = FAMILY.load(clip)
    alone = FAMILY.build_head(model, clip, HeadSpec(labels=("cat",)))
    together = FAMILY.build_head(model, clip, HeadSpec(labels=("cat", "something much longer")))
    torch.testing.assert_close(
        together.tensors["weight"][:1], alone.tensors["weight"], rtol=1e-4, atol=1e-5
    )


def test_the_scale_is_the_model_s_own_unless_given(clip):
    model: Any = FAMILY.load(clip)
    batch = FAMILY.preprocessor(clip)(examples(2))
    own = FAMILY.build_head(model, clip, HeadSpec(labels=("a", "b")))
    given = FAMILY.build_head(model, clip, HeadSpec(labels=("a", "b"), scale=3.0))
    assert own.spec.scale is None
    ratio = FAMILY.logits(model, batch, own) / FAMILY.logits(model, batch, given)
    expected = model.inner.logit_scale.exp() / 3
    torch.testing.assert_close(ratio, expected.expand(2, 2))


def test_the_activation_of_the_configuration_is_honoured(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "gelu")
    config = json.loads((clip / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "gelu" / "config.json").write_text(json.dumps(config))
    batch = FAMILY.preprocessor(clip)(examples(2))
    quick, exact = (FAMILY.features(FAMILY.load(f), batch) for f in (clip, tmp_path / "gelu"))
    assert not torch.equal(quick, exact)
    assert FAMILY.config_differences(clip, tmp_path / "gelu") == [
        "vision_config.hidden_act: base 'quick_gelu', finetuned 'gelu'"
    ]


def test_the_image_processor_is_always_the_one_of_pil(clip, monkeypatch):
    import transformers

    asked = []
    real = transformers.AutoImageProcessor.from_pretrained

    def watch(*args, **keywords):
        asked.append(keywords)
        return real(*args, **keywords)

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", watch)
    processor = load_image_processor(clip)
    assert type(processor).__name__ == "CLIPImageProcessorPil"
    assert processor.backend == "pil"
    # Where torchvision is installed, another one would be taken without being asked for.
    assert asked == [{"backend": "pil", "local_files_only": True, "trust_remote_code": False}]


def test_pixels_are_resized_bicubically_cropped_and_normalized(clip):
    """By hand, step by step: 24 x 16 becomes 24 x 16, then the middle 16 x 16."""
    import numpy as np

    with Image.open(io.BytesIO(png(3, (48, 32)))) as image:
        found = FAMILY.preprocessor(clip)([Example((image,), None, "here")])["pixel_values"]
        resized = image.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    pixels = np.asarray(resized, dtype=np.float64) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.from_numpy(((pixels - mean) / deviation).transpose(2, 0, 1)).float()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_a_folder_without_an_image_processor_is_an_error(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(BadInput, match=r"image processor of .* cannot be read"):
        FAMILY.preprocessor(tmp_path / "bare")


def test_an_image_processor_from_elsewhere_is_never_run(clip, tmp_path):
    folder = tmp_path / "custom"
    shutil.copytree(clip, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {
        "auto_map": {"AutoImageProcessor": "evil.Processor"},
        "image_processor_type": "Processor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with suppress(BadInput):
        FAMILY.preprocessor(folder)
    assert not (tmp_path / "ran").exists()


def test_the_base_must_be_a_whole_clip(clip, tmp_path):
    tower = vision_tower(clip, tmp_path / "tower")
    with pytest.raises(BadInput, match="not a whole CLIP or SigLIP"):
        FAMILY.load(tower)


def test_only_the_vision_tower_s_blocks_are_localizable(clip):
    from restitch.merging.files.checkpoint import Checkpoint
    from restitch.merging.files.coordinates import select_tensors

    names = select_tensors(Checkpoint.open(clip).floating, FAMILY.localizable)
    assert names
    assert all(name.startswith("vision_model.encoder.layers.") for name in names)


def test_two_images_per_row_are_refused(clip):
    image = examples(1)[0].inputs[0]
    with pytest.raises(BadInput, match="clip reads one image"):
        FAMILY.preprocessor(clip)([Example((image, image), None, "here")])


class TestConfigurations:
    def change(self, clip: Path, folder: Path, **changes: object) -> Path:
        """A copy of the folder with keys of its configuration changed, `part__key`."""
        shutil.copytree(clip, folder)
        config = json.loads((folder / "config.json").read_text())
        for place, value in changes.items():
            *parts, key = place.split("__")
            target = config
            for part in parts:
                target = target[part]
            target[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_all_keys_that_matter_are_listed_and_no_other(self, clip, tmp_path):
        other = self.change(
            clip,
            tmp_path / "other",
            projection_dim=16,
            logit_scale_init_value=1.0,
            vision_config__num_attention_heads=4,
            vision_config__attention_dropout=0.5,
            vision_config__projection_dim=99,
            text_config__layer_norm_eps=0.1,
            text_config__eos_token_id=2,
            dtype="float16",
            transformers_version="4.0",
            id2label={"0": "cat"},
        )
        assert FAMILY.config_differences(clip, other) == [
            "projection_dim: base 12, finetuned 16",
            "text_config.layer_norm_eps: base 1e-05, finetuned 0.1",
            "vision_config.num_attention_heads: base 2, finetuned 4",
        ]

    def test_a_key_left_out_equals_its_default(self, clip, tmp_path):
        other = self.change(clip, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        assert config["vision_config"].pop("layer_norm_eps") == 1e-5
        assert config["vision_config"].pop("num_channels") == 3
        (other / "config.json").write_text(json.dumps(config))
        assert FAMILY.config_differences(clip, other) == []

    def test_a_tower_is_compared_with_its_part_of_the_base(self, clip, tmp_path):
        tower = vision_tower(clip, tmp_path / "tower")
        assert FAMILY.config_differences(clip, tower) == []
        config = json.loads((tower / "config.json").read_text())
        config |= {"image_size": 32, "hidden_act": "gelu"}
        (tower / "config.json").write_text(json.dumps(config))
        assert FAMILY.config_differences(clip, tower) == [
            "vision_config.hidden_act: base 'quick_gelu', finetuned 'gelu'",
            "vision_config.image_size: base 16, finetuned 32",
        ]

    def test_another_architecture_is_a_difference(self, clip, bert):
        assert FAMILY.config_differences(clip, bert) == [
            "model_type: base 'clip', finetuned 'bert'"
        ]


def test_tiny_models_are_seeded(tmp_path):
    one, same, other = (
        tiny_clip(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    files = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert files[0] == files[1] != files[2]
