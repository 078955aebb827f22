"""Pictures of the playground: coloured, textured shapes on plain backgrounds, 32 x 32 pixels.

A picture is described by a background colour and rows of `Shapes` (numpy columns with one
row per shape). Whole batches are rendered at once from signed distances. The same
description and generator give the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 32
"""Pixels on a side."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pictures = NDArray[np.uint8]
"""[pictures, SIZE, SIZE, 3]."""

Distance = Callable[[Floats, Floats], Floats]
"""Signed distance to a shape of radius about 1, negative inside; y points down."""

TEXTURES = ("plain", "striped", "dotted")
DARK = 0.75
"""How much a stripe or a dot darkens."""
NOISE = 0.03


def _disc(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(1.0)


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - np.float32(0.75)) - np.float32(0.25)


def _box(x: Floats, y: Floats, half_x: float, half_y: float) -> Floats:
    return np.maximum(np.abs(x) - np.float32(half_x), np.abs(y) - np.float32(half_y))


def _square(x: Floats, y: Floats) -> Floats:
    return _box(x, y, 0.82, 0.82)


def _cross(x: Floats, y: Floats) -> Floats:
    return np.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))


def _triangle(x: Floats, y: Floats) -> Floats:
    sides = np.float32(0.866) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(sides, y) - np.float32(0.55)


def _star(x: Floats, y: Floats) -> Floats:
    turn = np.arctan2(x, -y) * np.float32(5 / np.pi)
    wave = np.abs(np.mod(turn, np.float32(2.0)) - np.float32(1.0))  # 1 on the points
    edge: Floats = np.float32(0.42) + np.float32(0.68) * wave * np.sqrt(wave)
    star: Floats = np.hypot(x, y) - edge
    return star


def _arrow(x: Floats, y: Floats) -> Floats:
    sides = np.float32(0.75) * np.abs(x) - np.float32(0.66) * (y + np.float32(1.0))
    tip = np.maximum(sides, y + np.float32(0.05))
    arrow: Floats = np.minimum(tip, _box(x, y - np.float32(0.45), 0.25, 0.55))
    return arrow


def _strokes(*lines: tuple[float, float, float, float]) -> Distance:
    """A drawing of thick lines, each from (x, y) to (x, y)."""

    def distance(x: Floats, y: Floats) -> Floats:
        nearest = np.full_like(x, np.inf)
        for x0, y0, x1, y1 in lines:
            dx, dy = np.float32(x1 - x0), np.float32(y1 - y0)
            u, v = x - np.float32(x0), y - np.float32(y0)
            along = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0.0, 1.0)
            np.minimum(nearest, np.hypot(u - along * dx, v - along * dy), out=nearest)
        return nearest - np.float32(0.2)

    return distance


SHAPES: dict[str, Distance] = {
    "circle": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "arrow": _arrow,
    "a": _strokes((-0.7, 0.9, 0, -0.9), (0.7, 0.9, 0, -0.9), (-0.4, 0.3, 0.4, 0.3)),
    "e": _strokes(
        (-0.6, -0.9, -0.6, 0.9), (-0.6, -0.9, 0.6, -0.9), (-0.6, 0, 0.4, 0), (-0.6, 0.9, 0.6, 0.9)
    ),
    "h": _strokes((-0.6, -0.9, -0.6, 0.9), (0.6, -0.9, 0.6, 0.9), (-0.6, 0, 0.6, 0)),
    "l": _strokes((-0.5, -0.9, -0.5, 0.9), (-0.5, 0.9, 0.6, 0.9)),
    "n": _strokes((-0.6, -0.9, -0.6, 0.9), (0.6, -0.9, 0.6, 0.9), (-0.6, -0.9, 0.6, 0.9)),
    "t": _strokes((-0.7, -0.9, 0.7, -0.9), (0, -0.9, 0, 0.9)),
    "v": _strokes((-0.7, -0.9, 0, 0.9), (0.7, -0.9, 0, 0.9)),
    "z": _strokes((-0.6, -0.9, 0.6, -0.9), (0.6, -0.9, -0.6, 0.9), (-0.6, 0.9, 0.6, 0.9)),
}
SHAPE_NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class Shapes:
    """The shapes to draw, one row each; later rows of a picture cover earlier ones.

    Attributes:
        picture: the index of its picture, in rising order.
        shape: its index in `SHAPE_NAMES`.
        paint: its colour, [shapes, 3] from 0 to 1.
        texture: its index in `TEXTURES`.
        x: its centre, from -1 (left) to 1.
        y: its centre, from -1 (top) to 1.
        radius: 1 is half of the picture's side.
        angle: clockwise, in radians.
    """

    picture: Ints
    shape: Ints
    paint: Floats
    texture: Ints
    x: Floats
    y: Floats
    radius: Floats
    angle: Floats


def render(rng: np.random.Generator, ground: Floats, shapes: Shapes) -> Pictures:
    """Draw a picture on each background [pictures, 3], with random light and noise."""
    canvas = _lit(rng, ground)
    cover, tone = _cover(shapes)
    order = _index_in_picture(shapes.picture)
    for layer in range(int(order.max(initial=-1)) + 1):
        rows = np.flatnonzero(order == layer)
        at = shapes.picture[rows]
        colour = shapes.paint[rows][:, None, :] * tone[rows][..., None]
        canvas[at] += cover[rows][..., None] * (colour - canvas[at])
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(NOISE)
    levels = np.clip(canvas * np.float32(255.0) + np.float32(0.5), 0.0, 255.0)
    pictures: Pictures = levels.astype(np.uint8).reshape(len(ground), SIZE, SIZE, 3)
    return pictures


def _lit(rng: np.random.Generator, ground: Floats) -> Floats:
    """The backgrounds, lighter towards one side: [pictures, pixels, 3]."""
    slope = rng.uniform(-0.1, 0.1, (len(ground), 2, 1)).astype(np.float32)
    y, x = _grid()
    ramp = slope[:, 0] * x + slope[:, 1] * y
    canvas: Floats = np.clip(ground[:, None, :] + ramp[:, :, None], 0.0, 1.0)
    return canvas


def _grid() -> tuple[Floats, Floats]:
    """Pixel centres (y, x) from -1 to 1, flattened."""
    line = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2.0 / SIZE) - 1.0
    y, x = np.meshgrid(line.astype(np.float32), line.astype(np.float32), indexing="ij")
    return y.ravel(), x.ravel()


def _cover(shapes: Shapes) -> tuple[Floats, Floats]:
    """The coverage of each pixel by each shape, and the brightness of its texture there."""
    grid_y, grid_x = _grid()
    cos, sin = np.cos(shapes.angle)[:, None], np.sin(shapes.angle)[:, None]
    dx = (grid_x - shapes.x[:, None]) / shapes.radius[:, None]
    dy = (grid_y - shapes.y[:, None]) / shapes.radius[:, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = np.empty_like(u)
    for number, name in enumerate(SHAPE_NAMES):
        rows = np.flatnonzero(shapes.shape == number)
        if len(rows):
            distance[rows] = SHAPES[name](u[rows], v[rows])
    pixels = shapes.radius[:, None] * np.float32(SIZE / 2)
    cover: Floats = np.clip(np.float32(0.5) - distance * pixels, 0.0, 1.0)

    tone = np.ones_like(u)
    striped = shapes.texture == TEXTURES.index("striped")
    tone[striped] -= np.float32(DARK) * (np.mod(v[striped] * 1.7 + 0.25, 1.0) < 0.5)
    dotted = shapes.texture == TEXTURES.index("dotted")
    cell_u, cell_v = (np.mod(w[dotted] * 1.6 + 0.5, 1.0) - 0.5 for w in (u, v))
    tone[dotted] -= np.float32(DARK) * (np.hypot(cell_u, cell_v) < 0.28)
    return cover, tone


def _index_in_picture(picture: Ints) -> Ints:
    """The index of each row among the rows of its picture, which are consecutive."""
    starts = np.flatnonzero(np.diff(picture, prepend=-1))
    lengths = np.diff(np.append(starts, len(picture)))
    return np.arange(len(picture)) - np.repeat(starts, lengths)
