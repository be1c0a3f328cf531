"""Sliders between two words: closed forms, syntax, and that their pictures lie between the words'."""

import re
from pathlib import Path

import numpy as np
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model
from oneword.runtime.prompt import UnknownWord, Vocabulary, split_at_words, used_words
from oneword.runtime.prompt_schedule import prompts_by_step
from oneword.runtime.slider import Slider, between


def word(token: str, *rows: list[float]) -> Concept:
    return Concept(token, {"text_encoder": np.array(rows, np.float32)})


def test_a_slider_turns_by_a_share_of_the_angle_and_mixes_the_lengths() -> None:
    first, second = np.array([[2.0, 0, 0]], np.float32), np.array([[0, 4.0, 0]], np.float32)
    for share in (0.0, 0.25, 0.5, 1.0):
        angle, length = share * np.pi / 2, 2 + 2 * share
        expected = [[length * np.cos(angle), length * np.sin(angle), 0]]
        np.testing.assert_allclose(between(first, second, share), expected, atol=1e-6)


@pytest.mark.parametrize("second", [[3.0, 0], [-1.0, 0], [0.0, 0]])
def test_parallel_opposite_and_zero_rows_are_mixed_along_the_line(second: list[float]) -> None:
    mixed = between(np.array([[1.0, 0]], np.float32), np.array([second], np.float32), 0.25)
    np.testing.assert_allclose(mixed, [[0.75 + 0.25 * second[0], 0]], atol=1e-6)


def test_words_of_different_numbers_of_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match="a slider needs two words of equally many"):
        _ = Slider(word("<a>", [1, 0]), word("<b>", [1, 0], [0, 1]), 0.5).concept


@pytest.mark.parametrize(
    "text",
    [
        "{<a>|<b>}",
        "{<a>|<b>:}",
        "{<a>|<b>:x}",
        "{<a>|<b>:1.2}",
        "{<a>|<b>:-1}",
        "{<a>|<b>|<c>:0.2}",
        "{<a>|b:0.2}",
        "{<a>|(<b>:1.2):0.3}",
        "{<a>|<b>:(0.3)}",
        "{<a>|<b>:0.3",
        "({<a>|<b>:0.3)",
        "{<a>| BREAK <b>:0.3}",
        "{<a>|{<b>|<c>:0.2}:0.3}",
        "{<a>|<b>:[0.3:0.7:0.5]}",
        "[{<a>|<b>:[0.3:0.7:0.5]}:x:0.8]",
        r"\{<a>|<b>}",
    ],
)
def test_a_malformed_slider_is_one_line_of_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a slider: write {<word>\|<word>:0.3}, with the second word's share"):
        prompts_by_step(f"a {text} x", 8)


def test_a_malformed_slider_is_an_error_where_words_are_found_too() -> None:
    vocabulary = Vocabulary({f"<{name}>": word(f"<{name}>", [1, 0]) for name in "ab"})
    with pytest.raises(UsageError, match="is not a slider"):
        used_words("{<a>|(<b>:1.2):0.3}", vocabulary, lambda piece: False)


def test_a_sliders_words_must_be_loaded() -> None:
    vocabulary = Vocabulary({"<toy>": word("<toy>", [1, 0])})
    with pytest.raises(UnknownWord, match="no word '<toys>' is loaded, similar words: <toy>"):
        used_words("a {<toy>|<toys>:0.5}", vocabulary, lambda piece: False)


@pytest.mark.parametrize(
    "text", ["a {b:0.3} {} {", "a {cat|dog:0.3} photo", "{{cat}}", "{cat|dog", "{a|b|c}", "{2$$a|b}", "{<toy>}"]
)
def test_braces_that_do_not_begin_with_a_word_and_a_bar_are_text(text: str) -> None:
    vocabulary = Vocabulary({"<toy>": word("<toy>", [1, 0])})
    pieces = [*split_at_words(text, vocabulary, lambda piece: False)]
    assert [piece if isinstance(piece, str) else "<toy>" for piece in pieces if not isinstance(piece, Slider)] == [
        part for part in re.split("(<toy>)", text) if part
    ]
    assert prompts_by_step(text, 3) == [text] * 3


def test_a_schedule_chooses_between_sliders() -> None:
    low, high = "{<toy>|<gem>:0.3}", "{<toy> | <gem> : 0.7}"
    assert prompts_by_step(f"[{low}:{high}:2] x", 4) == [f"{low} x"] * 2 + [f"{high} x"] * 2
    assert prompts_by_step(f"[{low}|{high}]", 4) == [low, high] * 2


def test_where_a_text_stands_for_the_words_a_slider_has_that_of_the_nearer_one() -> None:
    rows = {"text_encoder": np.array([[1.0, 0]], np.float32)}, {"text_encoder": np.array([[0, 1.0]], np.float32)}
    first, second = (Concept(f"<{text}>", row, {"text": text}) for row, text in zip(rows, ("cat", "dog"), strict=True))
    assert [Slider(first, second, share).concept.text for share in (0.0, 0.4, 0.6, 1.0)] == ["cat", "cat", "dog", "dog"]


def test_opposite_words_have_no_word_half_way() -> None:
    with pytest.raises(UsageError, match=r"^{<a>\|<b>:0.5} is not a word: the two are opposite, change the share$"):
        _ = Slider(word("<a>", [1, 0]), word("<b>", [-1, 0]), 0.5).concept


def test_a_slider_in_a_prompt_is_the_word_in_between_with_its_weight(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    random = np.random.default_rng(1)
    first, second = (random.normal(0, 0.5, (2, 32)).astype(np.float32) for _ in range(2))
    model.load(Concept("<toy>", {"text_encoder": first}))
    model.load(Concept("gem", {"text_encoder": second}))
    model.load(Concept("<mix>", {"text_encoder": between(first, second, 0.3)}))

    texts = [
        "a ({<toy>|<gem>:0.3}:1.3) b",
        "a (<mix>:1.3) b",
        "a ({ <toy> | <gem> : .3 }:1.3) b",
        "a (<toy>:1.3) b",
    ]
    slider, mixed, spaced, toy = model.encode([model.tokenize(text) for text in texts])

    np.testing.assert_array_equal(slider.hidden_states, mixed.hidden_states)
    np.testing.assert_array_equal(spaced.hidden_states, mixed.hidden_states)
    assert np.abs(slider.hidden_states - toy.hidden_states).max() > 1e-3
