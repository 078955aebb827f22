"""Training of the playground's models: a CLIP on captions, then skills in its vision tower alone.

Everything runs in one thread, so that the same seed gives the same bytes and a busy machine does
not stall the run. The base is trained with a contrastive loss in which each distinct caption of a
batch counts once, so that equal captions are not negatives. A skill is learned with cross-entropy
against the base's text embeddings, and only in the blocks of the vision tower: a short run of SGD
with momentum, which concentrates the changes on few weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from playground.captions import END, MAX_LENGTH, START, captions
from playground.scenes import SIZE, Ints, Pictures
from playground.skills import GENERAL, SKILLS, Skill

MEAN, DEVIATION = 0.5, 0.5
"""The normalization of pixels from 0 to 1, here and in the processor's file."""

LARGEST_SCALE = float(np.log(100.0))
"""CLIP's upper bound of the logarithm of the logit scale."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the models, the runs and the data sets."""

    width: int
    layers: int
    text_width: int
    text_layers: int
    pictures: int
    steps: int
    batch: int
    rate: float
    tuning_rows: int
    tuning_epochs: int
    tuning_batch: int
    tuning_rate: float
    validation_rows: int
    test_rows: int
    general_rows: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch in one thread, with a random generator that does not affect the caller's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def no_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers; the caller reports the progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A random generator for one purpose, independent of all others."""
    return np.random.default_rng([seed, *purpose.encode()])


def make_model(sizes: Sizes, tokenizer: Any, seed: int) -> Any:
    """An untrained CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    start, end = tokenizer.convert_tokens_to_ids([START, END])
    common = {"hidden_act": "gelu"}  # CLIP's quick_gelu needs three passes over memory on a CPU
    config = CLIPConfig(
        text_config=common
        | {
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.text_width,
            "intermediate_size": 4 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": max(1, sizes.text_width // 32),
            "max_position_embeddings": MAX_LENGTH,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config=common
        | {
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": max(1, sizes.width // 32),
            "image_size": SIZE,
            "patch_size": 8,
        },
        projection_dim=sizes.text_width,
    )
    torch.manual_seed(seed)
    return CLIPModel(config)


def pretrain(model: Any, tokenizer: Any, sizes: Sizes, rng: np.random.Generator) -> Iterator[int]:
    """Train the model on captioned pictures; yields the number of pictures of each step."""
    pictures, texts = _captioned(sizes.pictures, rng)
    distinct, number = np.unique(texts, return_inverse=True)
    tokens, numbers = _tokens(tokenizer, list(distinct)), torch.from_numpy(number)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=sizes.rate,
        betas=(0.9, 0.98),
    )
    model.train()
    for step, rows in enumerate(_batches(rng, len(pictures), sizes.batch, sizes.steps)):
        _set_rate(optimizer, sizes.rate, step, sizes.steps, warmup=50)
        used, target = torch.unique(numbers[torch.from_numpy(rows)], return_inverse=True)
        loss = _contrast(model, pixels(pictures[rows]), _trimmed(tokens[used], tokenizer), target)
        _descend(optimizer, model.parameters(), loss)
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, LARGEST_SCALE)
        yield len(rows)
    model.eval()


def finetune(
    model: Any,
    head: Tensor,
    pictures: Pictures,
    labels: Ints,
    sizes: Sizes,
    rng: np.random.Generator,
) -> Iterator[int]:
    """Finetune the vision blocks on labelled pictures; yields the number of each step."""
    model.requires_grad_(False)
    blocks = model.vision_model.encoder.layers
    blocks.requires_grad_(True)
    optimizer = torch.optim.SGD(blocks.parameters(), lr=sizes.tuning_rate, momentum=0.9)
    steps = sizes.tuning_epochs * (len(pictures) // sizes.tuning_batch)
    scale = model.logit_scale.exp().detach()
    targets = torch.from_numpy(labels)
    model.train()
    for step, rows in enumerate(_batches(rng, len(pictures), sizes.tuning_batch, steps)):
        _set_rate(optimizer, sizes.tuning_rate, step, steps, warmup=20)
        scores = scale * image_features(model, pixels(pictures[rows])) @ head.T
        loss = F.cross_entropy(scores, targets[torch.from_numpy(rows)])
        _descend(optimizer, blocks.parameters(), loss)
        yield len(rows)
    model.eval()
    model.requires_grad_(True)


@torch.no_grad()
def zero_shot_head(model: Any, tokenizer: Any, skill: Skill) -> Tensor:
    """The mean text embedding of each class over the templates, [classes, features]."""
    model.eval()
    by_template = [
        _text_features(model, _tokens(tokenizer, [t.format(label) for label in skill.labels]))
        for t in skill.templates
    ]
    return F.normalize(torch.stack(by_template).mean(dim=0), dim=-1)


@torch.no_grad()
def accuracy(model: Any, head: Tensor, pictures: Pictures, labels: Ints) -> float:
    """The share of pictures whose nearest class is the right one."""
    model.eval()
    right = 0
    for start in range(0, len(pictures), 256):
        features = image_features(model, pixels(pictures[start : start + 256]))
        nearest = (features @ head.T).argmax(dim=1).numpy()
        right += int((nearest == labels[start : start + 256]).sum())
    return right / len(pictures)


def pixels(pictures: Pictures) -> Tensor:
    """The pictures as the image processor returns them, [pictures, 3, SIZE, SIZE]."""
    channels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    return channels.div_(255.0).sub_(MEAN).div_(DEVIATION)


def image_features(model: Any, values: Tensor) -> Tensor:
    """Normalized image embeddings, [pictures, features]."""
    return F.normalize(model.get_image_features(pixel_values=values).pooler_output, dim=-1)


def _text_features(model: Any, tokens: Tensor) -> Tensor:
    return F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1)


def _captioned(count: int, rng: np.random.Generator) -> tuple[Pictures, list[str]]:
    """Pictures of all skills by their shares, and their captions."""
    shares = {skill: round(count * skill.share) for skill in SKILLS}
    shares[GENERAL] = count - sum(shares.values())
    pictures, texts = [], []
    for skill, share in shares.items():
        if share == 0:
            continue
        labels = skill.balanced(rng, share)
        pictures.append(skill.pictures(rng, labels))
        texts += captions(rng, skill, labels)
    return np.concatenate(pictures), texts


def _contrast(model: Any, values: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
    """The contrastive loss of pictures and distinct captions; `target` maps one to the other."""
    scores = (
        model.logit_scale.exp() * image_features(model, values) @ _text_features(model, tokens).T
    )
    of_pictures = F.cross_entropy(scores, target)
    # A caption may have several pictures: use their mean, so that each caption counts once.
    own = scores.log_softmax(dim=0).gather(1, target[:, None]).squeeze(1)
    of_captions = -(own / torch.bincount(target)[target]).sum() / len(tokens)
    loss: Tensor = (of_pictures + of_captions) / 2
    return loss


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    tokens: Tensor = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]
    return tokens


def _trimmed(tokens: Tensor, tokenizer: Any) -> Tensor:
    """Remove the columns with only padding, but keep the first end token."""
    longest = int((tokens != tokenizer.pad_token_id).sum(dim=1).max())
    return tokens[:, : longest + 1]


def _batches(rng: np.random.Generator, count: int, batch: int, steps: int) -> Iterator[Ints]:
    """The rows of each step: full batches only, and every row at most once in each pass."""
    order: Ints = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(count)
        yield order[:batch]
        order = order[batch:]


def _set_rate(
    optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, warmup: int
) -> None:
    """Set the learning rate: linear warm-up, then half a cosine down to zero."""
    factor = min((step + 1) / warmup, 1.0) * 0.5 * (1.0 + cos(pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate * factor


def _descend(
    optimizer: torch.optim.Optimizer, parameters: Iterator[nn.Parameter], loss: Tensor
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
