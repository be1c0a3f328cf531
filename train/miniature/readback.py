"""Background and object colour of a one-object picture, read back from its pixels: no model.

An independent check beside the judge. Both are found by comparison with pictures that `world` draws.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneword.train.miniature import world

Array = NDArray[Any]

_SEEDS = range(24)
_SHADES = (1.0, 0.9, 0.8, 0.7)


def read_background(image: Array, style: world.Style) -> str:
    """The background whose empty renders in `style` are nearest to `image` [64, 64, 3] uint8 around the edge."""
    edge = _edge(image / 255)
    return min(world.BACKGROUNDS, key=lambda name: float(np.square(_empty_edges(name, style) - edge).sum(1).min()))


def read_colours(image: Array, background: str, style: world.Style) -> dict[str, float]:
    """The share of the object that each paint covers, 0 to 1: non-background pixels count for their nearest paint."""
    empty = np.stack(_empty(background, style)) / 255
    pixels = (image / 255)[14:52:2, 12:52:2].reshape(-1, 3)
    ground = empty[:, 14:52, 12:52].reshape(-1, 3)[::299]
    names = list(world.COLOURS)
    paints = np.stack([world.drawn_colour(name, style) for name in names])
    shades = _SHADES if style.shading else (1.0,)
    shaded = np.stack([paints * shade for shade in shades], 1)  # colour, shade, rgb
    if style.hatching:
        shaded = shaded * (1 - style.hatching / 2)
    to_paint = np.square(pixels[:, None, None] - shaded).sum(-1).min(-1)  # pixel, colour
    to_ground = np.square(pixels[:, None] - ground).sum(-1).min(-1)
    nearest = to_paint.argmin(1)
    distance = to_paint.min(1)
    votes = np.bincount(nearest, ((distance < 0.06) & (distance < to_ground)).astype(float), len(names))
    if style.outline:  # the outline is black or white too, so not all of it is paint
        votes[names.index("white" if style.outline_light > 0.5 else "black")] *= 0.6
    return dict(zip(names, (votes / max(votes.sum(), 1)).tolist(), strict=True))


@cache
def _empty(background: str, style: world.Style) -> tuple[Array, ...]:
    return tuple(world.render_background(background, style, seed) for seed in _SEEDS)


@cache
def _empty_edges(background: str, style: world.Style) -> Array:
    return np.stack([_edge(image / 255) for image in _empty(background, style)])


def _edge(image: Array) -> Array:
    """Means and deviations of twelve 8x8 tiles around the edge, inside any frame: [12 * 6]."""
    inner = image[6:58, 6:58]
    tiles = [
        inner[y : y + 8, x : x + 8] for y in (0, 14, 30, 44) for x in (0, 22, 44) if (x, y) not in ((22, 14), (22, 30))
    ]
    return np.concatenate([np.concatenate([t.mean((0, 1)), 0.5 * t.std((0, 1))]) for t in tiles])
