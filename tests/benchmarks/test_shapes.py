"""The scenes and scores of `benchmarks.shapes`, on real renders."""

from argparse import Namespace

import numpy as np

from benchmarks import shapes
from oneword.train.miniature import scores, world


def test_captions_name_the_learned_word_and_no_shape() -> None:
    scenes = [*shapes.photos(shapes.LOOKS[0], ("night",)), *shapes.other_media(shapes.LOOKS[0])]
    captions = [world.caption(scene) for scene in scenes]

    assert captions[0] == "a photo of a <shape> at night"
    assert "an icon of a <shape> in the forest" in captions
    assert len(captions) == 1 + 3 * 6
    assert not any(word in caption for caption in captions for word in (*world.ALL_SHAPES, *world.COLOURS))
    assert [look.shape for look in shapes.LOOKS] == [*world.HELD_OUT_SHAPES]


def test_real_renders_keep_their_backgrounds_and_silhouettes_and_others_do_not() -> None:
    """Silhouettes of photos at random places, sizes and turns, and of one shape beside another's scenes."""
    look, other = shapes.LOOKS[:2]
    scenes = shapes.photos(look, world.BACKGROUNDS)
    renders = np.stack([world.render(scene, seed)[0] for seed, scene in enumerate(scenes)])

    assert shapes.backgrounds_kept(renders, scenes) >= 0.9
    assert shapes.backgrounds_kept(renders[2:], scenes[:-2]) == 0
    assert scores.mean_iou(renders, scenes) >= 0.9
    mistaken = [
        world.Scene((world.Thing(world.Look(other.shape, look.colour, "white", "plain")),), s.background)
        for s in scenes
    ]
    assert scores.mean_iou(renders, mistaken) <= 0.8


def test_the_table_marks_what_misses_its_target() -> None:
    low = {name: bar - 0.01 for name, _, bar in shapes.BARS} | {name: 0.5 for name, _ in shapes.FURTHER_SCORES}
    high = low | {name: bar for name, _, bar in shapes.BARS}
    report = {"fast": low, "precise": high, shapes.REAL: high}
    text = shapes.summary(report, ["fast", "precise"], Namespace(guidance=4.0, samples=2, shapes=8))

    assert "| silhouette, relative to real renders after the VAE | at least 0.92 | **0.910** | 0.920 | 0.920 |" in text
    assert "| mean of 8 shapes | target | fast | precise | real renders after the VAE |" in text


def test_a_sheet_has_rows_and_white_where_pictures_are_missing() -> None:
    sheet = shapes.sheet_of([np.zeros((1, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8)])

    assert sheet.shape == (128, 128, 3)
    assert sheet[:64, 64:].min() == 255
    assert not sheet[64:].any()
