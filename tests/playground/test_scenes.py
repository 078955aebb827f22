import numpy as np
import pytest

from playground.captions import captions, make_tokenizer, vocabulary
from playground.scenes import SHAPE_NAMES, SHAPES, SIZE
from playground.skills import ARROWS, CHUNK, GENERAL, RADAR, SKILLS, TASKS, Skill

ALL = (GENERAL, *SKILLS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("skill", ALL, ids=lambda skill: skill.name)
def test_the_same_generator_draws_the_same_pictures(skill: Skill) -> None:
    labels = skill.balanced(rng(), CHUNK + 3)
    first = skill.pictures(rng(), labels)
    assert first.shape == (CHUNK + 3, SIZE, SIZE, 3)
    assert first.tobytes() == skill.pictures(rng(), labels).tobytes()
    assert first.tobytes() != skill.pictures(rng(1), labels).tobytes()


def test_labels_are_balanced() -> None:
    counts = np.bincount(GENERAL.balanced(rng(), 250), minlength=len(GENERAL.labels))
    assert set(counts) == {2, 3}


def test_tasks_are_the_skills_in_another_order() -> None:
    assert sorted(s.name for s in TASKS) == sorted(s.name for s in SKILLS)


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_shape_stays_within_its_radius(name: str) -> None:
    turn = np.linspace(0, 2 * np.pi, 64, dtype=np.float32)
    x, y = (np.float32(1.45) * wave(turn) for wave in (np.cos, np.sin))
    assert (SHAPES[name](x, y) > 0).all()


def test_a_blip_is_where_its_label_says() -> None:
    labels = np.arange(200) % len(RADAR.labels)
    bright = RADAR.pictures(rng(), labels).sum(axis=3).astype(float)
    weight = np.maximum(bright - np.median(bright, axis=(1, 2), keepdims=True) - 150, 0)
    line = np.arange(SIZE) - (SIZE - 1) / 2
    total = weight.sum(axis=(1, 2))
    x, y = (weight.sum(axis=1) @ line) / total, (weight.sum(axis=2) @ line) / total
    far = SIZE / 8
    found = np.select(
        [
            (x < -far) & (y < -far),
            (x > far) & (y < -far),
            (x < -far) & (y > far),
            (x > far) & (y > far),
        ],
        [0, 1, 2, 3],
        default=4,
    )
    assert (found == labels).mean() > 0.97


def test_arrows_that_point_apart_are_mirrored() -> None:
    def head_heavy(label: int, axis: int) -> float:
        bright = ARROWS.pictures(rng(), np.full(64, label)).mean(axis=(0, 3))
        across = bright.sum(axis=1 - axis)
        return float(across[: SIZE // 2].sum() - across[SIZE // 2 :].sum())

    assert head_heavy(0, 0) > 0 > head_heavy(2, 0)
    assert head_heavy(3, 1) > 0 > head_heavy(1, 1)


def test_general_captions_describe_their_picture() -> None:
    labels = GENERAL.balanced(rng(), 500)
    texts = captions(rng(), GENERAL, labels)
    kinds = {word for label in GENERAL.labels for word in label.split()}
    for text, label in zip(texts, labels, strict=True):
        assert kinds & set(text.split()) <= set(GENERAL.labels[label].split())
    assert sum(GENERAL.labels[n] in text for text, n in zip(texts, labels, strict=True)) > 300


def test_skills_are_rare_in_the_captions() -> None:
    assert sum(skill.share for skill in SKILLS) < 0.02


def test_every_word_is_one_token_and_other_text_can_be_read() -> None:
    tokenizer = make_tokenizer()
    for word in vocabulary():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    ids = tokenizer("Zürich 7!")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1, "an unknown sign must not end the text"
