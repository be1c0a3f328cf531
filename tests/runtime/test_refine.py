"""Refining a word: scores and posteriors by hand, geometry in closed form, and states that are damaged."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneword.engines.errors import OnewordError, UsageError
from oneword.runtime.aspects import Aspect
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import (
    MAX_ROUNDS,
    NONE,
    Refinement,
    Round,
    best_choice,
    components,
    finish,
    judge,
    liked,
    normal_scores,
    posterior,
    propose,
    refine_concept,
    undo,
)
from oneword.runtime.request import Request

ASPECTS = (Aspect("colour", ("red", "blue", "green")), Aspect("shape", ("star", "ring")))
NAMES = ["toy", "red", "blue", "green", "star", "ring", "unused"]
TABLE = np.random.default_rng(0).normal(0, 0.1, (len(NAMES), 12)).astype(np.float32)


def lexicon(encoders: tuple[tuple[str, int], ...] = (("text_encoder", 12),), digest: str = "model") -> Lexicon:
    """Random rows of several lengths, and a last row of zeros that is no word."""
    rng = np.random.default_rng(0)
    tables = {
        name: np.vstack([rng.normal(0, 0.1, (len(NAMES), width)), np.zeros((1, width))]).astype(np.float32)
        for name, width in encoders
    }
    return Lexicon(tables, lambda name, text: [NAMES.index(word) for word in text.split()], digest=digest)


WIDE = Lexicon({"text_encoder": np.eye(1280, dtype=np.float32)}, lambda name, text: [len(text)])
LONG = Concept("<long>", {"text_encoder": np.ones((8, 1280), np.float32)})


def refinement(**changes: Any) -> Refinement:
    settings: dict[str, Any] = {"token": "<toy>", "start": "toy", "aspects": ASPECTS, "model": "model", "seed": 5}
    settings["aspect_rounds"] = 4
    return Refinement(**{**settings, **changes})


def played(rounds: int, **changes: Any) -> Refinement:
    """A refinement whose user ranks 2 first and likes 1 in turn."""
    state = refinement(**changes)
    for number in range(rounds):
        state = judge(state, ranking=[2, 0, 1, 5, 4, 3]) if number % 2 else judge(state, likes=[1], dislikes=[3, 0])
    return state


def rows(concepts: tuple[Concept, ...]) -> np.ndarray:
    """The rows of every candidate, one after another."""
    return np.concatenate([concept.vectors["text_encoder"] for concept in concepts])


def stacked(concepts: tuple[Concept, ...]) -> np.ndarray:
    """The unit rows of candidates that have as many rows as each other, [K, n, D]."""
    values = np.stack([concept.vectors["text_encoder"] for concept in concepts]).astype(np.float64)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_normal_scores_of_six_ranks_are_blom_s() -> None:
    # The normal quantiles of 0.1, 0.26 and 0.42, from a table.
    expected = [1.28155, 0.64335, 0.20189, -0.20189, -0.64335, -1.28155]

    assert normal_scores([5, 3, 1, -1, -3, -5]) == pytest.approx(expected, abs=1e-5)


def test_equal_levels_share_the_mean_of_their_scores() -> None:
    liked = (1.28155 + 0.64335) / 2
    neutral = (0.20189 - 0.20189 - 0.64335) / 3

    assert normal_scores([1, 0, 1, 0, -1, 0]) == pytest.approx(
        [liked, neutral, liked, neutral, -1.28155, neutral], abs=1e-5
    )
    assert normal_scores([0, 0, 0, 0]) == pytest.approx([0, 0, 0, 0], abs=1e-12)


def test_the_posterior_of_one_round_is_the_closed_form() -> None:
    # Scores 0, a, -a for none, star, ring, where a is the normal quantile of 2.625 / 3.25. Centred, the design has the
    # eigenvalue 1 along (1, -1) and 1/3 along (1, 1); a ridge of (noise / prior)^2 is added to both.
    a, noise, prior = 0.86942, 0.5, 0.7
    ridge = (noise / prior) ** 2
    state = refinement(
        candidates=3,
        aspects=(ASPECTS[1],),
        rounds=(Round((0, 2, -2), ((NONE,), (0,), (1,))),),
    )

    mean, covariance = posterior(state)

    assert mean == pytest.approx([a / (1 + ridge), -a / (1 + ridge)], abs=1e-5)
    difference, total = noise**2 / (1 + ridge), noise**2 / (1 / 3 + ridge)
    assert covariance == pytest.approx(
        np.array([[total + difference, total - difference], [total - difference, total + difference]]) / 2
    )


def test_before_the_first_round_every_word_has_the_prior() -> None:
    mean, covariance = posterior(refinement())

    assert not mean.any()
    np.testing.assert_allclose(covariance, 0.7**2 * np.eye(5))
    assert best_choice(refinement()) == (NONE, NONE)


def test_a_word_is_not_blamed_for_the_words_beside_it() -> None:
    # red star wins, red ring and blue ring lose equally: it is the star, not red, that was liked.
    state = refinement(candidates=3, rounds=(Round((2, -1, -1), ((0, 0), (0, 1), (1, 1))),))

    mean, _ = posterior(state)

    assert mean[3] > mean[0] > 0 > mean[1] > mean[4]
    assert mean[2] == 0  # green was not tried
    assert state.words == {"colour": "red", "shape": "star"}


def test_an_aspect_whose_words_are_no_better_than_none_is_left_alone() -> None:
    state = refinement(candidates=3, rounds=(Round((2, -1, -1), ((NONE, NONE), (0, 1), (1, 0))),))

    assert best_choice(state) == (NONE, NONE)
    assert state.words == {}


@pytest.mark.parametrize("ranking", [[0, 1, 2, 3, 4, 5], [3, 5, 1, 0, 2, 4]])
def test_a_ranking_likes_its_upper_half_and_dislikes_its_lower_half(ranking: list[int]) -> None:
    [judged] = judge(refinement(), ranking=ranking).rounds

    assert [judged.levels[index] for index in ranking] == [5, 3, 1, -1, -3, -5]


def test_all_likes_of_a_round_and_the_first_of_a_ranking_were_liked_best() -> None:
    state = judge(played(2), dislikes=[0])

    assert liked(judge(state, likes=[5, 4])) == [(1, 1), (2, 2), (4, 4), (4, 5)]


# ---- candidates -----------------------------------------------------------------------------------------------------


def test_the_first_candidate_of_the_first_round_is_the_start() -> None:
    first = propose(refinement(), lexicon())[0]

    np.testing.assert_array_equal(first.vectors["text_encoder"], TABLE[[NAMES.index("toy")]])
    assert first.provenance["aspects"] == ""


def test_a_candidate_has_the_rows_of_a_word_of_each_aspect_and_then_those_of_the_start() -> None:
    liked_green_star = Round((0, 2, -2), ((NONE, NONE), (2, 0), (0, 1)))
    state = refinement(candidates=3, rounds=(liked_green_star,))

    best = propose(state, lexicon())[0]

    np.testing.assert_array_equal(
        best.vectors["text_encoder"], TABLE[[NAMES.index(name) for name in ("green", "star", "toy")]]
    )
    assert best.provenance["aspects"] == "green, star"


def test_a_word_of_several_tokens_has_a_row_for_each_in_every_encoder() -> None:
    lex = lexicon((("text_encoder", 12), ("text_encoder_2", 20)))
    aspect = Aspect("colour", ("red blue", "green"))
    state = refinement(candidates=3, aspects=(aspect,), rounds=(Round((0, 2, -2), ((NONE,), (0,), (1,))),))

    best = propose(state, lex)[0]

    assert {name: rows.shape for name, rows in best.vectors.items()} == {
        "text_encoder": (3, 12),
        "text_encoder_2": (3, 20),
    }
    np.testing.assert_array_equal(
        best.vectors["text_encoder_2"],
        np.concatenate([lex.rows(word)["text_encoder_2"] for word in ("red blue", "toy")]),
    )


@pytest.mark.parametrize("rounds", [4, 5, 7])
def test_rows_keep_their_lengths_in_the_local_search(rounds: int) -> None:
    lex = lexicon((("text_encoder", 12), ("text_encoder_2", 20)))
    before = propose(refinement(rounds=played(4).rounds), lex)[0]

    for concept in propose(played(rounds), lex):
        for name, rows in before.vectors.items():
            np.testing.assert_allclose(
                np.linalg.norm(concept.vectors[name], axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5
            )


@pytest.mark.parametrize("rounds", [0, 3, 6])
def test_the_same_state_proposes_the_same_words_and_another_seed_others(rounds: int) -> None:
    np.testing.assert_array_equal(rows(propose(played(rounds), lexicon())), rows(propose(played(rounds), lexicon())))
    assert not np.array_equal(
        rows(propose(played(rounds), lexicon())), rows(propose(played(rounds, seed=6), lexicon()))
    )


def test_the_first_candidate_is_the_word_that_finishing_gives() -> None:
    for rounds in range(8):
        state = played(rounds)
        np.testing.assert_array_equal(
            propose(state, lexicon())[0].vectors["text_encoder"], finish(state, lexicon()).vectors["text_encoder"]
        )


def test_liked_words_come_more_often() -> None:
    state = refinement(candidates=16)
    for _ in range(3):
        concepts = propose(state, lexicon())
        likes = [i for i, concept in enumerate(concepts) if "green" in concept.provenance["aspects"]]
        state = judge(state, likes=likes)

    labels = [concept.provenance["aspects"] for concept in propose(state, lexicon())]

    assert state.words["colour"] == "green"
    assert sum("green" in label for label in labels) > 8  # a third of 16 by chance


@pytest.mark.parametrize("seed", range(20))
def test_a_round_shows_a_word_that_was_in_no_round_before_once(seed: int) -> None:
    state, earlier = refinement(seed=seed, aspects=(Aspect("shape", tuple(NAMES)),), aspect_rounds=8), set[str]()
    for _ in range(8):
        words = [concept.provenance["aspects"] for concept in propose(state, lexicon())[1:]]
        new = [word for word in words if word not in earlier]
        assert len(set(new)) == len(new)
        earlier |= set(words)
        state = judge(state, likes=[1], dislikes=[2])

    assert earlier == set(NAMES)


def test_a_round_shows_all_words_of_a_short_aspect() -> None:
    words = [concept.provenance["aspects"] for concept in propose(refinement(aspects=ASPECTS[1:]), lexicon())[1:]]

    assert {words.count(word) for word in ASPECTS[1].words} == {2, 3}


# ---- local search ---------------------------------------------------------------------------------------------------


def test_local_candidates_are_in_pairs_on_opposite_sides_of_the_centre() -> None:
    centre, *pairs = stacked(propose(played(4, candidates=6), lexicon()))

    # unit(z + d) and unit(z - d) lie in one plane with z.
    for plus, minus in ((pairs[0], pairs[1]), (pairs[2], pairs[3])):
        for row in range(len(centre)):
            assert np.linalg.matrix_rank(np.stack([centre[row], plus[row], minus[row]]), tol=1e-5) == 2


def test_a_local_round_moves_towards_what_is_liked_and_a_quarter_away_from_what_is_disliked() -> None:
    lex, state = lexicon(), played(4)
    tried = stacked(propose(state, lex))
    expected = tried[0] + (tried[[1, 4]].mean(0) - tried[0]) - 0.25 * (tried[2] - tried[0])

    [moved] = stacked((finish(judge(state, likes=[1, 4], dislikes=[2]), lex),))

    np.testing.assert_allclose(moved, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_a_local_round_without_likes_and_dislikes_changes_nothing() -> None:
    state = played(4)

    np.testing.assert_allclose(
        finish(judge(state), lexicon()).vectors["text_encoder"],
        finish(state, lexicon()).vectors["text_encoder"],
        rtol=1e-6,
    )


def test_components_are_the_principal_axes_with_a_fixed_sign() -> None:
    points = np.array([[0, 3, 0], [0, -3, 0], [1, 0, 0], [-1, 0, 0.0]]) + 7

    np.testing.assert_allclose(components(points, 8), [[0, 1, 0], [1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(components(-points, 1), [[0, 1, 0]], atol=1e-12)


# ---- the state ------------------------------------------------------------------------------------------------------


def test_undo_restores_the_very_state() -> None:
    states = [refinement()]
    for _ in range(6):
        states.append(judge(states[-1], likes=[1], dislikes=[2]))

    for before, after in itertools.pairwise(states):
        assert undo(after) == before
        assert undo(after).to_json() == before.to_json()


def test_nothing_to_undo_and_no_more_rounds_are_errors() -> None:
    with pytest.raises(UsageError, match="no round to undo"):
        undo(refinement())
    with pytest.raises(UsageError, match=f"{MAX_ROUNDS} rounds are judged"):
        judge(played(MAX_ROUNDS))


def test_the_pictures_of_the_last_round_have_a_seed_with_the_highest_one() -> None:
    """A picture's seed is the refinement's, counted up by round, and at most 2^63 - 1."""
    assert Request("a cat", seed=refinement(seed=2**63 - MAX_ROUNDS).seed + MAX_ROUNDS - 1)
    with pytest.raises(UsageError, match="seed is"):
        Request("a cat", seed=refinement(seed=2**63 - MAX_ROUNDS).seed + MAX_ROUNDS)


def test_the_state_of_a_renamed_word_has_its_new_name() -> None:
    word = finish(played(3), lexicon())

    state = Refinement.of(dataclasses.replace(word, token="<gem>"))

    assert state == dataclasses.replace(played(3), token="<gem>")
    assert finish(state, lexicon()).token == "<gem>"


@pytest.mark.parametrize("rounds", [0, 3, 9])
def test_a_state_survives_its_word_s_file(rounds: int, tmp_path: Path) -> None:
    state = played(rounds)
    save_concept(finish(state, lexicon()), tmp_path / "toy.safetensors")

    concept = load_concept(tmp_path / "toy.safetensors")

    assert Refinement.of(concept) == state
    assert concept.provenance["rounds"] == str(rounds)
    assert concept.provenance["init"] == "toy"


def test_a_word_of_stable_diffusion_3_can_be_refined() -> None:
    widths = {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}
    tables = {name: np.eye(1, width, dtype=np.float32) for name, width in widths.items()}
    word = Concept("<toy>", {name: np.ones((1, width), np.float32) for name, width in widths.items()})
    model = Lexicon(tables, lambda name, text: [0])

    state = refine_concept(word, model, ASPECTS)

    assert {name: rows.shape[1] for name, rows in finish(state, model).vectors.items()} == widths
    with pytest.raises(UsageError, match="'<cat>' has no vectors for text_encoder_2, text_encoder_3: refine a word"):
        refine_concept(Concept("<cat>", {"text_encoder": np.ones((1, 768), np.float32)}), model, ASPECTS)


def test_a_local_search_after_rounds_without_words_stays_at_the_start() -> None:
    unchosen = Round((0,) * 6, ((NONE, NONE),) * 6)
    state = refinement(rounds=(unchosen,) * 4)

    for concept in propose(state, lexicon()):
        np.testing.assert_allclose(concept.vectors["text_encoder"], TABLE[:1], rtol=1e-6)


@pytest.mark.parametrize("text", ["", "{}", played(2).to_json().replace('"seed"', '"weight"')])
def test_a_state_that_cannot_be_continued_is_none(text: str) -> None:
    word = Concept("<toy>", {"text_encoder": np.ones((1, 12), np.float32)}, {"refinement": text})

    assert Refinement.of(word) is None


def test_a_word_that_was_not_refined_has_no_state() -> None:
    assert Refinement.of(Concept("<toy>", {"text_encoder": np.ones((1, 12), np.float32)})) is None


def test_the_largest_state_fits_into_a_concept_file(tmp_path: Path) -> None:
    aspects = tuple(Aspect(f"aspect {i}", tuple(f"word {j}" for j in range(12))) for i in range(8))
    word = Concept("<toy>", {"text_encoder": np.ones((4, 1280), np.float32)})
    state = refine_concept(word, WIDE, aspects)
    for _ in range(MAX_ROUNDS):
        state = judge(state, likes=[1])

    save_concept(finish(state, WIDE), tmp_path / "toy.safetensors")

    restored = Refinement.of(load_concept(tmp_path / "toy.safetensors"))
    assert restored == state


def test_a_refinement_of_a_learned_word_starts_at_that_word_and_needs_no_file_later() -> None:
    vectors = np.linspace(-1, 2, 24, dtype=np.float32).reshape(2, 12)
    learned = Concept("<cat>", {"text_encoder": vectors})

    state = Refinement.from_json(refine_concept(learned, lexicon(), ASPECTS, seed=3).to_json())

    assert (state.token, state.seed) == ("<cat>", 3)
    np.testing.assert_array_equal(
        propose(state, lexicon())[0].vectors["text_encoder"], vectors.astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge(refinement(), likes=[6]), "candidate is 6, but must be 0 to 5"),
        (lambda: judge(refinement(), dislikes=[-1]), "candidate is -1, but must be 0 to 5"),
        (lambda: judge(refinement(), likes=[True]), "candidate is True, but must be a whole number"),
        (lambda: judge(refinement(), likes=[2], dislikes=[1, 2]), "candidate 2 is both liked and disliked"),
        (
            lambda: judge(refinement(), ranking=[0, 1, 2]),
            "the ranking is .0, 1, 2., but must list every candidate once",
        ),
        (lambda: judge(refinement(), likes=[1], ranking=[0]), "give one of them"),
        (lambda: refinement(start=" "), "the start is ' '"),
        (lambda: refinement(candidates=2), "candidates is 2, but must be 3 to 16"),
        (lambda: refinement(seed=-1), "seed is -1"),
        (lambda: refinement(seed=2**63 - MAX_ROUNDS + 1), f"but must be 0 to {2**63 - MAX_ROUNDS}"),
        (lambda: refinement(aspects=()), "there are 0 aspects, but there must be 1 to 16"),
        (lambda: refinement(aspects=(ASPECTS[0], ASPECTS[0])), "two aspects are called 'colour'"),
        (lambda: refinement(token="a b"), "token 'a b' is not safe"),
        (lambda: refinement(rounds=(Round((0, 0)),)), "round 1 has 2 levels, but must have 6, one for each candidate"),
        (lambda: refinement(rounds=(Round((0,) * 6),)), "round 1 has 0 choices, but must have 6"),
        (lambda: refinement(rounds=(Round((0,) * 6, ((0, 2),) * 6),)), "choice of shape is 2, but must be -1 to 1"),
        (lambda: refinement(rounds=(Round((0,) * 6, ((0,),) * 6),)), "a choice of 1 words for 2 aspects"),
        (lambda: refinement(rounds=(Round((99,) * 6, ((0, 0),) * 6),)), "level is 99"),
        (lambda: propose(refinement(model="other"), lexicon()), "begun with another model"),
        (
            lambda: refine_concept(LONG, WIDE, ASPECTS),
            "the rows of '<long>' take 27308 characters, but at most 24576 are allowed",
        ),
        (lambda: propose(refinement(start_rows={"text_encoder": "?"}), lexicon()), "the start's vectors are damaged"),
        (lambda: propose(refinement(start_rows={"text_encoder": "AAAA"}), lexicon()), "vectors are damaged"),
        (lambda: propose(refinement(start_rows={"other": "AACAPw=="}), lexicon()), "has no vectors for text_encoder"),
        (lambda: propose(refinement(start="<gone>"), lexicon()), "no word '<gone>' is loaded"),
        (lambda: Refinement.from_json("{"), "the state of the refinement is damaged"),
        (lambda: Refinement.from_json("[" * 30_000), "the state of the refinement is damaged"),
        (lambda: Refinement.from_json(" " * 50_000), "it has 50000 characters, but at most"),
        (lambda: Refinement.from_json(refinement().to_json().replace('"seed":', '"sed":')), "damaged"),
        (lambda: Refinement.from_json(refinement().to_json()[:-1] + ',"x":1}'), "unknown or missing fields"),
    ],
)  # fmt: skip
def test_a_bad_call_or_state_is_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OnewordError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def read(text: str) -> tuple[Refinement | None, str]:
    """The state, or None and the error's message."""
    try:
        return Refinement.from_json(text), ""
    except OnewordError as error:
        return None, str(error)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.text(max_size=200) | ANYTHING.map(lambda value: json.dumps(value)))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    state, message = read(text)

    assert state is None
    assert message
    assert "\n" not in message


@given(st.sampled_from([field.name for field in dataclasses.fields(Refinement)]), ANYTHING)
def test_a_state_with_a_changed_field_is_as_written_or_one_line(name: str, value: Any) -> None:
    document = json.loads(played(5).to_json())
    document[name] = value

    state, message = read(json.dumps(document))

    assert "\n" not in message
    assert state is None or json.loads(state.to_json()) == document


@given(st.integers(0, 2), st.integers(0, 5), ANYTHING)
def test_a_state_with_a_changed_round_is_as_written_or_one_line(number: int, index: int, value: Any) -> None:
    document = json.loads(played(3).to_json())
    document["rounds"][number]["choices"][index] = value
    document["rounds"][number]["levels"][index] = index

    state, message = read(json.dumps(document))

    assert "\n" not in message
    assert state is None or len(propose(state, lexicon())) == 6


@given(st.lists(st.integers(0, 5), unique=True), st.lists(st.integers(0, 5), unique=True))
def test_every_judgement_is_recorded_and_survives_json(likes: list[int], dislikes: list[int]) -> None:
    dislikes = [index for index in dislikes if index not in likes]

    state = judge(refinement(), likes=likes, dislikes=dislikes)

    [judged] = state.rounds
    assert [index for index, level in enumerate(judged.levels) if level > 0] == sorted(likes)
    assert [index for index, level in enumerate(judged.levels) if level < 0] == sorted(dislikes)
    assert Refinement.from_json(state.to_json()) == state
