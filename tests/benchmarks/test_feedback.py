"""The simulated user's looks, and the methods that `benchmarks.feedback` compares, on problems with a known answer."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import feedback
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import CANDIDATES
from oneword.train.miniature import world

TABLE = np.eye(8, dtype=np.float32) + 0.1
LEXICON = Lexicon({"text_encoder": TABLE}, lambda name, text: [len(text) % 8])


def directions(components: np.ndarray) -> feedback.Directions:
    """Directions that start from the row of `object`, with these components [8, 8]."""
    made = feedback.Directions(TABLE, TABLE[6])
    made.components = components
    return made


def test_looks_for_tuning_are_not_those_that_are_reported() -> None:
    looks = feedback.development_looks()

    assert [look.shape for look in looks] == list(world.SHAPES)
    assert not set(looks) & set(world.HELD_OUT_LOOKS)


def test_silhouettes_that_no_word_names_have_a_colour_each() -> None:
    looks = feedback.unnamed_looks()

    assert [look.shape for look in looks] == list(world.HELD_OUT_SHAPES)
    assert len({look.colour for look in looks}) == len(looks) == 8


def test_a_polished_word_is_listed_by_its_last_score_only() -> None:
    answers = {"colour": True, "pattern": False}
    refined = {"scores": dict.fromkeys("023458", 0.5), "seconds": [1.0], "answers": answers, "pixels": 0.7}
    results = {
        "aspects": [refined],
        feedback.POLISHED: [{"scores": {"8": 0.9}, "seconds": [9.0], "answers": {}, "pixels": 0.8}],
    }

    text = feedback.summary(results, [], Namespace(looks=1, seeds=1, silhouettes=True))

    assert "| likeness after rounds | 0 | 2 | 3 | 4 | 5 | 8 | silhouette |" in text
    assert "| aspects | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.70 |" in text
    assert "| polished |  |  |  |  |  | 0.90 | 0.80 |" in text
    assert "| real renders |  |  |  |  |  |  | 0.9" in text
    assert "| right answers after 8 rounds | colour | pattern |" in text


def test_the_pictures_of_a_run_are_counted_and_bold_above_their_target() -> None:
    entry = {"scores": dict.fromkeys("023458", 0.5), "seconds": [1.0], "answers": {}, "pixels": 0.7}
    options = Namespace(looks=1, seeds=1, silhouettes=False)

    for pictures, cell in ((48, "48"), (54, "**54**")):
        text = feedback.summary({"aspects": [{**entry, "pictures": pictures}]}, [], options)
        assert f"| pictures | at most 48 | {cell} |" in text
    text = feedback.summary({"aspects": [entry]}, [], options)  # stored before they were counted
    assert "| pictures | at most 48 | not measured |" in text
    assert "pictures" not in feedback.report({"aspects": [entry]}, [])["methods"]["aspects"]


@pytest.mark.parametrize(("name", "answers"), [("aspects", True), ("random", False)])
def test_a_run_in_which_no_aspect_was_found_counts_as_wrong_answers_if_the_method_has_aspects(
    name: str, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of the first round's pictures only; nothing is drawn."""
    turn = feedback.Turn(1, [None] * CANDIDATES, 0.1)
    lab = Namespace(judge=Namespace(pictures=len), method=lambda name, seed: feedback.RandomSearch(LEXICON, seed))
    monkeypatch.setattr(feedback, "turns", lambda *arguments: [turn])
    monkeypatch.setattr(feedback, "score", lambda *arguments: 0.5)
    monkeypatch.setattr(feedback, "by_pixels", lambda *arguments: 0.5)

    measured = feedback.run(lab, name, world.HELD_OUT_LOOKS[0], 0, 0, Path())

    assert measured["answers"] == (dict.fromkeys(("shape", "colour", "pattern"), False) if answers else {})
    assert measured["pictures"] == CANDIDATES


def test_runs_are_kept_by_the_models_digest_and_the_recipe_that_they_learn_by() -> None:
    work = Path("work")

    drawn = feedback.run_file(work, "held-out", "a third removed", 3, 1, digest="abc", learns=False)
    learned = feedback.run_file(work, "held-out", "ceiling", 3, digest="abc", learns=True)

    assert drawn == work / "held-out-a-third-removed-3-1-abc.json"
    assert learned == work / "held-out-ceiling-3-abc-directional.json"


def test_a_third_of_each_aspect_s_words_is_removed() -> None:
    aspects = feedback.without_a_third(feedback.ASPECTS, 4)

    assert [len(aspect.words) for aspect in aspects] == [8, 8, 2]
    assert aspects != feedback.without_a_third(feedback.ASPECTS, 5)
    for aspect, whole in zip(aspects, feedback.ASPECTS, strict=True):
        assert [word for word in whole.words if word in aspect.words] == list(aspect.words)


def test_components_are_as_long_as_the_standard_deviation_along_them() -> None:
    points = np.random.default_rng(0).normal(0, 1, (4000, 10)) * np.arange(1, 11)

    lengths = np.linalg.norm(feedback.scaled(points), axis=1)

    assert lengths == pytest.approx([10, 9, 8, 7, 6, 5, 4, 3], rel=0.05)


def test_cma_es_finds_the_minimum_of_a_badly_scaled_bowl() -> None:
    method = feedback.CmaEs(directions(np.eye(8)), 0)
    target, scales = np.linspace(-1, 1, 8), np.geomspace(1, 100, 8)

    for _ in range(250):
        method.propose()
        method.judge(np.argsort((scales * np.square(method.tried - target)).sum(1)).tolist())

    assert method.mean == pytest.approx(target, abs=1e-3)


def test_rocchio_moves_towards_what_ranks_first() -> None:
    method = feedback.Rocchio(directions(np.eye(8) * 0.3), 0)
    target = feedback.unit(np.array([1, 1, 0, 0, 0, 0, 0, -1.0]))
    start = method.centre @ target

    for _ in range(20):
        method.propose()
        method.judge(np.argsort(-method.tried @ target).tolist())

    assert start < 0.5
    assert method.centre @ target > 0.9


def test_random_search_keeps_the_best() -> None:
    method = feedback.RandomSearch(LEXICON, 0)
    concepts = method.propose()

    method.judge([3, 0, 1, 2, 4, 5])

    assert len(concepts) == CANDIDATES
    assert method.word().identity == concepts[3].identity
