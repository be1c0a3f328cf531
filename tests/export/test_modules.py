"""The graphs in torch, against transformers' and diffusers' own forwards."""

from pathlib import Path

import pytest
import torch

from oneword.export.modules import (
    DenoiseStep,
    TextEncoder,
    UNet,
    VaeDecoder,
    VaeEncoder,
    nearest,
    rescale_guidance,
    weigh_tokens,
)
from oneword.export.source import Source, load_source


@pytest.fixture(scope="module")
def source(tiny_model_dir: Path) -> Source:
    return load_source(tiny_model_dir)


def row(**columns: float) -> torch.Tensor:
    from oneword.export.modules import SCHEDULE_COLUMNS

    return torch.tensor([[columns.get(name, 0.0) for name in SCHEDULE_COLUMNS]])


def test_hidden_states_are_those_of_transformers_at_every_layer(source: Source) -> None:
    model = source.text_encoders["text_encoder"]
    encoder = TextEncoder(model)
    ids = torch.randint(0, encoder.table.shape[0], (2, 11))
    expected = model(ids, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        states, finite = encoder(ids, encoder.table, torch.ones(2, 11), torch.tensor([layer, 3]))
        torch.testing.assert_close(states[0], model.final_layer_norm(expected[layer])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[1], model(ids).last_hidden_state[1], rtol=1e-5, atol=1e-5)
        assert finite.tolist() == [True, True]


def test_a_learned_row_gets_the_gradient_and_no_other_row_that_is_not_used(source: Source) -> None:
    encoder = TextEncoder(source.text_encoders["text_encoder"])
    v = encoder.table.shape[0]
    learned = torch.randn(1, encoder.table.shape[1], requires_grad=True)
    states, _ = encoder(
        torch.tensor([[0, v, 1]]), torch.cat([encoder.table, learned]), torch.ones(1, 3), torch.tensor([3])
    )
    states.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().max() > 0


def test_token_weights_of_one_change_nothing_at_all() -> None:
    states = torch.randn(2, 5, 8)
    assert torch.equal(weigh_tokens(states, torch.ones(2, 5)), states)


def test_token_weights_restore_the_mean_of_each_row() -> None:
    states = torch.randn(3, 5, 8) + 0.5
    weights = torch.tensor([[1, 1, 1.3, 1, 1], [1, 0.7, 0.7, 1, 1], [1.0] * 5])
    weighted = weigh_tokens(states, weights)
    torch.testing.assert_close(weighted.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    a1111 = states * weights[:, :, None]
    a1111 = a1111 * (states.mean(dim=(1, 2)) / a1111.mean(dim=(1, 2)))[:, None, None]
    torch.testing.assert_close(weighted, a1111)


def test_a_row_without_a_mean_is_weighed_and_not_blown_up() -> None:
    states = torch.randn(1, 4, 8)
    states -= states.mean()
    weighted = weigh_tokens(states, torch.tensor([[1, 1.4, 1, 0.6]]))
    assert weighted.abs().max() <= states.abs().max() * 1.4 / 0.6


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (17, 16)])
def test_the_unet_is_that_of_diffusers_at_even_and_odd_sizes(source: Source, size: tuple[int, int]) -> None:
    sample, context, t = torch.randn(2, 4, *size), torch.randn(2, 7, 32), torch.tensor([3.0, 501.5])
    expected = source.unet(sample, t, context).sample
    torch.testing.assert_close(UNet(source.unet)(sample, t, context), expected, rtol=1e-5, atol=1e-5)


def test_a_ddim_row_is_the_step_of_diffusers_with_guidance(source: Source) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(source.scheduler_config))
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[3])
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(2, 7, 32)
    eps = source.unet(sample.repeat(2, 1, 1, 1), t, context).sample
    guided = eps[:1] + 7.5 * (eps[1:] - eps[:1])
    expected = scheduler.step(guided, t, sample)
    alpha, alpha_next = (scheduler.alphas_cumprod[i] for i in (t, int(scheduler.timesteps[4])))
    s, s_next = (1 - alpha).sqrt(), (1 - alpha_next).sqrt()
    schedule = row(
        t=t, a=alpha**-0.5, b=-s / alpha.sqrt(), c=s_next / s, d=alpha_next.sqrt() - s_next * alpha.sqrt() / s,
        guidance=7.5,
    )  # fmt: skip
    zeros = torch.zeros_like(sample)
    next_sample, denoised, finite = DenoiseStep(source.unet)(
        sample, zeros, zeros, zeros, zeros, torch.ones(1, 1, 8, 8), schedule,
        torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]), context,
    )  # fmt: skip
    torch.testing.assert_close(next_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoised, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
    assert finite.tolist() == [True]


def test_what_the_mask_keeps_is_the_known_picture_at_its_noise_level(source: Source) -> None:
    sample, known, known_noise = torch.randn(3, 1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    zero = torch.zeros_like(sample)
    one = torch.tensor([0])
    args = (one, one, one, one, torch.randn(1, 7, 32))
    schedule = row(t=9, c=1, known_scale=0.8, known_sigma=0.6)
    next_sample, _, _ = DenoiseStep(source.unet)(sample, zero, zero, known, known_noise, mask, schedule, *args)
    torch.testing.assert_close(next_sample[..., :4], (0.8 * known + 0.6 * known_noise)[..., :4])
    torch.testing.assert_close(next_sample[..., 4:], sample[..., 4:])


def test_a_nan_in_one_row_is_reported_for_that_row_alone(source: Source) -> None:
    sample = torch.randn(2, 4, 8, 8)
    sample[1, 0, 0, 0] = torch.nan
    zero, rows = torch.zeros_like(sample), torch.tensor([0, 1])
    schedule = row(t=9, a=1, b=1, d=1).repeat(2, 1)
    *_, finite = DenoiseStep(source.unet)(
        sample, zero, zero, zero, zero, torch.ones(2, 1, 8, 8), schedule, rows, rows, rows, rows, torch.randn(2, 7, 32)
    )
    assert finite.tolist() == [True, False]


def test_guidance_rescale_is_that_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    m, m_cond = torch.randn(2, 2, 4, 8, 8)
    ours = rescale_guidance(m, m_cond, torch.full((2, 1, 1, 1), 0.7))
    torch.testing.assert_close(ours, rescale_noise_cfg(m, m_cond, 0.7))


def test_the_vae_graphs_are_those_of_diffusers(source: Source) -> None:
    vae = source.vae
    latents = torch.randn(2, 4, 8, 9)
    images, _ = VaeDecoder(vae)(latents)
    expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) * 255
    assert images.shape == (2, 64, 72, 3)
    assert (images.permute(0, 3, 1, 2).float() - expected).abs().max() <= 0.501
    mean, std, _ = VaeEncoder(vae)(images)
    posterior = vae.encode(images.permute(0, 3, 1, 2).float() / 255 * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_the_second_encoder_of_sdxl_gives_its_last_state_but_one_and_its_projected_pool() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, projection_dim=24, hidden_act="gelu", bos_token_id=48, eos_token_id=49,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    encoder = TextEncoder(model, final_norm=False, pools=True)
    ids = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 49, 0, 0, 0]])
    expected = model(ids, output_hidden_states=True)
    states, pooled, finite = encoder(ids, encoder.table, torch.ones(2, 6), torch.tensor([2, 2]), torch.tensor([3, 2]))
    torch.testing.assert_close(states, expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=1e-5, atol=1e-5)
    assert finite.tolist() == [True, True]


def test_the_unet_of_sdxl_takes_pooled_vectors_and_time_ids() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 24,
    ).eval()  # fmt: skip
    sample, context, pooled = torch.randn(2, 4, 9, 8), torch.randn(2, 6, 40), torch.randn(2, 24)
    time_ids = torch.tensor([[512.0, 512, 0, 0, 512, 512], [1024.0, 768, 0, 64, 1024, 768]])
    t = torch.tensor([5.0, 700.0])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    expected = unet(sample, t, context, added_cond_kwargs=added).sample
    torch.testing.assert_close(UNet(unet)(sample, t, context, pooled, time_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_bert_of_latent_diffusion_is_that_of_diffusers(tiny_ldm_dir: Path, layers: int) -> None:
    source = load_source(tiny_ldm_dir)
    bert = source.text_encoders["text_encoder"]
    encoder = TextEncoder(bert)
    ids = torch.randint(0, encoder.table.shape[0], (2, 9))
    states, finite = encoder(ids, encoder.table, torch.ones(2, 9), torch.tensor([2, layers]))
    torch.testing.assert_close(states[0], bert(ids).last_hidden_state[0], rtol=1e-5, atol=1e-5)
    between = bert(ids, output_hidden_states=True).hidden_states[layers]  # the last of them is normed already
    expected = between if layers == 2 else bert.model.layer_norm(between)
    torch.testing.assert_close(states[1], expected[1], rtol=1e-5, atol=1e-5)
    assert finite.tolist() == [True, True]


def test_the_autoencoder_of_latent_diffusion_is_that_of_diffusers(tiny_ldm_dir: Path) -> None:
    vae = load_source(tiny_ldm_dir).vae
    latents = torch.randn(2, 4, 8, 9)
    images, _ = VaeDecoder(vae)(latents)
    expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) * 255
    assert (images.permute(0, 3, 1, 2).float() - expected).abs().max() <= 0.501
    mean, std, _ = VaeEncoder(vae)(images)
    pixels = images.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latents"):  # a VQModel: no posterior
        torch.testing.assert_close(mean, encoded.latents * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
        assert std.abs().max() == 0
    else:
        torch.testing.assert_close(mean, encoded.latent_dist.mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_a_latent_becomes_the_nearest_code() -> None:
    codebook = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-1.0, 2.0]])
    z = torch.tensor([[0.4, -0.6], [2.0, 2.5], [-1.1, 1.2]]).T.reshape(1, 2, 1, 3)
    torch.testing.assert_close(nearest(z, codebook), codebook.T.reshape(1, 2, 1, 3))
