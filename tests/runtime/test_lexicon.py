"""Directions of words: of tables by hand, and of a bundle's own vocabulary."""

from pathlib import Path

import numpy as np
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept
from oneword.runtime.lexicon import Lexicon

TABLES = {
    "a": np.array([[3, 0], [0, 4], [0, 0], [-5, 0]], np.float16),
    "b": np.array([[0, 2, 0], [0, 0, 1], [0, 0, 0], [0, -2, 0]], np.float32),
}


def token_ids(encoder: str, text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_lengths_and_means_are_those_of_the_rows_that_are_not_zero() -> None:
    lexicon = Lexicon(TABLES, token_ids)

    assert lexicon.lengths == {"a": pytest.approx(4), "b": pytest.approx(5 / 3)}
    np.testing.assert_allclose(lexicon.mean, [0, 1 / 3, 0, 0, 1 / 3], atol=1e-7)


def test_a_text_of_several_tokens_is_the_mean_of_their_directions() -> None:
    lexicon = Lexicon(TABLES, token_ids)
    half = np.sqrt(0.5)

    np.testing.assert_allclose(lexicon.direction("0"), [1, 0, 0, 1, 0], atol=1e-7)
    np.testing.assert_allclose(lexicon.direction("0 1"), [half, half, 0, half, half], atol=1e-7)
    assert lexicon.tokens("0 1 1") == 3


def test_vectors_have_the_vocabulary_s_length_whatever_the_direction_s() -> None:
    vectors = Lexicon(TABLES, token_ids).vectors(np.array([30, 40, 0, 0, -0.1]))

    np.testing.assert_allclose(vectors["a"], [[2.4, 3.2]], rtol=1e-6)
    np.testing.assert_allclose(vectors["b"], [[0, 0, -5 / 3]], rtol=1e-6)
    assert {value.dtype for value in vectors.values()} == {np.dtype(np.float32)}


def test_words_without_a_direction_are_one_line_errors() -> None:
    toy = Concept("<toy>", {"a": np.ones((1, 2)), "b": np.ones((1, 3))})
    lexicon = Lexicon(TABLES, token_ids, [toy])

    np.testing.assert_allclose(lexicon.direction("<toy>"), lexicon.direction_of(toy))
    for text, message in [
        ("", "'' has no token in this model"),
        ("0 3", "the rows of '0 3' cancel out"),
        ("2", "the rows of '2' cancel out"),
        ("<cat>", "no word '<cat>' is loaded, loaded words: <toy>"),
    ]:
        with pytest.raises(UsageError, match=message):
            lexicon.direction(text)
    with pytest.raises(UsageError, match=r"vectors of width 4 \(a\), this model takes 2 \(a\), 3 \(b\)"):
        lexicon.direction_of(Concept("<toy>", {"a": np.ones((1, 4))}))


def test_a_bundle_s_words_are_its_tokenizer_s_rows(tiny_bundle: Path) -> None:
    import safetensors.numpy
    from tokenizers import Tokenizer

    bundle = Bundle.open(tiny_bundle)
    encoder = bundle.manifest.encoders[0]
    [table] = safetensors.numpy.load_file(bundle.file(encoder.table)).values()
    tokenizer = Tokenizer.from_file(str(bundle.file(encoder.tokenizer) / "tokenizer.json"))
    row = table[tokenizer.token_to_id("star</w>")]

    lexicon = Lexicon.read(bundle)

    np.testing.assert_allclose(lexicon.direction("star"), row / np.linalg.norm(row), atol=1e-6)
    assert lexicon.lengths["text_encoder"] == pytest.approx(np.linalg.norm(table, axis=1).mean(), rel=1e-5)
    assert lexicon.digest == bundle.manifest.source.digest
