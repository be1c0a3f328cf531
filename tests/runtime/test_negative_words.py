"""Words that are made for the negative prompt, from files in the layout in which people share them."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

from oneword.runtime import cli


@pytest.fixture
def easynegative(tmp_path: Path) -> Path:
    """Eight vectors under `emb_params`, as in EasyNegative.safetensors: the file's name is the word."""
    rows = np.random.default_rng(2).normal(0, 0.5, (8, 32)).astype(np.float32)
    file = tmp_path / "easynegative.safetensors"
    safetensors.numpy.save_file({"emb_params": rows}, file)
    return file


@pytest.mark.parametrize("name", ["easynegative", "(easynegative:1.0)", "embedding:easynegative"])
def test_a_negative_word_draws_the_picture_of_diffusers(
    tiny_bundle: Path, tiny_model_dir: Path, easynegative: Path, tmp_path: Path, name: str
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    pipeline.load_textual_inversion(str(easynegative), token="easynegative")
    prompt, seed = "a photo of a red cat", 5
    expected, without = (
        pipeline(
            prompt,
            negative_prompt=negative,
            num_inference_steps=6,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for negative in ("easynegative, blue", "blue")
    )

    arguments = [str(tiny_bundle), prompt, "--concept", str(easynegative), "--negative-prompt", f"{name}, blue"]
    arguments += ["--steps", "6", "--guidance-scale", "6", "--seed", str(seed), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.command, [*arguments, "--engine", "onnxruntime"])

    assert result.exit_code == 0, result.output
    [file] = (tmp_path / "out").glob("*.png")
    picture = np.asarray(PIL.Image.open(file)) / 255
    assert np.abs(without - expected).max() > 0.02  # the word matters
    assert np.abs(picture - expected).max() <= 2.5 / 255
