"""How well pictures show what their scenes say, by two witnesses: the judge, and the pixels themselves (`readback`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import readback, world
from oneword.train.miniature.judge import QUESTIONS

Pictures = NDArray[np.uint8]  # [B, 64, 64, 3]


def one_object_scenes(count: int) -> list[world.Scene]:
    """Captions of the world with one spelled-out object in one of the media; seeds apart from the training set's."""
    rng = np.random.default_rng(77)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if len(scene.things) == 1 and scene.medium and not scene.things[0].name:
            scenes.append(scene)
    return scenes


def judged_right(judge: Judge, pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of pictures for which the judge's best caption of each attribute is the scene's."""
    seen = judge.pictures(pictures)
    right = {}
    for attribute, questions in QUESTIONS.items():
        names = list(questions)
        best = (seen @ judge.texts(list(questions.values())).T).argmax(1)
        right[attribute] = float(
            np.mean([names[b] == value_of(attribute, s) for b, s in zip(best, scenes, strict=True)])
        )
    return right


def pixels_right(pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of pictures whose background, and whose object's first colour on at least 30 % of it, read back right."""
    background, colour = [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        style, look = scene.drawn_as, scene.things[0].look
        background.append(readback.read_background(picture, style) == scene.background)
        colour.append(readback.read_colours(picture, scene.background, style)[look.colour] >= 0.3)
    return {"background": float(np.mean(background)), "colour": float(np.mean(colour))}


def value_of(attribute: str, scene: world.Scene) -> str | None:
    """The scene's value of an attribute of `QUESTIONS`."""
    if attribute in ("background", "medium"):
        return str(getattr(scene, attribute))
    return str(getattr(scene.things[0].look, attribute))


def psnr(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Of each pair of pictures [B, H, W, 3] of 0 to 255, dB; 99 where they are equal."""
    errors = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(errors, 10**-9.9))
