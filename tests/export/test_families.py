"""Every family end to end: exported, run without torch, and the picture compared with diffusers' own pipeline's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from oneword.engines.errors import UsageError
from oneword.export.families import family_of
from oneword.export.source import load_source
from oneword.export.write import export_bundle
from oneword.runtime.batch import PictureDone
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request


def test_latent_diffusion_text_to_image_is_that_of_diffusers(tiny_ldm_dir: Path, tmp_path: Path) -> None:
    from diffusers import LDMTextToImagePipeline

    exported = export_bundle(tiny_ldm_dir, tmp_path / "bundle")
    assert exported.family == "latent-diffusion"
    model = Model.open(tmp_path / "bundle", threads=1)
    pipeline = LDMTextToImagePipeline.from_pretrained(tiny_ldm_dir)
    for prompt in ("A photo of the red painting, 7 cats", "dog"):
        ours = picture(model, prompt, guidance_scale=6)
        assert psnr(ours, of_diffusers(pipeline, prompt, guidance_scale=6.0)) >= 50


def test_stable_diffusion_2_is_that_of_diffusers(tiny_sd2_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    export_bundle(tiny_sd2_dir, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle", threads=1)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2_dir, safety_checker=None)
    for negative_prompt in (None, "blue dog"):
        settings = {"negative_prompt": negative_prompt, "guidance_scale": 4.0}
        ours = picture(model, "a red star", **settings)
        assert psnr(ours, of_diffusers(pipeline, "a red star", **settings)) >= 50


def test_sdxl_with_a_word_of_two_encoders_is_that_of_diffusers(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    export_bundle(tiny_sdxl_dir, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle", threads=1)
    random = np.random.default_rng(0)
    widths = {"text_encoder": 16, "text_encoder_2": 24}
    vectors = {name: random.normal(0, 0.5, (2, width)).astype(np.float32) for name, width in widths.items()}
    save_concept(Concept("<toy>", vectors), tmp_path / "toy.safetensors")
    model.load(load_concept(tmp_path / "toy.safetensors"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir)
    for name, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        pipeline.load_textual_inversion(
            torch.from_numpy(load_file(tmp_path / "toy.safetensors")[key]),
            token="<toy>",
            text_encoder=getattr(pipeline, name),
            tokenizer=getattr(pipeline, name.replace("text_encoder", "tokenizer")),
        )
    prompts = {"a photo of <toy> on the ring": None, "a <toy>": "", "a dog": "red <toy>"}
    for prompt, negative_prompt in prompts.items():
        settings = {"negative_prompt": negative_prompt, "guidance_scale": 5.0}
        ours = picture(model, prompt, **settings)
        assert psnr(ours, of_diffusers(pipeline, prompt, **settings)) >= 50, prompt


def test_the_refiner_of_sdxl_is_refused_by_name(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "refiner"
    shutil.copytree(tiny_sdxl_dir, model)
    index = json.loads((model / "model_index.json").read_text())
    nothing = {"text_encoder": [None, None], "tokenizer": [None, None]}
    refiner = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (model / "model_index.json").write_text(json.dumps({**index, **nothing, **refiner}))
    with pytest.raises(UsageError, match="this is SDXL's refiner"):
        family_of(load_source(model))
    (model / "model_index.json").write_text(json.dumps({**index, **nothing}))
    with pytest.raises(UsageError, match="it has the encoder text_encoder_2 alone, and SDXL has two"):
        family_of(load_source(model))


def picture(model: Model, prompt: str, **settings: Any) -> Image:
    request = Request(prompt, seed=4, steps=6, size=(72, 64), **settings)
    (done,) = [event for event in generate(model, [request]) if isinstance(event, PictureDone)]
    assert done.image.std() > 1  # there is something to compare
    return done.image


def of_diffusers(pipeline: Any, prompt: str, **settings: Any) -> Image:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    size = {"num_inference_steps": 6, "width": 72, "height": 64, "output_type": "np"}
    output = pipeline(prompt, generator=generator, **size, **settings)
    return np.asarray((output.images[0] * 255).round(), np.uint8)


def psnr(a: Image, b: Image) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
