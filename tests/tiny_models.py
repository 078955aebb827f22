"""Tiny real models with random weights, written by transformers in a second.

base = tiny_clip(tmp_path / "base")
tuned = tweaked(base, tmp_path / "tuned", seed=1)
"""

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

_TOWERS = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
}
# Settings of a small RecurrentGemma for `decoder_of`.
RECURRENT = {"head_dim": 4, "lru_width": 16, "attention_window_size": 12}
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, so that different texts have different tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*alphabet, *SPECIAL))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def word_tokenizer(*, bos: bool = False, max_length: int = 200) -> PreTrainedTokenizerFast:
    """A tokenizer of a decoder: some frequent pairs of bytes are tokens, and there is no end token.

    Args:
        bos: put `<s>` before every text.
        max_length: of a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "a"), ("r", "e"), ("b", "l"), ("\u0120", "re"), ("bl", "u")]
    tokens = (*alphabet, *(first + second for first, second in merges), *SPECIAL)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B:1",
            special_tokens=[("<s>", vocabulary["<s>"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_decoder(
    folder: Path, kind: str = "llama", *, seed: int = 0, bos: bool = False, positions: int = 96
) -> Path:
    """A folder of a causal language model: `llama` (tied embeddings), `gpt2` or `qwen2`."""
    tokenizer = word_tokenizer(bos=bos, max_length=max(200, positions))
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.4}
    model: PreTrainedModel
    if kind == "gpt2":
        size |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
        model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None))
    else:
        size |= {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": positions,
            "tie_word_embeddings": kind == "llama",
        }
        llama = kind == "llama"
        model = (
            LlamaForCausalLM(LlamaConfig(**size))
            if llama
            else Qwen2ForCausalLM(Qwen2Config(**size))
        )
    model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoder_of(folder: Path, kind: str, **settings: Any) -> Path:
    """A folder of a causal language model of any kind that transformers knows."""
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 200,
            **settings,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_experts(folder: Path, kind: str = "mixtral", **settings: Any) -> Path:
    """A folder of a causal language model with four experts per layer, of which two are chosen.

    Args:
        folder: the folder to write.
        kind: `mixtral`, `qwen2_moe` or `qwen3_moe`.
        settings: of its configuration.
    """
    sizes = {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": 2}
    if kind == "mixtral":
        sizes |= {"num_local_experts": 4}
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 4}
    if kind == "qwen2_moe":
        sizes |= {"shared_expert_intermediate_size": 20}
    return decoder_of(folder, kind, **(sizes | settings))


def tiny_bert(
    folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 16, positions: int = 48
) -> Path:
    """A BERT folder."""
    tokenizer = byte_tokenizer(64)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path, *, seed: int = 0) -> Path:
    """A RoBERTa folder: its positions start after the padding index."""
    tokenizer = byte_tokenizer(1000)
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
    )
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, *, seed: int = 0, encoder: bool = False) -> Path:
    """A T5 folder, or one of its encoder alone."""
    tokenizer = byte_tokenizer(64)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    (T5EncoderModel if encoder else T5ForConditionalGeneration)(config).save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 300},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "modernbert": {"local_attention": 8, "reference_compile": False},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
}
_IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "dinov2": {},
    "beit": {"use_absolute_position_embeddings": True},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
}


def tiny_encoder(folder: Path, kind: str = "bert", *, seed: int = 0) -> Path:
    """A folder of a text encoder without a head; `kind` is a `model_type` of `_ENCODERS`."""
    tokenizer = byte_tokenizer(40)
    if kind in ("bert", "electra"):
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    torch.manual_seed(seed)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
        **({} if kind == "xlnet" else {"max_position_embeddings": 48}),
    }
    config = AutoConfig.for_model(
        kind,
        **{**size, **_ENCODERS[kind]},
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_seq2seq(folder: Path, kind: str = "t5", *, seed: int = 0, max_length: int = 64) -> Path:
    """A folder of an encoder-decoder language model: `t5` (tied), `flan-t5` (untied) or `bart`."""
    tokenizer = word_tokenizer(max_length=max_length)
    end = (("</s>", tokenizer.eos_token_id),)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if kind == "bart" else "$A </s>",
        special_tokens=[*end, ("<s>", tokenizer.bos_token_id)],
    )
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    model: PreTrainedModel
    if kind == "bart":
        parts = ("encoder", "decoder")
        size |= {f"{part}_layers": 2 for part in parts}
        size |= {f"{part}_attention_heads": 2 for part in parts}
        size |= {f"{part}_ffn_dim": 32 for part in parts}
        positions = {"max_position_embeddings": 96, "init_std": 0.4}
        model = BartForConditionalGeneration(
            BartConfig(**size, **positions, bos_token_id=tokenizer.bos_token_id)
        )
    else:
        size |= {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 1.0}
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        model = T5ForConditionalGeneration(T5Config(**size, **(new if kind == "flan-t5" else {})))
        if kind == "flan-t5":  # the configuration of T5 ties them in any case
            model.lm_head.weight = torch.nn.Parameter(torch.randn(len(tokenizer), 16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_image_model(folder: Path, kind: str = "vit", *, seed: int = 0) -> Path:
    """A folder of an image model without a head; `kind` is a `model_type` of `_IMAGE_MODELS`."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    if kind in ("vit", "deit", "dinov2", "beit"):
        size |= {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
    config = AutoConfig.for_model(kind, **{**size, **_IMAGE_MODELS[kind]})
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("lambda_1", "lambda_2", "layer_scale_parameter")):
                tensor.fill_(0.5)  # at their small initial values blocks do almost nothing
    model.save_pretrained(folder)
    write_image_processor(folder, 16)
    return folder


def tiny_classifier(
    base: Path, folder: Path, labels: Sequence[str], *, seed: int = 1, size: float = 0.1
) -> Path:
    """A classifier finetuned from an encoder or an image model, with a head of its own.

    Args:
        base: the folder of the base.
        folder: the folder to write.
        labels: the names of its classes, in the order of their indices.
        seed: of head and noise.
        size: how far its body is from the base.
    """
    images = (base / "preprocessor_config.json").is_file()
    auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    model = auto_class.from_pretrained(
        base, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                tensor.normal_()
            elif "layer" in name or "block" in name or "stages" in name or "pooler" in name:
                tensor.add_(size * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    for file in base.iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return folder


WORDS = ("no", "yes", "maybe", "red", "blue", "one", "two", "was")


def masking_tokenizer(
    kind: str, *, max_length: int = 64, known: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    """A tokenizer with a mask, to which each of the known words is one token after a space.

    Args:
        kind: of byte pairs as for `roberta` and `modernbert`, of word pieces as for `bert`, or of
            a unigram model as for `deberta-v2`.
        max_length: of a text.
        known: the words.
    """
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    characters = sorted(
        {c for word in known for c in word} | set("abcdefghijklmnopqrstuvwxyz .,?:")
    )
    tokens: tuple[str, ...]
    if kind == "bert":
        tokens = (*special, *characters, *(f"##{c}" for c in characters), *known)
        ids = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "deberta-v2":
        pieces = [(token, 0.0) for token in special]
        pieces += [(c.replace(" ", "\u2581"), -10.0) for c in characters]
        pieces += [(f"\u2581{word}", -2.0) for word in known]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        ids = {token: index for index, (token, _) in enumerate(pieces)}
    else:
        merges = {}
        for word in known:
            for end in range(1, len(word) + 1):
                merges[f"\u0120{word[: end - 1]}", word[end - 1]] = f"\u0120{word[:end]}"
        tokens = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merges.values())
        ids = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[*merges], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=kind != "bert", special=True),
        model_max_length=max_length,
    )


def tiny_masked(
    folder: Path,
    kind: str = "roberta",
    *,
    seed: int = 0,
    max_length: int = 64,
    known: Sequence[str] = WORDS,
) -> Path:
    """A folder of a masked language model: `roberta`, `bert`, `deberta-v2` or `modernbert`."""
    tokenizer = masking_tokenizer(kind, max_length=max_length, known=known)
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": max_length + 16,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.4,
    }
    if kind == "deberta-v2":
        size |= {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        }
    config = AutoConfig.for_model(kind, **size)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_clip(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 16,
    image_size: int = 16,
    patch_size: int = 8,
    projection: int = 12,
    hidden_act: str = "quick_gelu",
) -> Path:
    """A CLIP folder with both towers, tokenizer and image processor."""
    tokenizer = byte_tokenizer(40)
    torch.manual_seed(seed)
    tower = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_act": hidden_act,
        "initializer_factor": 3.0,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
        projection_dim=projection,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_image_processor(folder, image_size)
    return folder


def tiny_siglip(
    folder: Path, *, seed: int = 0, image_size: int = 16, naflex: bool = False, mask: bool = False
) -> Path:
    """A SigLIP folder with both towers, tokenizer and image processor.

    Args:
        folder: the folder to write.
        seed: of the weights.
        image_size: of square images.
        naflex: the SigLIP 2 that reads patches of images of any size.
        mask: the tokenizer gives an attention mask; those of SigLIP on the hub give none.
    """
    tokenizer = byte_tokenizer(24)
    tokenizer.model_input_names = ["input_ids", *(["attention_mask"] if mask else [])]
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    seen = {"num_patches": 16} if naflex else {"image_size": image_size}
    config = (Siglip2Config if naflex else SiglipConfig)(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, **seen, "patch_size": 4},
    )
    model = (Siglip2Model if naflex else SiglipModel)(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = (
        {"patch_size": 4, "max_num_patches": 20}
        if naflex
        else {"size": {"height": image_size, "width": image_size}}
    )
    settings = {
        "image_processor_type": f"Siglip{'2' if naflex else ''}ImageProcessor",
        "resample": 2 if naflex else 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **{f"do_{step}": True for step in ("resize", "rescale", "normalize", "convert_rgb")},
        **size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_image_processor(folder: Path, image_size: int) -> None:
    """Write CLIP's image processor for an image size."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": image_size, "width": image_size},
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **{
            f"do_{step}": True
            for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
        },
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def tweaked(
    base: Path, folder: Path, *, seed: int, size: float = 0.1, globs: tuple[str, ...] = ("*",)
) -> Path:
    """A copy of a folder with noise on its floating tensors: a stand-in for finetuning."""
    shutil.copytree(base, folder)
    random = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and any(fnmatchcase(name, glob) for glob in globs):
            noise = torch.randn(tensor.shape, generator=random, dtype=torch.float32)
            tensors[name] = (tensor.float() + size * noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_more_tokens(
    model: Path, folder: Path, *, tokens: Sequence[str] = ("<a>", "<b>"), rows: int = 5
) -> Path:
    """A copy of a folder with added tokens and more rows in embeddings and head.

    Args:
        model: a model of texts.
        folder: the folder to write.
        tokens: the tokens to add.
        rows: the number of new rows; fewer than none takes rows away.
    """
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    random = torch.Generator().manual_seed(rows)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if size in tensor.shape and not any(part.isdigit() for part in name.split(".")):
            at = tensor.shape.index(size)
            shape = [*tensor.shape[:at], max(rows, 0), *tensor.shape[at + 1 :]]
            new = torch.cat([tensor, 4 * torch.randn(shape, generator=random)], at)
            tensors[name] = new.narrow(at, 0, size + rows).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + rows}))
    if tokens:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([*tokens])
        tokenizer.save_pretrained(folder)
    return folder


def vision_tower(clip: Path, folder: Path, *, prefix: str = "") -> Path:
    """Write only the vision tower of a CLIP or SigLIP folder, as transformers 5 saves it.

    Args:
        clip: a folder of `tiny_clip` or `tiny_siglip`.
        folder: the folder to write.
        prefix: `vision_model.` gives the names of version 4.
    """
    folder.mkdir(parents=True)
    config = json.loads((clip / "config.json").read_text())["vision_config"]
    config["architectures"] = [_TOWERS[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        prefix + name.removeprefix("vision_model."): tensor
        for name, tensor in load_file(clip / "model.safetensors").items()
        if name.startswith("vision_model.")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
