from pathlib import Path

import numpy as np
import torch

from oneword.export.source import load_source
from oneword.train.initial import initial_rows


def test_a_word_starts_from_a_row_a_mean_of_rows_or_a_random_row(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    table = source.text_encoders["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    star, ring = (
        source.tokenizers["text_encoder"](word, add_special_tokens=False).input_ids for word in ("star", "ring")
    )
    assert len(star) == len(ring) == 1

    single = initial_rows(source, "star", 2, 0)["text_encoder"]
    mean = initial_rows(source, "star, ring", 1, 0)["text_encoder"]
    random = initial_rows(source, "random", 3, 0)["text_encoder"]
    auto = initial_rows(source, "auto", 2, 0)["text_encoder"]

    torch.testing.assert_close(single, table[star].repeat(2, 1))
    torch.testing.assert_close(mean, (table[star] + table[ring]) / 2)
    torch.testing.assert_close(auto, table.mean(0).expand(2, -1))
    median = np.median(np.linalg.norm(table.numpy(), axis=1))
    np.testing.assert_allclose(np.linalg.norm(random.numpy(), axis=1), median, rtol=0.02)
