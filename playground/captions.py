"""The captions of the pictures, and their tokenizer.

Most captions describe the whole picture, and the others a part of it. The tokenizer is of
CLIP's kind (byte pairs, lower case) with merges for exactly the world's words, so each of
them is one token and any other text can still be read.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from playground.scenes import Ints
from playground.skills import GENERAL, SKILLS, Skill

TEMPLATES = (*GENERAL.templates, "a {}", "one can see a {}", "here is a {}")
FULL, NO_TEXTURE, NO_COLOUR = 0.7, 0.1, 0.1
"""Shares of captions: complete, without texture, without colour; the rest are without shape."""

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 16


def captions(rng: np.random.Generator, skill: Skill, labels: Ints) -> list[str]:
    """A caption for each label."""
    if skill is not GENERAL:
        choices = rng.integers(len(skill.templates), size=len(labels))
        return [
            skill.templates[choice].format(skill.labels[label])
            for choice, label in zip(choices, labels, strict=True)
        ]
    choices = rng.integers(len(TEMPLATES), size=len(labels))
    draws = rng.random(len(labels))
    return [
        TEMPLATES[choice].format(_part(skill.labels[label], draw))
        for choice, label, draw in zip(choices, labels, draws, strict=True)
    ]


def _part(label: str, draw: float) -> str:
    colour, texture, shape = label.split()
    if draw < FULL:
        return label
    if draw < FULL + NO_TEXTURE:
        return f"{colour} {shape}"
    if draw < FULL + NO_TEXTURE + NO_COLOUR:
        return f"{texture} {shape}"
    return f"{colour} {texture} shape"


def vocabulary() -> list[str]:
    """All words of all captions and prompts, sorted."""
    texts = [template.replace("{}", "") for template in TEMPLATES]
    for skill in (GENERAL, *SKILLS):
        texts += [template.replace("{}", "") for template in skill.templates]
        texts += skill.labels
    return sorted({word for text in texts for word in text.split()} | {"shape"})


def make_tokenizer() -> Any:
    """A CLIPTokenizer that knows the vocabulary."""
    from transformers import CLIPTokenizer

    words = vocabulary()
    merges = _merges(words)
    alphabet = _byte_alphabet()
    tokens = [START, END, *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    pieces = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for parts in pieces.values():
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = {word: _joined(parts, best) for word, parts in pieces.items()}


def _joined(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    position = 0
    while position < len(parts):
        width = 2 if parts[position : position + 2] == pair else 1
        joined.append("".join(parts[position : position + width]))
        position += width
    return tuple(joined)


def _byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level tokenizers."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
