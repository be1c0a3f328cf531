"""Every family end to end: exported, run without torch, and compared with the picture of diffusers' own pipeline."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.psnr import psnr
from oneword.engines.errors import UsageError
from oneword.engines.graph import Precision, Provider
from oneword.engines.open import Backend
from oneword.export.cli import plan_warnings
from oneword.export.eager import eager_model
from oneword.export.families import family_of
from oneword.export.modules import VaeEncoder
from oneword.export.source import load_source
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.scheduler import Scheduler
from tests.bundles import export_once
from tests.export.conftest import changed_copy, openvino_decibels
from tests.export.operators import attentions_and_norms
from tests.export.pictures import assert_planned, diffusers_picture, picture


@pytest.fixture(scope="module")
def ldm_bundle(tiny_ldm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_ldm_dir, "latent-diffusion", tmp_path_factory)


@pytest.fixture(scope="module")
def sd2_bundle(tiny_sd2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_sd2_dir, "stable-diffusion", tmp_path_factory)


@pytest.fixture(scope="module")
def sdxl_bundle(tiny_sdxl_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_sdxl_dir, "stable-diffusion-xl", tmp_path_factory)


def exported(model: Path, family: str, folders: pytest.TempPathFactory) -> Path:
    bundle = folders.mktemp(family) / "bundle"
    result = export_once(model, bundle)
    assert result.family == family
    assert plan_warnings(result) == []
    return bundle


def test_latent_diffusion_text_to_image_matches_diffusers(tiny_ldm_dir: Path, ldm_bundle: Path) -> None:
    from diffusers import LDMTextToImagePipeline

    model = Model.open(ldm_bundle, Backend.ONNXRUNTIME, threads=1)
    pipeline = LDMTextToImagePipeline.from_pretrained(tiny_ldm_dir)
    for prompt in ("A photo of the red painting, 7 cats", "dog"):
        ours = picture(model, prompt, guidance_scale=6)
        assert psnr(ours, diffusers_picture(pipeline, prompt, guidance_scale=6.0)) >= 50


def test_stable_diffusion_2_matches_diffusers(tiny_sd2_dir: Path, sd2_bundle: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = Model.open(sd2_bundle, Backend.ONNXRUNTIME, threads=1)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2_dir, safety_checker=None)
    for negative_prompt in (None, "blue dog"):
        settings = {"negative_prompt": negative_prompt, "guidance_scale": 4.0}
        ours = picture(model, "a red star", **settings)
        assert psnr(ours, diffusers_picture(pipeline, "a red star", **settings)) >= 50


def test_sdxl_with_a_word_of_two_encoders_matches_diffusers(
    tiny_sdxl_dir: Path, sdxl_bundle: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    model = Model.open(sdxl_bundle, Backend.ONNXRUNTIME, threads=1)
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
        assert psnr(ours, diffusers_picture(pipeline, prompt, **settings)) >= 50, prompt


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_of_latent_diffusion_are_fused(ldm_bundle: Path, provider: Provider) -> None:
    # Four transformers of one block: two norms of each follow a sum. LDMBert: two layers.
    assert attentions_and_norms(ldm_bundle, provider) == {
        "text_encoder": (2, 3),
        "denoise_step": (8, 8),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_of_stable_diffusion_2_are_fused(sd2_bundle: Path, provider: Provider) -> None:
    assert attentions_and_norms(sd2_bundle, provider) == {
        "text_encoder": (2, 3),
        "denoise_step": (8, 8),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_of_sdxl_are_fused(sdxl_bundle: Path, provider: Provider) -> None:
    # Four transformers of two blocks, of whose six norms all but the first follow a sum. Encoders of three layers; the
    # pooled state of the second is the norm of the last sum.
    assert attentions_and_norms(sdxl_bundle, provider) == {
        "text_encoder": (3, 5),
        "text_encoder_2": (3, 6),
        "denoise_step": (16, 20),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


def test_the_zeros_of_sdxl_for_a_missing_negative_prompt_are_one_shared_context(sdxl_bundle: Path) -> None:
    model = Model.open(sdxl_bundle, Backend.ONNXRUNTIME, threads=1)
    scheduler = Scheduler(model)
    for seed in range(5):
        scheduler.add(Request(f"a red {'star ' * seed}", seed=seed, steps=2, guidance_scale=4.0))
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()

    assert len(arena.rows) == 5
    assert len(arena._pool.slots) == 6


def test_latent_diffusion_in_openvino_is_near_onnxruntime(ldm_bundle: Path) -> None:
    assert_openvino_is_near_onnxruntime(ldm_bundle)


def test_stable_diffusion_2_in_openvino_is_near_onnxruntime(sd2_bundle: Path) -> None:
    assert_openvino_is_near_onnxruntime(sd2_bundle)


def test_sdxl_in_openvino_is_near_onnxruntime(sdxl_bundle: Path) -> None:
    assert_openvino_is_near_onnxruntime(sdxl_bundle)


@pytest.mark.plans
def test_every_graph_of_latent_diffusion_becomes_a_plan(ldm_bundle: Path) -> None:
    assert_planned(ldm_bundle)


@pytest.mark.plans
def test_every_graph_of_stable_diffusion_2_becomes_a_plan(sd2_bundle: Path) -> None:
    assert_planned(sd2_bundle)


@pytest.mark.plans
def test_every_graph_of_sdxl_becomes_a_plan(sdxl_bundle: Path) -> None:
    assert_planned(sdxl_bundle)


@pytest.mark.plans
def test_sdxl_in_fp16_is_opened_and_stays_near_fp32(tiny_sdxl_dir: Path, sdxl_bundle: Path, tmp_path: Path) -> None:
    assert plan_warnings(export_once(tiny_sdxl_dir, tmp_path / "bundle", precision=Precision.FP16)) == []
    models = (Model.open(path, Backend.ONNXRUNTIME, threads=1) for path in (sdxl_bundle, tmp_path / "bundle"))
    assert psnr(*(picture(model, "a red star", guidance_scale=4.0) for model in models)) >= 40


def assert_openvino_is_near_onnxruntime(bundle: Path) -> None:
    decibels = openvino_decibels()
    models = (Model.open(bundle, backend, threads=1) for backend in (Backend.ONNXRUNTIME, Backend.OPENVINO))
    assert psnr(*(picture(model, "a red star", guidance_scale=4.0) for model in models)) >= decibels


def test_the_statistics_of_an_sdxl_vaes_channels_are_used_as_in_diffusers(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    statistics = {"latents_mean": [-1.6, 1.1, 3.1, 0.5], "latents_std": [4.0, 2.5, 0.5, 1.5], "scaling_factor": 0.5}
    model = changed_copy(tiny_sdxl_dir, tmp_path, "vae/config.json", statistics)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    ours = eager_model(load_source(model))
    assert (
        psnr(
            picture(ours, "a red star", guidance_scale=5.0),
            diffusers_picture(pipeline, "a red star", guidance_scale=5.0),
        )
        >= 50
    )

    image = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    moments = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    latents = moments.prepare_latents(
        moments.image_processor.preprocess(PIL.Image.fromarray(image)), None, 1, 1, torch.float32, "cpu",
        generator=(generator := torch.Generator().manual_seed(0)), add_noise=False,
    )  # fmt: skip
    mean, std, _ = VaeEncoder(pipeline.vae)(torch.from_numpy(image)[None])
    noise = torch.randn(mean.shape, generator=generator.manual_seed(0))
    torch.testing.assert_close(mean + std * noise, latents, rtol=1e-4, atol=1e-4)


def test_a_pooled_state_of_another_width_than_the_network_takes_is_refused(tiny_sdxl_dir: Path) -> None:
    source = load_source(tiny_sdxl_dir)
    source.text_encoders["text_encoder_2"].text_projection = torch.nn.Linear(24, 21)
    with pytest.raises(UsageError, match="its text encoders' pooled states have width 21, its network takes 20"):
        family_of(source)


def test_the_refiner_of_sdxl_is_refused_by_name(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    no_first_encoder = {"text_encoder": [None, None], "tokenizer": [None, None]}
    refiner = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    for folder, change, message in (
        ("refiner", refiner, "this is SDXL's refiner"),
        ("incomplete", {}, "its text encoders are text_encoder_2, without text_encoder; give a plain"),
    ):
        model = changed_copy(tiny_sdxl_dir, tmp_path / folder, "model_index.json", {**no_first_encoder, **change})
        with pytest.raises(UsageError, match=message):
            family_of(load_source(model))
