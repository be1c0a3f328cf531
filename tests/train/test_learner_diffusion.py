"""SDXL, whose words have vectors for both text encoders, and LDM text-to-image, with LDMBert and an AutoencoderKL or a
VQModel. Everything is real except the weights, which are random."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    LDMTextToImagePipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from PIL import Image
from safetensors import safe_open

from oneword.export.source import load_source
from oneword.runtime.concept import load_concept
from oneword.train.cli import main
from oneword.train.learner import Learner
from oneword.train.pictures import Moments, encode_moments, read_pictures
from oneword.train.recipe import RECIPES, Compute, Recipe
from oneword.train.word import Word, draw
from tests.train.test_learner_flow import (
    add_word,
    assert_loss_falls_to_a_fifth,
    assert_same_bits_resumed,
    assert_same_gradients,
)

QUICK = Recipe(steps=4, batch_size=4, learning_rate=0.01, weight_decay=0.0, compute=Compute.FP32)
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}
LDM = {"text_encoder": 24}
PROMPTS = ["a photo of a {}", "the {}"]
LDM_CASES = pytest.mark.parametrize(
    ("tiny_ldm_dir", "recipe"),
    [("AutoencoderKL", "directional"), ("AutoencoderKL", "precise"), ("VQModel", "directional")],
    indirect=["tiny_ldm_dir"],
    scope="session",
)
"""Pictures are encoded before a word is learned, so the recipes need not be tried with both autoencoders."""


def a_word(widths: dict[str, int], prompts: list[str] = PROMPTS) -> Word:
    rng = torch.Generator().manual_seed(1)
    mean = list(torch.randn(3, 4, 8, 8, generator=rng))
    rows = {name: torch.randn(1, width, generator=rng) * 0.1 for name, width in widths.items()}
    return Word("<toy>", Moments(3, mean, [torch.zeros(4, 8, 8)] * 3, None), rows, prompts)


def test_the_gradient_in_both_encoders_is_that_of_the_original_models(tiny_sdxl_dir: Path) -> None:
    """Reference: diffusers' pipeline and UNet, with autograd through both embedding tables."""
    word = a_word(WIDTHS)
    learner = Learner(load_source(tiny_sdxl_dir), [word], QUICK, seed=7)
    batch = draw(word, QUICK, 1000, torch.Generator().manual_seed(2))
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir, add_watermarker=False)
    tables = {name: add_word(pipe, word, name, name.removeprefix("text_encoder")) for name in WIDTHS}
    states, _, pooled, _ = pipe.encode_prompt(
        [prompt.format("<toy>") for prompt in batch.prompts], do_classifier_free_guidance=False
    )
    latents, eps = torch.stack(list(batch.latents)), torch.stack(list(batch.eps))
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, eps, batch.timesteps)
    sizes = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 20)
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(4, 1)}
    reference = (pipe.unet(noisy, batch.timesteps, states, added_cond_kwargs=added).sample - eps).square().mean()

    assert_same_gradients(learner, batch, reference, tables)


def test_the_gradient_in_ldm_is_that_of_the_original_models(tiny_ldm_dir: Path) -> None:
    """Reference: diffusers' LDMBert and UNet, as its pipeline calls them."""
    word = a_word(LDM)
    learner = Learner(load_source(tiny_ldm_dir), [word], QUICK, seed=7)
    batch = draw(word, QUICK, 1000, torch.Generator().manual_seed(2))

    pipe = LDMTextToImagePipeline.from_pretrained(tiny_ldm_dir)
    pipe.text_encoder = pipe.bert
    tables = {"text_encoder": add_word(pipe, word, "text_encoder", "")}
    texts = [prompt.format("<toy>") for prompt in batch.prompts]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    latents, eps = torch.stack(list(batch.latents)), torch.stack(list(batch.eps))
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, eps, batch.timesteps)
    predicted = pipe.unet(noisy, batch.timesteps, encoder_hidden_states=pipe.bert(ids)[0]).sample

    assert_same_gradients(learner, batch, (predicted - eps).square().mean(), tables)


@pytest.mark.parametrize("recipe", ["directional", "precise"])
def test_the_loss_of_sdxl_falls_to_a_fifth_if_a_word_can_explain_the_targets(
    tiny_sdxl_dir: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(tiny_sdxl_dir)
    assert_loss_falls_to_a_fifth(source, a_word(WIDTHS, PROMPTS[:1]), of_type(recipe), "conv_out", monkeypatch)


@LDM_CASES
def test_the_loss_of_ldm_falls_to_a_fifth_if_a_word_can_explain_the_targets(
    tiny_ldm_dir: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(tiny_ldm_dir)
    assert_loss_falls_to_a_fifth(source, a_word(LDM, PROMPTS[:1]), of_type(recipe), "conv_out", monkeypatch)


@pytest.mark.parametrize("recipe", ["directional", "precise"])
def test_a_resumed_run_of_sdxl_has_the_same_bits(tiny_sdxl_dir: Path, recipe: str) -> None:
    settings = of_type(recipe).with_changes(steps=4, batch_size=2)
    out = set(WIDTHS) if recipe == "precise" else set()
    assert_same_bits_resumed(tiny_sdxl_dir, lambda: a_word(WIDTHS), settings, out)


@LDM_CASES
def test_a_resumed_run_of_ldm_has_the_same_bits(tiny_ldm_dir: Path, recipe: str) -> None:
    settings = of_type(recipe).with_changes(steps=4, batch_size=2)
    out = set(LDM) if recipe == "precise" else set()
    assert_same_bits_resumed(tiny_ldm_dir, lambda: a_word(LDM), settings, out)


def of_type(recipe: str) -> Recipe:
    return RECIPES[recipe].with_changes(compute=Compute.FP32)


def test_pictures_for_ldm_are_encoded_as_diffusers_encodes_them(tiny_ldm_dir: Path, folder: Path) -> None:
    """A VQModel's latents are those before quantisation, and have no spread."""
    source, pictures = load_source(tiny_ldm_dir), read_pictures(folder, 64)

    moments = encode_moments(source.vae, pictures)

    vae = LDMTextToImagePipeline.from_pretrained(tiny_ldm_dir).vqvae
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).movedim(-1, 1) / 127.5 - 1
    encoded = vae.encode(pixels)
    quantised = isinstance(vae, VQModel)
    mean = encoded.latents if quantised else encoded.latent_dist.mean
    std = torch.zeros_like(mean) if quantised else encoded.latent_dist.std
    scale = vae.config.scaling_factor
    torch.testing.assert_close(torch.stack(list(moments.mean)), scale * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(list(moments.std)), scale * std, rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_word_of_ldm_and_pictures_of_it(tiny_ldm_dir: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy.safetensors"
    line = [folder, "--model", tiny_ldm_dir, "--token", "<toy>", "--init", "cat", "--output", output, "--steps", 2]

    assert main([*map(str, line), "--batch-size", "2", "--preview-every", "2"]) == 0

    [(name, rows)] = load_concept(output).vectors.items()
    assert (name, rows.shape) == ("text_encoder", (1, 24))
    table = load_source(tiny_ldm_dir).text_encoders["text_encoder"].get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(np.linalg.norm(rows), np.linalg.norm(table, axis=1).mean(), rtol=0.05)
    assert len(list(tmp_path.glob("toy.previews/*.png"))) == 1


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
    word = a_word(WIDTHS)
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
