"""SDXL: a word has vectors for both text encoders. Everything is real except the weights, which are random."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from oneword.export.source import load_source
from oneword.runtime.concept import load_concept
from oneword.train.cli import main
from oneword.train.learner import Learner
from oneword.train.pictures import Moments
from oneword.train.recipe import Compute, Recipe
from oneword.train.word import Word, draw

QUICK = Recipe(steps=4, batch_size=4, learning_rate=0.01, weight_decay=0.0, compute=Compute.FP32)
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}


@pytest.fixture(scope="module")
def tiny_sdxl_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model_dir / "tokenizer")
    torch.manual_seed(0)

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=20, projection_dim=24, hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sum(WIDTHS.values()), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 24,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.13025,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(48)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def a_word() -> Word:
    rng = torch.Generator().manual_seed(1)
    mean = list(torch.randn(3, 4, 8, 8, generator=rng))
    rows = {name: torch.randn(1, width, generator=rng) * 0.1 for name, width in WIDTHS.items()}
    return Word("<toy>", Moments(3, mean, [torch.zeros(4, 8, 8)] * 3, None), rows, ["a photo of a {}", "the {}"])


def test_the_gradient_in_both_encoders_is_that_of_the_original_models(tiny_sdxl_dir: Path) -> None:
    """Reference: diffusers' pipeline and UNet, with autograd through both embedding tables."""
    word = a_word()
    learner = Learner(load_source(tiny_sdxl_dir), [word], QUICK, seed=7)
    batch = draw(word, QUICK, 1000, torch.Generator().manual_seed(2))
    loss = learner._losses({0: batch})[0]
    loss.backward()

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir, add_watermarker=False)
    tables = {}
    for encoder, tokenizer, name in (
        (pipe.text_encoder, pipe.tokenizer, "text_encoder"),
        (pipe.text_encoder_2, pipe.tokenizer_2, "text_encoder_2"),
    ):
        tokenizer.add_tokens(["<toy>"])
        encoder.resize_token_embeddings(len(tokenizer))
        tables[name] = encoder.get_input_embeddings().weight
        with torch.no_grad():
            tables[name][-1] = word.initial[name][0]
    states, _, pooled, _ = pipe.encode_prompt(
        [prompt.format("<toy>") for prompt in batch.prompts], do_classifier_free_guidance=False
    )
    latents, eps = torch.stack(list(batch.latents)), torch.stack(list(batch.eps))
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, eps, batch.timesteps)
    sizes = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 24)
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(4, 1)}
    reference = (pipe.unet(noisy, batch.timesteps, states, added_cond_kwargs=added).sample - eps).square().mean()
    reference.backward()

    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for name, table in tables.items():
        grad, expected = word.rows[name].grad, table.grad[-1]
        assert grad is not None
        torch.testing.assert_close(grad[0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_command_writes_a_word_for_both_encoders(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    output = tmp_path / "toy.safetensors"
    options = [str(tmp_path / "pictures"), "--model", str(tiny_sdxl_dir), "--token", "<toy>", "--init", "star"]

    assert main([*options, "--output", str(output), "--steps", "2", "--batch-size", "2", "--vectors", "2"]) == 0

    with safe_open(output, "numpy") as file:
        assert sorted(file.keys()) == ["clip_g", "clip_l"]
    concept = load_concept(output)
    assert {name: rows.shape for name, rows in concept.vectors.items()} == {n: (2, w) for n, w in WIDTHS.items()}
    assert all(np.isfinite(rows).all() for rows in concept.vectors.values())


def test_parts_on_threads_add_up_to_the_gradients_of_the_whole_batch_in_both_encoders(tiny_sdxl_dir: Path) -> None:
    """The UNet is recorded with pooled vectors and time ids."""
    recipe = QUICK.with_changes(batch_size=16)
    word = a_word()
    learner = Learner(load_source(tiny_sdxl_dir), [word], recipe, seed=7)
    draws = {0: draw(word, recipe, 1000)}
    expected = torch.autograd.grad(learner._losses(draws)[0], list(word.rows.values()))
    before = torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        learner._accumulate(draws)
    finally:
        torch.set_num_threads(before)

    assert list(map(callable, learner.network._recordings.values())) == [True]
    for rows, gradient in zip(word.rows.values(), expected, strict=True):
        torch.testing.assert_close(rows.grad, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-9)
