from pathlib import Path

import numpy as np
import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.runtime.concept import Concept, save_concept
from oneword.train.initial import initial_rows


def test_a_word_starts_from_a_row_a_mean_of_rows_or_a_random_row(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    table = source.text_encoders["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    star, ring = (
        source.tokenizers["text_encoder"](word, add_special_tokens=False).input_ids for word in ("star", "ring")
    )
    assert len(star) == len(ring) == 1

    single = initial_rows(source, "star", 2, 0)["text_encoder"]
    mean = initial_rows(source, "star, ring,", 1, 0)["text_encoder"]
    random = initial_rows(source, "random", 3, 0)["text_encoder"]
    auto = initial_rows(source, "auto", 2, 0)["text_encoder"]

    torch.testing.assert_close(single, table[star].repeat(2, 1))
    torch.testing.assert_close(mean, (table[star] + table[ring]) / 2)
    torch.testing.assert_close(auto, table.mean(0).expand(2, -1))
    median = np.median(np.linalg.norm(table.numpy(), axis=1))
    np.testing.assert_allclose(np.linalg.norm(random.numpy(), axis=1), median, rtol=0.02)


def test_a_word_of_more_vectors_than_the_recipe_learns_is_refused_as_a_start(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = load_source(tiny_model_dir)
    rows = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    save_concept(Concept("<toy>", {"text_encoder": rows}), tmp_path / "toy.safetensors")
    init = str(tmp_path / "toy.safetensors")

    with pytest.raises(UsageError, match=r"'<toy>' has 3 vectors for text_encoder, the word would have 1: add --vec"):
        initial_rows(source, init, 1, 0)
    np.testing.assert_allclose(initial_rows(source, init, 3, 0)["text_encoder"].numpy(), rows, rtol=1e-6)
    np.testing.assert_allclose(initial_rows(source, init, 4, 0)["text_encoder"].numpy()[2:], rows[[2, 2]], rtol=1e-6)
