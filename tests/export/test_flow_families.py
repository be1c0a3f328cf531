"""Families of transformers trained by flow matching, end to end, against diffusers' own pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneword.engines.open import Backend
from oneword.export.write import export_bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image


@pytest.fixture(scope="module")
def sd3_bundle(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = export_bundle(tiny_sd3_dir, tmp_path_factory.mktemp("sd3") / "bundle")
    assert exported.family == "stable-diffusion-3"
    assert max(difference.value for difference in exported.differences if difference.unit == "relative") <= 1e-4
    return exported.bundle.path


def test_sd3_text_to_image_matches_diffusers(tiny_sd3_dir: Path, sd3_bundle: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    model = Model.open(sd3_bundle, Backend.ONNXRUNTIME, threads=1)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir)
    for negative_prompt, guidance_scale in ((None, 1.0), (None, 7.0), ("blue dog", 4.0)):
        settings = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
        ours = picture(model, "a photo of the red painting, 7 cats", **settings)
        theirs = diffusers_picture(pipeline, "a photo of the red painting, 7 cats", max_sequence_length=24, **settings)
        assert psnr(ours, theirs) >= 50


def picture(model: Model, prompt: str, **settings: Any) -> Image:
    [result] = draw(model, prompt, seed=4, **{"steps": 6, "size": (80, 64), **settings})
    assert result.image.std() > 1  # not a blank picture
    return result.image


def diffusers_picture(pipeline: Any, prompt: str, **settings: Any) -> Image:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    defaults = {"num_inference_steps": 6, "width": 80, "height": 64}
    output = pipeline(prompt, generator=generator, output_type="np", **{**defaults, **settings})
    return np.asarray((output.images[0] * 255).round(), np.uint8)


def psnr(a: Image, b: Image) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
