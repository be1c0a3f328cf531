import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from oneword.engines.errors import FileError
from oneword.train.evaluation.judge import Judge

PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2] * 3
)


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A CLIP model with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model_dir / "tokenizer")
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    text = {**common, **ids, "max_position_embeddings": 20, "pad_token_id": tokenizer.eos_token_id}
    vision = {**common, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def test_the_judge_embeds_as_transformers_clip_does(judge_dir: Path) -> None:
    """Reference: CLIPModel's forward on the image processor's pixels."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (49, 49), (48, 80))]
    model, tokenizer = CLIPModel.from_pretrained(judge_dir), CLIPTokenizer.from_pretrained(judge_dir)
    pixels = PROCESSOR([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    texts = ["a photo of the red star", "cat"]
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)

    judge = Judge(judge_dir)

    np.testing.assert_allclose(judge.pictures(pictures), expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(judge.texts(texts), expected.text_embeds.numpy(), atol=1e-5)


def test_the_judges_normalisation_is_read_from_either_file_and_never_guessed(judge_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(judge_dir, tmp_path / "clip")
    facts = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    (tmp_path / "clip" / "preprocessor_config.json").unlink()

    with pytest.raises(FileError, match=r"has no preprocessor_config\.json"):
        Judge(tmp_path / "clip")
    (tmp_path / "clip" / "processor_config.json").write_text(json.dumps({"image_processor": facts}))
    np.testing.assert_allclose(Judge(tmp_path / "clip").mean.flatten(), [0.4, 0.5, 0.6])


def test_a_folder_without_a_clip_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has no CLIP model"):
        Judge(tmp_path)
