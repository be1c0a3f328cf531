"""Scenes, prompts, styles and the table of `benchmarks.pairs`, on real renders and numbers made up here."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from benchmarks import pairs
from benchmarks.paper import looks, styles
from benchmarks.recipes import Lab
from benchmarks.store import Store
from oneword.export.source import find_model
from oneword.runtime.concept import Concept, load_concept
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world
from oneword.train.miniature.scores import Pictures
from oneword.train.recipe import Recipe, Subject
from oneword.train.tasks import Task


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
    seeds = [seed for _, numbers in pairs.seeded(scenes, 4) for seed in numbers]

    assert len(looks) == len(scenes) == 66
    assert not {scene.background for scene in scenes} & {*list(world.BACKGROUNDS)[:5]}
    assert len(set(seeds)) == len(seeds) == 4 * 66


def test_the_judge_finds_the_style_of_real_renders_and_not_another() -> None:
    judge = Judge(find_model("miniature")[0] / "judge")
    scenes = pairs.object_and_style(2, 6)
    hits, misses = [], []
    for scene in scenes:
        candidates = pairs.rivals(scenes, scene)
        renders = np.stack([world.render(scene, seed)[0] for seed in (7_000, 7_001)])
        hits.append(pairs.style_right(judge, renders, scene, candidates).mean())
        other = replace(scene, style=candidates[(candidates.index(scene.style) + 1) % 6])
        misses.append(pairs.style_right(judge, renders, other, candidates).mean())

    assert len(candidates) == 10
    assert np.mean(hits) >= 0.9
    assert np.mean(misses) <= 0.1


class StandIn:
    """A lab without a model. Its pictures are the real renders of `scenes`; the words it learns are ones."""

    keep = Lab.keep

    def __init__(self, work: Path, scenes: Sequence[world.Scene] = ()) -> None:
        self.work, self.samples, self.store = work, 2, Store(work, "digest")
        self.judge = Judge(find_model("miniature")[0] / "judge")
        self.scenes, self.drawings = scenes, 0
        self.tasks: list[Task] = []
        self.recipes: list[Recipe] = []

    def drawn(self, scenes: Sequence[world.Scene], words: int) -> Pictures:
        self.drawings += 1
        renders = [world.render(scene, seed)[0] for scene, seeds in pairs.seeded(self.scenes, 2) for seed in seeds]
        return np.stack(renders)

    def learned(self, task: Task, recipe: Recipe, seed: int) -> tuple[Concept, dict[str, float]]:
        self.tasks.append(task)
        self.recipes.append(recipe)
        return Concept(task.token, {"text_encoder": np.ones((1, 4), np.float32)}), {"seconds": 0.0}


def test_pictures_are_right_where_they_show_their_own_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, styles = pairs.two_objects(3), pairs.object_and_style(1, 3)
    for kind, scenes in ((pairs.OBJECTS, objects), (pairs.STYLES, styles)):
        lab = StandIn(tmp_path, [scenes[0], scenes[0], scenes[2]])  # the second scene's pictures show the first
        monkeypatch.setattr(pairs, "drawn", StandIn.drawn)
        rows = [pairs.measure(cast(Lab, lab), "quick", kind, scenes, words=2) for _ in range(2)]
        real = pairs.measure(cast(Lab, lab), pairs.REAL, kind, scenes, real=True)["right"]

        assert rows[0]["right"] == [real[0], 0, real[2]]
        assert rows[1] == rows[0]
        assert lab.drawings == 1  # the second time it is stored
        assert np.mean(real) >= 0.8
    assert rows[0]["object"] >= 0.8  # all three show the same look
    assert rows[0]["style"] <= 0.7  # two of three are in their style
    assert (tmp_path / "quick-object-and-style.png").is_file()


def test_a_word_is_learned_once_by_its_subject(tmp_path: Path) -> None:
    lab = StandIn(tmp_path)
    things = [*looks(1), *styles(1)]
    paths = {pairs.learned(cast(Lab, lab), thing, "quick") for thing in [*things, *things]}

    assert {path.name for path in paths} == {"quick-look0-digest.safetensors", "quick-style0-digest.safetensors"}
    assert [load_concept(path).token for path in sorted(paths)] == ["<look0>", "<style0>"]
    assert [recipe.subject for recipe in lab.recipes] == [Subject.OBJECT, Subject.STYLE]
    assert [len(list(task.images.glob("*.png"))) for task in lab.tasks] == [5, 5]


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
