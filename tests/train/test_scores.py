"""Scores of pictures against scenes: real renders are right for their own scenes and wrong for others."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from oneword.export.source import find_model
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import scores, world

COUNT = 40


def renders(scenes: Sequence[world.Scene]) -> Any:
    return np.stack([world.render(scene, 300 + i)[0] for i, scene in enumerate(scenes)])


def test_the_pixels_of_real_renders_match_their_scenes() -> None:
    scenes = scores.one_object_scenes(COUNT)
    pictures = renders(scenes)
    right = scores.pixels_right(pictures, scenes)
    wrong = scores.pixels_right(pictures, scenes[1:] + scenes[:1])
    assert set(right) == {"background", "colour", "second_colour"}
    assert min(right.values()) >= 0.9
    assert max(wrong.values()) <= 0.35  # chance is about a tenth
    assert scores.mean_iou(pictures, scenes) >= 0.9
    assert scores.mean_iou(pictures, scenes[1:] + scenes[:1]) <= 0.5


def test_both_objects_of_real_renders_are_right() -> None:
    scenes = scores.two_object_scenes(COUNT)
    assert all(len(scene.things) == 2 for scene in scenes)
    assert scores.both_right(renders(scenes), scenes) >= 0.9
    assert scores.both_right(renders(scenes), scenes[1:] + scenes[:1]) == 0


def test_the_judge_distinguishes_second_colours_of_real_renders_from_ten_others() -> None:
    """The judge that ships was not asked about them in training; chance is 1/11."""
    scenes = scores.one_object_scenes(COUNT)
    pictures = renders(scenes)
    judge = Judge(find_model("miniature")[0] / "judge")
    assert scores.judged_second_colour(judge, pictures, scenes) >= 0.55
    assert scores.judged_second_colour(judge, np.roll(pictures, 1, 0), scenes) <= 0.35
