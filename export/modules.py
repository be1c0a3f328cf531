"""The graphs as torch modules: tensors in, tensors out, batch-first, no control flow that depends on data.

B rows (pictures), N branches (UNet evaluations), M contexts (encoded prompts), T tokens, D width, C latent channels,
h = H / 8. Inputs and outputs are float32 (table: the network's dtype); the network computes in its own dtype inside.
Every module ends with `finite` [B] bool, so that a NaN is noticed without anybody looking at a picture.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import Tensor, nn

SCHEDULE_COLUMNS = ("t", "a", "b", "c", "d", "e", "f", "guidance", "rescale", "known_scale", "known_sigma")


class Parts(NamedTuple):
    """What a text model is made of, whoever wrote it."""

    table: Tensor
    positions: nn.Embedding
    layers: nn.ModuleList
    """Each takes the states [B,T,D] and a mask to add to the scores, or None."""
    norm: nn.LayerNorm
    projection: nn.Linear | None
    causal: bool


def parts_of(model: Any) -> Parts:
    """The parts of a transformers CLIPTextModel (WithProjection), or of diffusers' LDMBertModel."""
    if isinstance(model, LDMBertModel):
        bert: Any = model.model
        layers = nn.ModuleList(LdmBertLayer(layer) for layer in bert.layers)
        return Parts(bert.embed_tokens.weight, bert.embed_positions, layers, bert.layer_norm, None, causal=False)
    text = getattr(model, "text_model", model)
    table, positions = text.embeddings.token_embedding.weight, text.embeddings.position_embedding
    projection = getattr(model, "text_projection", None)
    return Parts(table, positions, text.encoder.layers, text.final_layer_norm, projection, causal=True)


class LdmBertLayer(nn.Module):
    """One layer of diffusers' LDMBertModel, whose own forward looks at its data where it is float16."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """States [B,T,D] -> [B,T,D]; every token sees every other, padding too, as in the released model."""
        layer, attention = self.layer, self.layer.self_attn
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            project(h).unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return out


class TextEncoder(nn.Module):
    """A text model whose embedding table is an input.

    `model` is one that `parts_of` knows. `final_norm`: whether hidden states pass the final layer norm (all but SDXL).
    `pools`: whether the projected state at `eos_index` is an output.
    """

    table: Tensor

    def __init__(self, model: nn.Module, *, final_norm: bool = True, pools: bool = False) -> None:
        super().__init__()
        parts = parts_of(model)
        self.layers, self.norm, self.positions = parts.layers, parts.norm, parts.positions
        self.projection = parts.projection
        self.causal = parts.causal
        self.final_norm = final_norm
        self.pools = pools
        self.register_buffer("table", parts.table.detach(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the table and the network's arithmetic are in."""
        return self.table.dtype

    @property
    def num_layers(self) -> int:
        """L: `layer` may be 1..L."""
        return len(self.layers)

    @property
    def max_length(self) -> int:
        """The most tokens a row may have."""
        return int(self.positions.weight.shape[0])

    @property
    def hidden_width(self) -> int:
        """D of the hidden states."""
        return int(self.norm.weight.shape[0])

    @property
    def pooled_width(self) -> int:
        """P: the width of what pooling gives."""
        return self.hidden_width if self.projection is None else int(self.projection.weight.shape[0])

    def forward(
        self,
        input_ids: Tensor,
        embedding_table: Tensor,
        token_weights: Tensor,
        layer: Tensor,
        eos_index: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """input_ids [B,T], table [V,D], token_weights [B,T], layer [B], eos_index [B] ->
        hidden_states [B,T,D], pooled [B,P] where it pools, finite [B]."""
        return self.embeddings_to_states(embedding_table[input_ids], token_weights, layer, eos_index)

    def embeddings_to_states(
        self, inputs_embeds: Tensor, token_weights: Tensor, layer: Tensor, eos_index: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All of `forward` after the table: inputs_embeds is [B, T, D]."""
        _, t, _ = inputs_embeds.shape
        x = inputs_embeds + self.positions.weight[:t]
        mask = causal_mask(t, x) if self.causal else None
        selected = x
        for i, block in enumerate(self.layers, start=1):
            x = block(x, mask)
            selected = torch.where((layer == i)[:, None, None], x, selected)
        states = (self.norm(selected) if self.final_norm else selected).float()
        states = weigh_tokens(states, token_weights)
        if not self.pools:
            return states, finite(states)
        assert eos_index is not None  # the graph of a pooling encoder always has it
        rows = torch.arange(x.shape[0], device=x.device)
        pooled = self.norm(x)[rows, eos_index]
        pooled = (pooled if self.projection is None else self.projection(pooled)).float()
        return states, pooled, finite(states) & finite(pooled)


class UNet(nn.Module):
    """UNet2DConditionModel's own forward, with `forward_upsample_size` always on.

    The model decides from the sample's shape whether to hand sizes to its upsamplers, and a traced graph would freeze
    that choice; handed always, the result is the same and odd sizes work.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        """Latents [N,C,h,w], timesteps [N], contexts [N,T,D], SDXL's [N,P] and [N,6] -> [N,C,h,w]."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        added = {"text_embeds": pooled, "time_ids": time_ids}
        aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        emb = emb if aug is None else emb + aug
        x = unet.conv_in(sample)
        skips = (x,)
        for block in unet.down_blocks:
            x, states = block(x, emb, **attends(block, context))
            skips += states
        if unet.mid_block is not None:
            x = unet.mid_block(x, emb, **attends(unet.mid_block, context))
        for block in unet.up_blocks:
            count = len(block.resnets)
            states, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if skips else None
            x = block(x, states, temb=emb, upsample_size=size, **attends(block, context))
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        prediction: Tensor = unet.conv_out(x)
        return prediction


class DenoiseStep(nn.Module):
    """One step of any sampler: UNet branches, guidance, the sampler's update and the masked blend.

    `schedule` holds one row of SCHEDULE_COLUMNS per picture. The sampler's state is variance-preserving and float32.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = UNet(unet)
        self.network_dtype = unet.dtype

    def forward(
        self,
        sample: Tensor,
        previous: Tensor,
        noise: Tensor,
        known: Tensor,
        known_noise: Tensor,
        mask: Tensor,
        schedule: Tensor,
        branch_row: Tensor,
        branch_context: Tensor,
        uncond_branch: Tensor,
        cond_branch: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B,C,h,w], mask [B,1,h,w], schedule [B,11], branch_* [N], *_branch [B], context [M,T,D],
        pooled [M,P], time_ids [M,6] -> next_sample, denoised [B,C,h,w], finite [B]."""
        dtype = self.network_dtype
        t, a, b, c, d, e, f, guidance, rescale, known_scale, known_sigma = (
            column[:, None, None, None] for column in schedule.unbind(dim=1)
        )
        m = self.unet(
            sample.index_select(0, branch_row).to(dtype),
            t.flatten().index_select(0, branch_row),
            context.index_select(0, branch_context).to(dtype),
            None if pooled is None else pooled.index_select(0, branch_context),
            None if time_ids is None else time_ids.index_select(0, branch_context),
        ).float()
        m_uncond, m_cond = m.index_select(0, uncond_branch), m.index_select(0, cond_branch)
        m = rescale_guidance(m_uncond + guidance * (m_cond - m_uncond), m_cond, rescale)
        denoised = a * sample + b * m
        next_sample = c * sample + d * denoised + e * previous + f * noise
        next_sample = mask * next_sample + (1 - mask) * (known_scale * known + known_sigma * known_noise)
        return next_sample, denoised, finite(next_sample) & finite(denoised)


class VaeDecoder(nn.Module):
    """The sampler's latents [B,C,h,w] -> images [B,H,W,3] uint8, finite [B]; scale and shift are undone inside."""

    def __init__(self, vae: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.codebook: nn.Embedding | None = vae.quantize.embedding if isinstance(vae, VQModel) else None
        self.scale, self.shift = latent_scale_and_shift(vae)
        self.network_dtype = vae.dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (latents / self.scale + self.shift).to(self.network_dtype)
        if self.codebook is not None:
            z = nearest(z, self.codebook.weight)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        x = self.decoder(z).float()
        images = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        return images.to(torch.uint8), finite(x)  # the cast comes last: TensorRT has uint8 at a graph's border only


class VaeEncoder(nn.Module):
    """Images [B,H,W,3] uint8 -> the posterior's mean and std [B,C,h,w] in the sampler's space, finite [B].

    A VQModel has no posterior: its std is zero."""

    def __init__(self, vae: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.has_posterior = not isinstance(vae, VQModel)
        self.scale, self.shift = latent_scale_and_shift(vae)
        self.network_dtype = vae.dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = images.float().permute(0, 3, 1, 2) / 127.5 - 1
        moments = self.encoder(x.to(self.network_dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, std = moments.float(), torch.zeros_like(moments, dtype=torch.float32)
        if self.has_posterior:
            mean, logvar = mean.chunk(2, dim=1)
            std = torch.exp(0.5 * logvar.clamp(-30, 20))
        mean, std = (mean - self.shift) * self.scale, std * self.scale
        return mean, std, finite(mean) & finite(std)


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Every latent of z [B,C,h,w] replaced by the nearest row of the codebook [K,C]; distances in float32."""
    rows, codes = z.float().permute(0, 2, 3, 1), codebook.float()
    distances = codes.square().sum(dim=1) - 2 * rows @ codes.T  # |z|^2 is the same for every code
    return codebook[distances.argmin(dim=-1)].permute(0, 3, 1, 2)


def weigh_tokens(states: Tensor, weights: Tensor) -> Tensor:
    """A1111's emphasis: each token's state times its weight, then the row's mean restored; exactly nothing for ones.

    A1111 divides by a mean that may be near zero. Here the factor stays within what the weights themselves allow
    (1/max .. 1/min, and at most 10), and is 1 for rows whose mean is only what rounding left.
    """
    weighted = states * weights[:, :, None]
    before, after = (x.detach().mean(dim=(1, 2)) for x in (states, weighted))  # learning: no gradient of 0 / 0
    smallest = 1 / weights.amax(dim=1).clamp(min=1)
    largest = 1 / weights.amin(dim=1).clamp(min=0.1).clamp(max=1)
    factor = torch.minimum(torch.maximum(before / after, smallest), largest)
    rounding = 1e-3 * states.abs().mean(dim=(1, 2))
    has_mean = torch.minimum(before.abs(), after.abs()) > rounding
    return weighted * torch.where(has_mean, factor, 1.0)[:, None, None]


def rescale_guidance(m: Tensor, m_cond: Tensor, rescale: Tensor) -> Tensor:
    """Guidance rescale, section 3.4 of arXiv 2305.08891: the guided deviation is pulled to the conditional's."""
    std_cond, std = (x.std(dim=(1, 2, 3), keepdim=True) for x in (m_cond, m))
    return m * (1 - rescale + rescale * std_cond / std.clamp(min=1e-12))


def causal_mask(t: int, like: Tensor) -> Tensor:
    """[1, 1, T, T]: 0 where a token may look, the dtype's lowest number where it may not."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((t, t), lowest, dtype=like.dtype, device=like.device).triu(1)[None, None]


def attends(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    """The context, for blocks that take one."""
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def finite(x: Tensor) -> Tensor:
    """[B] bool: whether everything in each row of x [B, ...] is finite."""
    return torch.isfinite(x).flatten(1).all(dim=1)


def latent_scale_and_shift(vae: AutoencoderKL | VQModel) -> tuple[float, float]:
    """What turns the VAE's latents into the sampler's: (z - shift) * scale."""
    return float(vae.config.scaling_factor), float(vae.config.get("shift_factor", None) or 0.0)
