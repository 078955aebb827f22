"""The subjects of the playground's pictures: the general benchmark and the skills to finetune.

A `Skill` is a closed set of classes with a function that draws pictures of each. The base learns
`GENERAL` from captions. The other skills look different and are almost absent from the captions,
so the base's zero-shot accuracy on them is poor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from playground.scenes import SHAPE_NAMES, TEXTURES, Floats, Ints, Pictures, Shapes, render

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.65, 0.15, 0.85),
    "orange": (1.00, 0.55, 0.05),
}
GENERAL_SHAPES = SHAPE_NAMES[:6]
LETTERS = SHAPE_NAMES[SHAPE_NAMES.index("a") :]
CHUNK = 256
"""The number of pictures rendered at once, which fit the processor's caches."""

Draw = Callable[[np.random.Generator, Ints], tuple[Floats, Shapes]]
"""Backgrounds and shapes of one picture for each label."""


@dataclass(frozen=True)
class Skill:
    """A closed set of classes with a function that draws pictures of them.

    Attributes:
        name: the name of the task.
        labels: the classes, in the order of their indices.
        templates: prompts in which `{}` stands for the label.
        draw: returns the backgrounds and shapes for given labels.
        share: its share of the pretraining captions.
    """

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Draw
    share: float

    def pictures(self, rng: np.random.Generator, labels: Ints) -> Pictures:
        """One picture for each label."""
        chunks = (labels[start : start + CHUNK] for start in range(0, len(labels), CHUNK))
        return np.concatenate([render(rng, *self.draw(rng, chunk)) for chunk in chunks])

    def balanced(self, rng: np.random.Generator, count: int) -> Ints:
        """`count` labels in random order, with equal counts of all classes (up to one)."""
        return rng.permutation(np.arange(count) % len(self.labels))


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    return rng.uniform(low, high, shape).astype(np.float32)


def _near(
    rng: np.random.Generator, count: int, colour: tuple[float, float, float], spread: float = 0.08
) -> Floats:
    """`count` colours close to one colour."""
    around = np.array(colour, dtype=np.float32) + _uniform(rng, -spread, spread, count, 3)
    colours: Floats = np.clip(around, 0.0, 1.0)
    return colours


def _one_each(
    rng: np.random.Generator,
    shape: Ints,
    paint: Floats,
    *,
    texture: Ints | None = None,
    x: Floats | None = None,
    y: Floats | None = None,
    radius: tuple[float, float] = (0.6, 0.85),
    angle: Floats | None = None,
) -> Shapes:
    """One shape in each picture, slightly moved and rotated."""
    count = len(shape)
    nowhere = np.zeros(count, dtype=np.float32)
    shade = _uniform(rng, 0.8, 1.0, count, 1)
    return Shapes(
        picture=np.arange(count),
        shape=shape,
        paint=paint * shade,
        texture=np.zeros(count, dtype=np.int64) if texture is None else texture,
        x=(nowhere if x is None else x) + _uniform(rng, -0.12, 0.12, count),
        y=(nowhere if y is None else y) + _uniform(rng, -0.12, 0.12, count),
        radius=_uniform(rng, *radius, count),
        angle=(nowhere if angle is None else angle) + _uniform(rng, -0.3, 0.3, count),
    )


def _draw_general(rng: np.random.Generator, labels: Ints) -> tuple[Floats, Shapes]:
    """A coloured, textured shape on a dull background."""
    rest, shape = np.divmod(labels, len(GENERAL_SHAPES))
    colour, texture = np.divmod(rest, len(TEXTURES))
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    count = len(labels)
    ground = _uniform(rng, 0.05, 0.5, count, 1) + _uniform(rng, -0.05, 0.05, count, 3)
    shapes = _one_each(rng, shape, palette[colour], texture=texture)
    return np.clip(ground, 0.0, 1.0), shapes


def _draw_arrow(rng: np.random.Generator, labels: Ints) -> tuple[Floats, Shapes]:
    """A white arrow on a blue sign."""
    count = len(labels)
    ground = _near(rng, count, (0.1, 0.25, 0.7))
    arrow = np.full(count, SHAPE_NAMES.index("arrow"))
    white = _near(rng, count, (0.95, 0.95, 0.95), 0.05)
    quarters = (labels * (np.pi / 2)).astype(np.float32)
    return ground, _one_each(rng, arrow, white, angle=quarters, radius=(0.55, 0.85))


def _draw_blip(rng: np.random.Generator, labels: Ints) -> tuple[Floats, Shapes]:
    """A bright blip in a corner or in the middle of a dark screen."""
    count = len(labels)
    ground = _near(rng, count, (0.0, 0.08, 0.02), 0.03)
    x = np.array([-0.5, 0.5, -0.5, 0.5, 0.0], dtype=np.float32)[labels]
    y = np.array([-0.5, -0.5, 0.5, 0.5, 0.0], dtype=np.float32)[labels]
    disc = np.full(count, SHAPE_NAMES.index("circle"))
    glow = _near(rng, count, (0.4, 1.0, 0.5))
    return ground, _one_each(rng, disc, glow, x=x, y=y, radius=(0.15, 0.3))


def _draw_letter(rng: np.random.Generator, labels: Ints) -> tuple[Floats, Shapes]:
    """A letter in dark strokes on paper."""
    count = len(labels)
    ground = _near(rng, count, (0.85, 0.82, 0.75))
    ink = _near(rng, count, (0.1, 0.1, 0.15))
    return ground, _one_each(rng, labels + SHAPE_NAMES.index("a"), ink)


GENERAL = Skill(
    name="general",
    labels=tuple(" ".join(words) for words in product(COLOURS, TEXTURES, GENERAL_SHAPES)),
    templates=("a photo of a {}", "a picture of a {}", "an image of a {}"),
    draw=_draw_general,
    share=0.98,
)
ARROWS = Skill(
    name="arrows",
    labels=("up", "right", "down", "left"),
    templates=("an arrow pointing {}",),
    draw=_draw_arrow,
    share=0.007,
)
LETTERING = Skill(
    name="letters",
    labels=LETTERS,
    templates=("the letter {}",),
    draw=_draw_letter,
    share=0.003,
)
RADAR = Skill(
    name="radar",
    labels=("top left", "top right", "bottom left", "bottom right", "middle"),
    templates=("something in the {}",),
    draw=_draw_blip,
    share=0.007,
)
SKILLS = (ARROWS, LETTERING, RADAR)
TASKS = (RADAR, ARROWS, LETTERING)
"""The skills in the order of registration with the best retention on the way."""
