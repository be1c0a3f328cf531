"""The graphs' torch modules against the forward passes of transformers and diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from oneword.export.modules import (
    DenoiseStep,
    TextEncoder,
    UNet,
    VaeDecoder,
    VaeEncoder,
    attention_of,
    nearest,
    rescale_guidance,
    weigh_tokens,
    zero_star_scale,
)
from oneword.export.source import Source, load_source


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random inputs in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def source(tiny_model_dir: Path) -> Source:
    return load_source(tiny_model_dir)


def schedule_line(**columns: float) -> torch.Tensor:
    """One line of the schedule; unnamed columns are 0."""
    assert columns.keys() <= set(DenoiseStep.COLUMNS)
    return torch.tensor([[columns.get(name, 0.0) for name in DenoiseStep.COLUMNS]])


def step(unet: Any, schedule: torch.Tensor, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Runs DenoiseStep. Latents default to zeros, the mask to ones, and each row to one branch with its own context."""
    module = DenoiseStep(UNet(unet))
    sample = tensors["sample"]
    rows = torch.arange(len(sample))
    inputs = dict.fromkeys(("previous", "previous2", "noise", "known", "known_noise"), torch.zeros_like(sample))
    inputs |= {"mask": torch.ones(len(sample), 1, *sample.shape[2:]), "schedule": schedule}
    inputs |= {"branch_row": rows, "uncond_branch": rows, "cond_branch": rows, **tensors}
    if inputs.setdefault("branch_context", rows).ndim == 1:
        inputs["branch_context"] = inputs["branch_context"][:, None, None].expand(-1, 2, module.network.num_layers)
    with torch.no_grad():
        return module(**inputs)


@pytest.fixture
def diffusers_unet(tiny_model_dir: Path) -> Any:
    """A separate UNet, with diffusers' attention processors."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_model_dir, subfolder="unet").eval()


def test_hidden_states_match_transformers_at_every_layer(source: Source) -> None:
    model = source.text_encoders["text_encoder"]
    encoder = TextEncoder(model)
    ids = torch.randint(0, encoder.table.shape[0], (2, 11))
    expected = model(ids, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        states, weight_scale, finite = encoder(ids, encoder.table, torch.ones(2, 11), torch.tensor([layer, 3]))
        torch.testing.assert_close(states[0], model.final_layer_norm(expected[layer])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[1], model(ids).last_hidden_state[1], rtol=1e-5, atol=1e-5)
        assert finite.tolist() == [True, True]
        assert weight_scale.tolist() == [1, 1]


def test_a_learned_row_gets_the_gradient(source: Source) -> None:
    encoder = TextEncoder(source.text_encoders["text_encoder"])
    v = encoder.table.shape[0]
    learned = torch.randn(1, encoder.table.shape[1], requires_grad=True)
    states, _, _ = encoder(
        torch.tensor([[0, v, 1]]), torch.cat([encoder.table, learned]), torch.ones(1, 3), torch.tensor([3])
    )
    states.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().max() > 0


def test_token_weights_of_one_change_nothing() -> None:
    states = torch.randn(2, 5, 8)
    weighted, factor = weigh_tokens(states, torch.ones(2, 5))
    assert torch.equal(weighted, states)
    assert factor.tolist() == [1, 1]


def test_token_weights_restore_the_mean_of_each_row() -> None:
    states = torch.randn(3, 5, 8) + 0.5
    weights = torch.tensor([[1, 1, 1.3, 1, 1], [1, 0.7, 0.7, 1, 1], [1.0] * 5])
    weighted, factor = weigh_tokens(states, weights)
    torch.testing.assert_close(weighted.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    a1111 = states * weights[:, :, None]
    a1111 = a1111 * (states.mean(dim=(1, 2)) / a1111.mean(dim=(1, 2)))[:, None, None]
    torch.testing.assert_close(weighted, a1111)
    before, after = (x.mean(dim=(1, 2)) for x in (states, states * weights[:, :, None]))
    torch.testing.assert_close(factor, before / after)


@pytest.mark.parametrize(
    ("weights", "smallest", "largest"),
    [((1, 1.5, 1, 1), 1 / 1.5, 1), ((1, 0.5, 1, 1), 1, 2), ((2, 0.01, 1, 1), 0.5, 10)],
)
def test_the_factor_that_restores_the_mean_stays_within_the_range_of_the_weights(
    weights: tuple[float, ...], smallest: float, largest: float
) -> None:
    states = torch.randn(200, 4, 8, generator=torch.Generator().manual_seed(0)) + 0.05
    _, factor = weigh_tokens(states, torch.tensor([weights]).expand(200, 4))
    assert factor.min() >= smallest - 1e-6
    assert factor.max() <= largest + 1e-6
    assert len(factor.unique()) > 10  # not only the bounds


def test_the_graph_returns_the_factor_that_scales_each_weighted_state(source: Source) -> None:
    """states(weights) = states(ones) * weight * weight_scale, token by token."""
    encoder = TextEncoder(source.text_encoders["text_encoder"])
    ids, layer = torch.randint(0, encoder.table.shape[0], (3, 9)), torch.tensor([3, 2, 1])
    weights = torch.ones(3, 9)
    weights[0, 2:4], weights[1, 5] = 1.3, 0.4
    plain, plain_scale, _ = encoder(ids, encoder.table, torch.ones(3, 9), layer)
    states, scale, _ = encoder(ids, encoder.table, weights, layer)
    assert plain_scale.tolist() == [1, 1, 1]
    assert scale[2] == 1
    assert (scale[:2] != 1).all()
    torch.testing.assert_close(states, plain * weights[:, :, None] * scale[:, None, None], rtol=1e-6, atol=1e-6)


def test_a_row_without_a_mean_is_weighted_and_not_amplified() -> None:
    states = torch.randn(1, 4, 8)
    states -= states.mean()
    weighted, factor = weigh_tokens(states, torch.tensor([[1, 1.4, 1, 0.6]]))
    assert factor.tolist() == [1]
    assert weighted.abs().max() <= states.abs().max() * 1.4 / 0.6


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (17, 16)])
def test_the_unet_matches_diffusers_at_even_and_odd_sizes(
    source: Source, diffusers_unet: Any, size: tuple[int, int]
) -> None:
    sample, context, t = torch.randn(2, 4, *size), torch.randn(2, 7, 32), torch.tensor([3.0, 501.5])
    expected = diffusers_unet(sample, t, context).sample
    attention = diffusers_unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert type(attention.processor).__name__ == "AttnProcessor2_0"
    unet = UNet(source.unet)
    for plain in (True, False):  # separate products, or the fused kernel
        unet.attend_plainly(plain)
        torch.testing.assert_close(unet(sample, t, context), expected, rtol=1e-5, atol=1e-5)


def test_the_activation_of_the_time_embedding_is_that_of_diffusers(diffusers_unet: Any) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config({**diffusers_unet.config, "time_embedding_act_fn": "gelu"}).eval()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = unet(x, t, context).sample
        torch.testing.assert_close(UNet(unet)(x, t, context), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 15)])
def test_a_step_of_a_plain_prompt_matches_the_unet_of_diffusers(
    source: Source, diffusers_unet: Any, size: tuple[int, int]
) -> None:
    """One index for the keys and values of every layer; branches share rows and the contexts of the pool."""
    sample, pool = torch.randn(2, 4, *size), torch.randn(5, 7, 32)
    branch_row, branch_context = torch.tensor([0, 0, 1]), torch.tensor([4, 1, 3])
    t = torch.tensor([700.0, 20.5])
    schedule = torch.cat([schedule_line(t=float(value), model_to_denoised=1, denoised=1, guidance=3) for value in t])
    next_sample, denoised, finite = step(
        source.unet, schedule, sample=sample, context=pool, branch_row=branch_row, branch_context=branch_context,
        uncond_branch=torch.tensor([0, 2]), cond_branch=torch.tensor([1, 2]),
    )  # fmt: skip
    with torch.no_grad():
        m = diffusers_unet(sample[branch_row], t[branch_row], pool[branch_context]).sample
    expected = torch.stack([m[0] + 3 * (m[1] - m[0]), m[2]])
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(next_sample, expected, rtol=0, atol=1e-5)
    assert finite.tolist() == [True, True]


def test_keys_and_values_of_every_layer_come_from_their_own_contexts(source: Source, diffusers_unet: Any) -> None:
    """Against diffusers' own attention with hooks that swap the inputs of its key and value projections."""
    sample, pool, t = torch.randn(2, 4, 9, 8), torch.randn(6, 7, 32), torch.tensor([700.0, 20.0])
    layers = attention_of(diffusers_unet)
    generator = torch.Generator().manual_seed(0)
    branch_context = torch.randint(0, 6, (2, 2, len(layers)), generator=generator)
    assert len(layers) == UNet(source.unet).num_layers == 4  # down, mid, two up
    assert (branch_context[:, 0] != branch_context[:, 1]).any()
    schedule = torch.cat([schedule_line(t=float(value), model_to_denoised=1, denoised=1, guidance=1) for value in t])
    next_sample, _, _ = step(source.unet, schedule, sample=sample, context=pool, branch_context=branch_context)

    def replace_input(projection: int, layer: int) -> Any:
        return lambda module, args: (pool[branch_context[:, projection, layer]],)

    for layer, block in enumerate(layers):
        for attention in block:
            if attention.is_cross_attention:
                attention.to_k.register_forward_pre_hook(replace_input(0, layer))
                attention.to_v.register_forward_pre_hook(replace_input(1, layer))
    with torch.no_grad():
        expected = diffusers_unet(sample, t, torch.full((2, 7, 32), torch.nan)).sample  # never read
    torch.testing.assert_close(next_sample, expected, rtol=0, atol=1e-5)


def test_keys_or_values_of_a_single_layer_can_come_from_another_context(source: Source) -> None:
    sample, pool = torch.randn(1, 4, 8, 8), torch.randn(2, 7, 32)
    schedule = schedule_line(t=300, model_to_denoised=1, denoised=1, guidance=1)

    def sample_after(branch_context: torch.Tensor) -> torch.Tensor:
        return step(source.unet, schedule, sample=sample, context=pool, branch_context=branch_context)[0]

    plain = torch.zeros(1, 2, 4, dtype=torch.int64)
    samples = [sample_after(plain)]
    for projection in (0, 1):
        for layer in range(4):
            changed = plain.clone()
            changed[0, projection, layer] = 1
            samples.append(sample_after(changed))
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(samples) for b in samples[:i])  # all differ


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_zero_star_scales_the_unconditional_prediction(source: Source, diffusers_unet: Any, guidance: float) -> None:
    """CFG-Zero*: m = s m_u + w (m_c - s m_u), s = <m_c, m_u> / |m_u|^2, for the rows that request it."""
    sample, pool, t = torch.randn(2, 4, 8, 8), 10 * torch.randn(2, 7, 32), 420.0
    lines = [schedule_line(t=t, model_to_denoised=1, denoised=1, guidance=guidance, zero_star=z) for z in (1, 0)]
    _, denoised, _ = step(
        source.unet, torch.cat(lines), sample=sample, context=pool,
        branch_row=torch.tensor([0, 0, 1, 1]), branch_context=torch.tensor([0, 1, 0, 1]),
        uncond_branch=torch.tensor([0, 2]), cond_branch=torch.tensor([1, 3]),
    )  # fmt: skip
    with torch.no_grad():
        m_u, m_c = (diffusers_unet(sample, t, context.expand(2, 7, 32)).sample.double() for context in pool)
    s = float((m_c[0] * m_u[0]).sum() / (m_u[0] ** 2).sum())
    assert abs(s - 1) > 1e-3
    expected = torch.stack([s * m_u[0] + guidance * (m_c[0] - s * m_u[0]), m_u[1] + guidance * (m_c[1] - m_u[1])])
    torch.testing.assert_close(denoised, expected.float(), rtol=1e-4, atol=1e-5)


def test_zero_star_handles_zero_and_nan_predictions() -> None:
    zeros, prediction = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    first_only = torch.tensor([1.0, 0.0])[:, None, None, None]
    assert zero_star_scale(zeros, prediction, first_only).flatten().tolist() == [0, 1]  # no division by zero
    nan = zero_star_scale(torch.full_like(prediction, torch.nan), prediction, first_only).flatten()
    assert nan.isnan().tolist() == [True, False]  # a row that does not request it is not changed
    half = zero_star_scale(prediction, 3 * prediction, torch.full((2, 1, 1, 1), 0.5)).flatten()
    torch.testing.assert_close(half, torch.full((2,), 2.0))  # halfway between 1 and 3


def test_the_next_sample_is_the_sum_of_all_columns(source: Source, diffusers_unet: Any) -> None:
    sample, previous, previous2, noise = torch.randn(4, 1, 4, 8, 8)
    pool, t, guidance = torch.randn(2, 7, 32), 333.0, 2.5
    columns = {
        "sample_to_denoised": 1.1, "model_to_denoised": -0.7, "sample": 0.3, "denoised": 0.5, "previous": -0.4,
        "previous2": 0.25, "uncond": 0.6, "noise": 0.15,
    }  # fmt: skip
    next_sample, denoised, _ = step(
        source.unet, schedule_line(t=t, guidance=guidance, **columns), sample=sample,
        previous=previous, previous2=previous2, noise=noise, context=pool,
        branch_row=torch.tensor([0, 0]), branch_context=torch.tensor([0, 1]),
        uncond_branch=torch.tensor([0]), cond_branch=torch.tensor([1]),
    )  # fmt: skip
    with torch.no_grad():
        m_u, m_c = (diffusers_unet(sample, t, context[None]).sample for context in pool)
    x0 = 1.1 * sample - 0.7 * (m_u + guidance * (m_c - m_u))
    x0_uncond = 1.1 * sample - 0.7 * m_u
    expected = 0.3 * sample + 0.5 * x0 - 0.4 * previous + 0.25 * previous2 + 0.6 * x0_uncond + 0.15 * noise
    torch.testing.assert_close(denoised, x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(next_sample, expected, rtol=0, atol=1e-5)


def test_an_inert_line_leaves_the_sample_bitwise_unchanged(source: Source) -> None:
    from oneword.runtime.samplers import COLUMNS

    sample = torch.randn(1, 4, 8, 8)
    schedule = torch.tensor([[COLUMNS[name] for name in DenoiseStep.COLUMNS]])
    next_sample, denoised, finite = step(
        source.unet, schedule, sample=sample, context=torch.randn(1, 7, 32), noise=sample, previous=sample,
        previous2=sample, known=sample, known_noise=sample,
    )  # fmt: skip
    assert torch.equal(next_sample, sample)
    assert not denoised.any()
    assert finite.tolist() == [True]


def test_a_ddim_row_with_guidance_matches_the_step_of_diffusers(source: Source, diffusers_unet: Any) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(source.scheduler_config))
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[3])
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(2, 7, 32)
    eps = diffusers_unet(sample.repeat(2, 1, 1, 1), t, context).sample
    guided = eps[:1] + 7.5 * (eps[1:] - eps[:1])
    expected = scheduler.step(guided, t, sample)
    alpha, alpha_next = (scheduler.alphas_cumprod[i] for i in (t, int(scheduler.timesteps[4])))
    s, s_next = (1 - alpha).sqrt(), (1 - alpha_next).sqrt()
    schedule = schedule_line(
        t=t, sample_to_denoised=alpha**-0.5, model_to_denoised=-s / alpha.sqrt(), sample=s_next / s,
        denoised=alpha_next.sqrt() - s_next * alpha.sqrt() / s, guidance=7.5,
    )  # fmt: skip
    next_sample, denoised, finite = step(
        source.unet, schedule, sample=sample, context=context, branch_row=torch.tensor([0, 0]),
        branch_context=torch.tensor([0, 1]), uncond_branch=torch.tensor([0]), cond_branch=torch.tensor([1]),
    )  # fmt: skip
    torch.testing.assert_close(next_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoised, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
    assert finite.tolist() == [True]


def test_the_area_outside_the_mask_is_the_known_picture_at_its_noise_level(source: Source) -> None:
    sample, known, known_noise = torch.randn(3, 1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    schedule = schedule_line(t=9, sample=1, known_scale=0.8, known_sigma=0.6)
    inputs = {"sample": sample, "known": known, "known_noise": known_noise, "mask": mask}
    next_sample, _, _ = step(source.unet, schedule, context=torch.randn(1, 7, 32), **inputs)
    torch.testing.assert_close(next_sample[..., :4], (0.8 * known + 0.6 * known_noise)[..., :4])
    torch.testing.assert_close(next_sample[..., 4:], sample[..., 4:])


def test_a_nan_in_one_row_is_reported_for_that_row_alone(source: Source) -> None:
    sample = torch.randn(2, 4, 8, 8)
    sample[1, 0, 0, 0] = torch.nan
    schedule = schedule_line(t=9, sample_to_denoised=1, model_to_denoised=1, denoised=1).repeat(2, 1)
    *_, finite = step(source.unet, schedule, sample=sample, context=torch.randn(2, 7, 32))
    assert finite.tolist() == [True, False]


def test_guidance_rescale_matches_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    m, m_cond = torch.randn(2, 2, 4, 8, 8)
    ours = rescale_guidance(m, m_cond, torch.full((2, 1, 1, 1), 0.7))
    torch.testing.assert_close(ours, rescale_noise_cfg(m, m_cond, 0.7))


def test_the_vae_graphs_match_diffusers(source: Source) -> None:
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


def test_the_second_encoder_of_sdxl_returns_its_penultimate_state_and_its_projected_pool() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, projection_dim=24, hidden_act="gelu", bos_token_id=48, eos_token_id=49,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    encoder = TextEncoder(model, final_norm=False, pools=True)
    ids = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 49, 0, 0, 0]])
    expected = model(ids, output_hidden_states=True)
    states, _, pooled, finite = encoder(
        ids, encoder.table, torch.ones(2, 6), torch.tensor([2, 2]), torch.tensor([3, 2])
    )
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
    expected = unet(sample, t, context, added_cond_kwargs=added).sample  # before UNet sets its processors
    torch.testing.assert_close(UNet(unet)(sample, t, context, pooled, time_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_bert_of_latent_diffusion_matches_diffusers(tiny_ldm_dir: Path, layers: int) -> None:
    source = load_source(tiny_ldm_dir)
    bert = source.text_encoders["text_encoder"]
    encoder = TextEncoder(bert)
    ids = torch.randint(0, encoder.table.shape[0], (2, 9))
    states, _, finite = encoder(ids, encoder.table, torch.ones(2, 9), torch.tensor([2, layers]))
    torch.testing.assert_close(states[0], bert(ids).last_hidden_state[0], rtol=1e-5, atol=1e-5)
    between = bert(ids, output_hidden_states=True).hidden_states[layers]  # the last one is already normed
    expected = between if layers == 2 else bert.model.layer_norm(between)
    torch.testing.assert_close(states[1], expected[1], rtol=1e-5, atol=1e-5)
    assert finite.tolist() == [True, True]


def test_the_autoencoder_of_latent_diffusion_matches_diffusers(tiny_ldm_dir: Path) -> None:
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
