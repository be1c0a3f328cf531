"""How well pictures match their scenes, measured in two ways: by the judge, and by the pixels.

Pixels are read by `readback` (background, colours) and `silhouette` (shapes), which use no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import readback, silhouette, world
from oneword.train.miniature.claims import QUESTIONS, Claim

Pictures = NDArray[np.uint8]  # [B, 64, 64, 3]


def one_object_scenes(count: int) -> list[world.Scene]:
    """Scenes of the world with one spelled-out object in one of the media; seeds differ from the training set's."""
    return _spelled_out_scenes(count, 1, 77)


def two_object_scenes(count: int) -> list[world.Scene]:
    """The same with two objects."""
    return _spelled_out_scenes(count, 2, 78)


def _spelled_out_scenes(count: int, things: int, seed: int) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if len(scene.things) == things and scene.medium and not any(thing.name for thing in scene.things):
            scenes.append(scene)
    return scenes


def judged_right(judge: Judge, pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """For each attribute, the share of pictures for which the judge's best caption is the scene's."""
    embedded = judge.pictures(pictures)
    right = {}
    for attribute, questions in QUESTIONS.items():
        names = list(questions)
        best = (embedded @ judge.texts(list(questions.values())).T).argmax(1)
        right[attribute] = float(
            np.mean([names[b] == value_of(attribute, s) for b, s in zip(best, scenes, strict=True)])
        )
    return right


def judged_second_colour(judge: Judge, pictures: Pictures, scenes: Sequence[world.Scene]) -> float:
    """The share of patterned objects whose second colour the judge picks out of eleven, given everything else."""
    embedded = judge.pictures(pictures)
    right = []
    for picture, scene in zip(embedded, scenes, strict=True):
        look = scene.things[0].look
        if look.pattern == "plain":
            continue
        names = [name for name in world.COLOURS if name != look.colour]
        texts = [Claim((look.shape, look.colour, name, look.pattern), None, None, None, None).words for name in names]
        right.append(names[int((judge.texts(texts) @ picture).argmax())] == look.second_colour)
    return float(np.mean(right))


def pixels_right(pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """The share of pictures whose pixels match the scene, by attribute.

    background: read back correctly. colour: the object's first colour covers at least 30 % of it. second_colour: for
    patterned objects, the second colour covers more of the object than any colour except the first.
    """
    background, colour, second = [], [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        style, look = scene.drawn_as, scene.things[0].look
        background.append(readback.read_background(picture, style) == scene.background)
        shares = readback.read_colours(picture, scene.background, style)
        colour.append(shares.pop(look.colour) >= 0.3)
        if look.pattern != "plain":
            second.append(max(shares, key=lambda name: shares[name]) == look.second_colour)
    right = {"background": background, "colour": colour, "second_colour": second}
    return {attribute: float(np.mean(answers)) for attribute, answers in right.items()}


def both_right(pictures: Pictures, scenes: Sequence[world.Scene]) -> float:
    """The share of two-object pictures in which both objects are right in shape and first colour, by silhouettes."""
    return float(
        np.mean(
            [
                all(silhouette.object_right(picture, scene, index) for index in (0, 1))
                for picture, scene in zip(pictures, scenes, strict=True)
            ]
        )
    )


def mean_iou(pictures: Pictures, scenes: Sequence[world.Scene]) -> float:
    """The mean silhouette score of one-object pictures."""
    scores = [silhouette.silhouette_iou(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return float(np.mean(scores))


def value_of(attribute: str, scene: world.Scene) -> str | None:
    """The scene's value of an attribute of `QUESTIONS`."""
    if attribute in ("background", "medium"):
        return str(getattr(scene, attribute))
    return str(getattr(scene.things[0].look, attribute))


def psnr(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """The PSNR of each pair of pictures [B, H, W, 3], values 0 to 255, in dB; 99 if they are equal."""
    errors = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    decibels: NDArray[np.float64] = -10 * np.log10(np.maximum(errors, 10**-9.9))
    return decibels
