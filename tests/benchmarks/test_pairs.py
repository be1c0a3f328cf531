"""Scenes, prompts, styles and the table of `benchmarks.pairs`, on real renders and numbers made up here."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import pairs
from oneword.export.source import find_model
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world


def test_prompts_name_two_learned_words_only_the_second_or_none() -> None:
    first, second, *_ = pairs.two_objects(3)
    left, right = (world.HELD_OUT_LOOKS[number].words for number in (1, 0))

    assert pairs.prompt(first, 2) == "a photo of a <look1> and a <look0> in the forest"
    assert pairs.prompt(first, 1) == f"a photo of {world.with_article(left)} and a <look0> in the forest"
    assert pairs.prompt(first, 0) == (
        f"a photo of {world.with_article(left)} and {world.with_article(right)} in the forest"
    )
    assert pairs.prompt(second, 2) == "a photo of a <look0> and a <look2> on a brick wall"


def test_prompts_name_a_learned_style_and_spell_out_its_object_or_not() -> None:
    scenes, named = pairs.object_and_style(2, 3), pairs.object_and_style(2, 3, named=True)
    look = world.with_article(world.HELD_OUT_LOOKS[1].words)

    assert pairs.prompt(scenes[5], 2) == "a <look1> in the studio in the style of <style2>"
    assert pairs.prompt(scenes[5], 1) == f"{look} in the studio in the style of <style2>"
    assert pairs.prompt(named[5], 0) == f"{look} in the studio in the style of {[*world.STYLES][5]}"
    assert len({scene.style for scene in pairs.object_and_style(12, 6, named=True)}) == 12


def test_all_pairs_of_looks_are_drawn_on_new_backgrounds_with_different_seeds() -> None:
    scenes = pairs.two_objects(12)
    looks = {frozenset(thing.look for thing in scene.things) for scene in scenes}
    seeds = [seed for _, each in pairs.seeded(scenes, 4) for seed in each]

    assert len(looks) == len(scenes) == 66
    assert not {scene.background for scene in scenes} & {*list(world.BACKGROUNDS)[:5]}
    assert len(set(seeds)) == len(seeds) == 4 * 66


def test_the_judge_finds_the_style_of_real_renders_and_not_another() -> None:
    judge = Judge(find_model("miniature")[0] / "judge")
    scenes = pairs.object_and_style(2, 6)
    own, others = [], []
    for scene in scenes:
        candidates = pairs.rivals(scenes, scene)
        renders = np.stack([world.render(scene, seed)[0] for seed in (7_000, 7_001)])
        own.append(pairs.style_right(judge, renders, scene, candidates).mean())
        other = replace(scene, style=candidates[(candidates.index(scene.style) + 1) % 6])
        others.append(pairs.style_right(judge, renders, other, candidates).mean())

    assert len(candidates) == 10
    assert np.mean(own) >= 0.9
    assert np.mean(others) <= 0.1


def test_a_ratio_has_the_standard_error_of_paired_scenes() -> None:
    """By hand: means 0.5 and 0.75; residuals 1/3, -1/3, 0, 0 with the deviation sqrt(2/27); over sqrt(4) and 0.75."""
    ratio, error = pairs.ratio(np.array([1.0, 0.0, 1 / 3, 2 / 3]), np.array([1.0, 0.5, 0.5, 1.0]))

    assert ratio == pytest.approx(2 / 3)
    assert error == pytest.approx((2 / 27) ** 0.5 / 2 / 0.75)


def test_the_table_marks_two_words_that_miss_the_target() -> None:
    rows = [
        {"of": of, "kind": kind, "right": right, **({"object": 0.9, "style": 0.6} if kind == pairs.STYLES else {})}
        for of, right in (
            ("quick", [0.8, 0.8]),
            (f"quick, {pairs.SECOND}", [0.5, 0.5]),
            (pairs.CAPTION, [1.0, 1.0]),
            (pairs.REAL, [1.0, 1.0]),
        )
        for kind in (pairs.OBJECTS, pairs.STYLES)
    ]
    text = pairs.summary(pairs.rates(rows))

    assert [line.split(" | ")[0] for line in text.splitlines()[3:]] == [
        "| real renders", "| the true captions", "| quick", "| quick, second word only",
    ]  # fmt: skip
    assert "| quick | 80.0% | **0.800 ± 0.000** | 80.0% | 90.0% | 60.0% | **0.800 ± 0.000** |" in text
    assert "| quick, second word only | 50.0% | 0.500 ± 0.000 | 50.0% | 90.0% | 60.0% | 0.500 ± 0.000 |" in text
    kinds = {pairs.OBJECTS: pairs.two_objects(12), pairs.STYLES: pairs.object_and_style(12, 6)}
    assert "66 pairs of 12 looks, and 72 pairs" in pairs.described(Namespace(looks=12, styles=6, samples=2), kinds)
