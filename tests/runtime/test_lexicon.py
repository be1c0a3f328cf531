"""Rows of words: of tables by hand, and of a bundle's own vocabulary."""

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


def test_a_text_has_the_rows_of_its_tokens_as_float32() -> None:
    lexicon = Lexicon(TABLES, token_ids)

    np.testing.assert_array_equal(lexicon.rows("0 3")["a"], [[3, 0], [-5, 0]])
    np.testing.assert_array_equal(lexicon.rows("0 3")["b"], [[0, 2, 0], [0, -2, 0]])
    assert {rows.dtype for rows in lexicon.rows("0").values()} == {np.dtype(np.float32)}
    assert lexicon.tokens("0 1 1") == 3
    assert lexicon.widths == {"a": 2, "b": 3}


def test_words_without_rows_are_one_line_errors() -> None:
    toy = Concept("<toy>", {"a": np.ones((1, 2)), "b": np.ones((1, 3))})
    lexicon = Lexicon(TABLES, token_ids, [toy])

    assert lexicon.rows("<toy>") == toy.vectors
    for text, message in [
        ("", "'' has no token in this model"),
        ("<cat>", "no word '<cat>' is loaded, loaded words: <toy>"),
    ]:
        with pytest.raises(UsageError, match=message):
            lexicon.rows(text)
    with pytest.raises(UsageError, match=r"vectors of width 4 \(a\), 3 \(b\), this model takes 2 \(a\), 3 \(b\)"):
        lexicon.rows_of(Concept("<toy>", {"a": np.ones((1, 4)), "b": np.ones((1, 3))}))
    with pytest.raises(UsageError, match="'<toy>' has no vectors for b: refine a word that has some for every encoder"):
        lexicon.rows_of(Concept("<toy>", {"a": np.ones((1, 2))}))


def test_a_bundle_s_words_are_its_tokenizer_s_rows(tiny_bundle: Path) -> None:
    import safetensors.numpy
    from tokenizers import Tokenizer

    bundle = Bundle.open(tiny_bundle)
    encoder = bundle.manifest.encoders[0]
    [table] = safetensors.numpy.load_file(bundle.file(encoder.table)).values()
    tokenizer = Tokenizer.from_file(str(bundle.file(encoder.tokenizer) / "tokenizer.json"))
    row = table[tokenizer.token_to_id("star</w>")]

    lexicon = Lexicon.read(bundle)

    np.testing.assert_array_equal(lexicon.rows("star")["text_encoder"], row[None].astype(np.float32))
    assert lexicon.digest == bundle.manifest.source.digest
