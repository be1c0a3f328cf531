"""The measurements of `benchmarks.words_resident`, on a tiny model."""

from pathlib import Path

import pytest

from benchmarks.words_resident import encode, load_one, opened, refuse
from oneword.engines.open import Backend


def test_prompts_are_encoded_with_one_word_and_with_many(tiny_bundle: Path) -> None:
    single, _ = opened(tiny_bundle, Backend.ONNXRUNTIME, 1)
    full, seconds = opened(tiny_bundle, Backend.ONNXRUNTIME, 50)

    one_ms, all_ms, share = encode(single, full, rounds=10)

    assert (len(single.words), len(full.words)) == (1, 50)
    assert min(seconds, one_ms, all_ms) > 0
    assert share == pytest.approx(all_ms / one_ms - 1, abs=1e-3)  # milliseconds have four digits


def test_a_word_is_loaded_and_every_bad_file_refused(tmp_path: Path) -> None:
    assert load_one(200) > 0
    assert min(refuse(tmp_path).values()) > 0
