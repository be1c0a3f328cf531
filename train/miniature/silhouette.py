"""The silhouettes of a picture's objects, read back from its pixels by comparison with what `world` draws: no model.

An object's mask is the largest connected set of pixels that are nearer to the paints of its look, including the
outline, than to renders of the empty background; each of two objects is read from its half of the picture. The score is
the best intersection over union of the mask with the shape, over all positions, sizes and turns within the world's
jitter. Symmetric shapes need no further search, because turning a shape onto itself gives the same template. The score
is 0 if no object is found. An object of the wrong colours has no mask, or a poor one. Not covered: where on the object
each of its colours is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneword.train.miniature import world

Array = NDArray[Any]
Mask = NDArray[np.bool_]  # [64, 64]

_SEEDS = range(24)
_SHADES = np.linspace(0, 1, 5)  # fractions of a style's shading
_TURNS = np.linspace(-world.TURN, world.TURN, 9)
_FOUND = 0.5  # the lowest score at which an object counts as drawn
_FIRST = 0.3  # the lowest share of an object's paint that is its first colour; patterns leave it at least half


def silhouette_iou(image: Array, scene: world.Scene, index: int = 0) -> float:
    """The score, 0 to 1, of a scene's object in a picture [64, 64, 3] uint8."""
    return best_iou(object_mask(image, scene, index), scene, index, scene.things[index].look.shape)


def object_right(image: Array, scene: world.Scene, index: int) -> bool:
    """Whether an object fits its shape better than all others, and at least 30 % of its paint is its first colour."""
    look = scene.things[index].look
    mask = object_mask(image, scene, index)
    scores = {shape: best_iou(mask, scene, index, shape) for shape in world.SHAPES}
    if max(scores.values()) > scores[look.shape] or scores[look.shape] < _FOUND:
        return False
    paints, paint_colours = _paints(look, scene.drawn_as)
    distances = np.square(paints[:, mask] - (image[mask] / 255).astype(np.float32)).sum(-1)
    first, second = (np.sum(paint_colours[distances.argmin(0)] == colour) for colour in (0, 1))
    return bool(first >= _FIRST * max(first + second, 1))


def object_mask(image: Array, scene: world.Scene, index: int = 0) -> Mask:
    """The largest connected set of pixels nearer to an object's paints than to the empty background."""
    pixels = (image / 255).astype(np.float32)
    paints, _ = _paints(scene.things[index].look, scene.drawn_as)
    to_paint = np.square(paints - pixels).sum(-1).min(0)
    to_ground = np.square(_grounds(scene.background, scene.drawn_as) - pixels).sum(-1).min(0)
    half = np.ones(world.SIZE, bool)
    if len(scene.things) == 2:
        half = np.arange(world.SIZE) // (world.SIZE // 2) == index
    return largest_component((to_paint < to_ground) & half)


def best_iou(mask: Mask, scene: world.Scene, index: int, shape: str) -> float:
    """The mask's best intersection over union with a shape, over all the ways the world may draw that object."""
    if not mask.any():
        return 0.0
    jitter = world.JITTERS[len(scene.things)][index]
    templates = _templates(shape, jitter.radius, scene.drawn_as.outline)
    size, middle = world.SIZE, world.SIZE // 2
    padded = np.pad(mask, middle).astype(np.float32)
    moved = np.stack(
        [  # moves the object's centre to the middle
            padded[y : y + size, x : x + size].ravel()
            for y in range(round(jitter.y[0]), round(jitter.y[1]) + 1)
            for x in range(round(jitter.x[0]), round(jitter.x[1]) + 1)
        ]
    )
    overlap = moved @ templates
    return float((overlap / (templates.sum(0) + moved.sum(1, keepdims=True) - overlap)).max())


def largest_component(mask: Mask) -> Mask:
    """The largest set of pixels connected by their sides; all False if `mask` is all False."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0) * mask
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return mask & (labels == sizes.argmax())


@cache
def _paints(look: world.Look, style: world.Style) -> tuple[Array, Array]:
    """Pictures [N, 64, 64, 3], each filled with one paint of the look in one shade, or with its outline.

    Also returns which of the look's colours each of them shows [N]: 0, 1, or 2 for the outline.
    """
    colours = [look.colour] if look.pattern == "plain" else [look.colour, look.second_colour]
    shades = 1 - style.shading * _SHADES if style.shading else np.ones(1)
    paints = [world.drawn_colour(colour, style) * shade for colour in colours for shade in shades]
    if style.outline:
        paints.append(np.full(3, style.outline_light))
    pictures = np.stack([world.render_flat(paint, style) for paint in paints]).astype(np.float32) / 255
    return pictures, np.repeat([0, 1, 2], [len(shades), (len(colours) - 1) * len(shades), bool(style.outline)])


@cache
def _grounds(background: str, style: world.Style) -> Array:
    """Renders of the empty background, also in an object's shadow if the style draws one: [N, 64, 64, 3]."""
    empty = np.stack([world.render_background(background, style, seed) for seed in _SEEDS]).astype(np.float32) / 255
    shadows = (0, style.shadow / 2, style.shadow) if style.shadow else (0,)
    return np.concatenate([empty * (1 - shadow) for shadow in shadows])


@cache
def _templates(shape: str, radii: tuple[float, float], outline: float) -> NDArray[np.float32]:
    """The shape in every size and turn, in the middle of a picture and half a pixel off it: [4096, N]."""
    y, x = np.mgrid[0 : world.SIZE, 0 : world.SIZE].astype(np.float32) + 0.5 - world.SIZE / 2
    masks = []
    for radius in np.arange(radii[0], radii[1] + 0.01, 0.5):
        for turn in _TURNS:
            cos, sin = np.cos(turn), np.sin(turn)
            for left in (0, 0.5):
                for top in (0, 0.5):
                    dx, dy = (x - left) / radius, (y - top) / radius
                    distance = world.ALL_SHAPES[shape](cos * dx + sin * dy, cos * dy - sin * dx) * radius
                    masks.append((distance <= outline).ravel())
    return np.stack(masks, 1).astype(np.float32)
