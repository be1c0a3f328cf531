"""The graphs as torch modules: tensors in, tensors out, batch-first, no control flow that depends on data.

B rows (pictures), N branches (network evaluations), M contexts (encoded prompts), T tokens, D width, C latent channels,
h = H / 8. Inputs and outputs are float32 (an fp16 network's table: fp16); the network computes in its own dtype inside.
The last output of every module is `finite` [B] bool, so that a NaN is detected without looking at a picture.
"""

from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import Tensor, nn

from oneword.engines.errors import UsageError, one_line

AnyVae: TypeAlias = AutoencoderKL | AutoencoderKLFlux2 | VQModel


class Parts(NamedTuple):
    """The parts of a text model, whichever library it comes from."""

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
    """One layer of diffusers' LDMBertModel, whose own forward has data-dependent control flow in float16."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """States [B,T,D] -> [B,T,D]; every token attends to every other and to padding, as in the released model."""
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

    `model` is one that `parts_of` accepts. `final_norm`: whether to apply the final layer norm (all but SDXL).
    `pools`: whether the projected state at `eos_index` is an output.
    """

    masks_padding = False
    weighs_tokens = True
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
        """The number type the network computes in."""
        return self.table.dtype

    @property
    def num_layers(self) -> int:
        """L: `layer` may be 1..L."""
        return len(self.layers)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens in a row."""
        return int(self.positions.weight.shape[0])

    @property
    def hidden_width(self) -> int:
        """D of the hidden states."""
        return int(self.norm.weight.shape[0])

    @property
    def pooled_width(self) -> int:
        """P: the width of the pooled vector."""
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
        hidden_states [B,T,D], weight_scale [B], pooled [B,P] if it pools, finite [B]."""
        return self.embeddings_to_states(embedding_table[input_ids].to(self.dtype), token_weights, layer, eos_index)

    def embeddings_to_states(
        self, inputs_embeds: Tensor, token_weights: Tensor, layer: Tensor, eos_index: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """`forward` after the table lookup: inputs_embeds is [B,T,D]."""
        _, t, _ = inputs_embeds.shape
        x = inputs_embeds + self.positions.weight[:t]
        mask = causal_mask(t, x) if self.causal else None
        selected = x
        for i, block in enumerate(self.layers, start=1):
            x = block(x, mask)
            selected = torch.where((layer == i)[:, None, None], x, selected)
        states = (self.norm(selected) if self.final_norm else selected).float()
        states, weight_scale = weigh_tokens(states, token_weights)
        if not self.pools:
            return states, weight_scale, finite(states)
        assert eos_index is not None  # the graph of a pooling encoder always has it
        rows = torch.arange(x.shape[0], device=x.device)
        pooled = self.norm(x)[rows, eos_index]
        pooled = (pooled if self.projection is None else self.projection(pooled)).float()
        return states, weight_scale, pooled, finite(states) & finite(pooled)


class PooledEncoder(nn.Module):
    """A text model of which only the pooled state is used."""

    pools = True
    masks_padding = False
    weighs_tokens = True  # which a pooled state ignores
    num_layers = 0
    hidden_width = None
    table: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = TextEncoder(model, pools=True)
        self.max_length, self.pooled_width = self.encoder.max_length, self.encoder.pooled_width
        self.register_buffer("table", self.encoder.table, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The number type the network computes in."""
        return self.table.dtype

    def forward(self, input_ids: Tensor, embedding_table: Tensor, eos_index: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B,T], table [V,D], eos_index [B] -> pooled [B,P], finite [B]."""
        weights, layer = torch.ones_like(input_ids, dtype=torch.float32), torch.ones_like(eos_index)
        _, _, pooled, _ = self.encoder(input_ids, embedding_table, weights, layer, eos_index)
        return pooled, finite(pooled)


class Attend:
    """Attention of a transformer block, as a diffusers processor; keys and values may come from different contexts.

    Without `branch_context`, `encoder_hidden_states` is [N,T,D]. With `branch_context` [N,2,L] it is a pool of contexts
    [M,T,D]: this layer's keys come from `branch_context[:, 0, layer]`, its values from `branch_context[:, 1, layer]`.
    `plain` uses separate products and a softmax, which is faster than the fused kernel for few positions on a CPU.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.plain = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        branch_context: Tensor | None = None,
    ) -> Tensor:
        """States [N,hw,D] -> [N,hw,D]."""
        keys = values = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and branch_context is not None:
            keys, values = (encoder_hidden_states.index_select(0, branch_context[:, i, self.layer]) for i in (0, 1))
        q, k, v = (
            project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, keys), (attn.to_v, values))
        )
        if self.plain:
            scores = (q * attn.scale) @ k.transpose(2, 3)
            attended = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=attn.scale)
        out: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return out


class Network(Protocol):
    """The network of a denoise step: a UNet or a transformer."""

    num_layers: int
    """L: the number of layers that may each have their own context."""
    dtype: torch.dtype
    in_channels: int
    """C of the latents."""
    patch: int
    """h and w must be multiples of it."""
    context_width: int
    """D of the context."""
    embeds_guidance: bool
    """Whether `embedded_guidance` [N] is also an argument."""
    masks_context: bool
    """Whether `context_mask` [M,T] is also an argument."""

    def __call__(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor | None,
        time_ids: Tensor | None,
        branch_context: Tensor,
        **optional: Tensor,
    ) -> Tensor:
        """Latents [N,C,h,w], times [N], contexts [M,T,D], [N,P], [N,6], branch_context [N,2,L] -> [N,C,h,w]."""
        ...


class UNet(nn.Module):
    """UNet2DConditionModel's own forward, with `forward_upsample_size` always on and a context per layer.

    The model decides from the sample's shape whether to pass sizes to its upsamplers, and a traced graph would freeze
    that decision. Always passing them is equivalent and supports odd sizes. Its attention processors become Attend.
    """

    patch = 1
    embeds_guidance = False
    masks_context = False

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.attention = attention_of(unet)
        self.num_layers = len(self.attention)
        self.dtype = unet.dtype
        self.in_channels = int(unet.config.in_channels)
        self.context_width = int(np.max(unet.config.cross_attention_dim))  # a number, or one per block
        for layer, block in enumerate(self.attention):
            for attention in block:
                if not isinstance(attention.processor, Attend):
                    attention.set_processor(Attend(layer))

    def attend_plainly(self, plain: bool) -> None:
        """Sets Attend.plain in every layer."""
        for block in self.attention:
            for attention in block:
                attention.processor.plain = plain

    def forward(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        branch_context: Tensor | None = None,
    ) -> Tensor:
        """Latents [N,C,h,w], timesteps [N], contexts [N,T,D] (or [M,T,D] with branch_context [N,2,L]), SDXL's [N,P] and
        [N,6] -> [N,C,h,w]."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        added = {"text_embeds": pooled, "time_ids": time_ids}
        aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        emb = emb if aug is None else emb + aug
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        x = unet.conv_in(sample)
        skips = (x,)
        for block in unet.down_blocks:
            x, states = block(x, emb, **context_arguments(block, context, branch_context))
            skips += states
        if unet.mid_block is not None:
            x = unet.mid_block(x, emb, **context_arguments(unet.mid_block, context, branch_context))
        for block in unet.up_blocks:
            count = len(block.resnets)
            states, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if skips else None
            x = block(x, states, temb=emb, upsample_size=size, **context_arguments(block, context, branch_context))
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        prediction: Tensor = unet.conv_out(x)
        return prediction


class DenoiseStep(nn.Module):
    """One step of any sampler: the network's branches, guidance, the sampler's update and the masked blend.

    `schedule` holds a line of `columns` per picture. The sampler's state is float32.
    """

    COLUMNS = (
        "t",
        "sample_to_denoised",
        "model_to_denoised",
        "sample",
        "denoised",
        "previous",
        "previous2",
        "uncond",
        "noise",
        "guidance",
        "rescale",
        "zero_star",
        "known_scale",
        "known_sigma",
    )

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.columns = (*self.COLUMNS, *(("embedded_guidance",) if network.embeds_guidance else ()))

    def forward(
        self,
        sample: Tensor,
        previous: Tensor,
        previous2: Tensor,
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
        branch_pooled: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B,C,h,w], mask [B,1,h,w], schedule [B,K], branch_row and branch_pooled [N], branch_context [N,2,L],
        *_branch [B], context [M,T,D], pooled [M,P], time_ids [B,6], context_mask [M,T] -> next_sample, denoised
        [B,C,h,w], finite [B]."""
        dtype = self.network.dtype
        column = dict(zip(self.columns, (c[:, None, None, None] for c in schedule.unbind(dim=1)), strict=True))
        optional = {
            name: column[name].flatten().index_select(0, branch_row) for name in self.columns[len(self.COLUMNS) :]
        }
        if context_mask is not None:
            optional["context_mask"] = context_mask
        m = self.network(
            sample.index_select(0, branch_row).to(dtype),
            column["t"].flatten().index_select(0, branch_row),
            context.to(dtype),
            None if pooled is None or branch_pooled is None else pooled.index_select(0, branch_pooled),
            None if time_ids is None else time_ids.index_select(0, branch_row),
            branch_context,
            **optional,
        ).float()
        m_uncond, m_cond = m.index_select(0, uncond_branch), m.index_select(0, cond_branch)
        m_uncond = m_uncond * zero_star_scale(m_uncond, m_cond, column["zero_star"])
        m = rescale_guidance(m_uncond + column["guidance"] * (m_cond - m_uncond), m_cond, column["rescale"])
        from_sample = column["sample_to_denoised"] * sample
        denoised = from_sample + column["model_to_denoised"] * m
        next_sample = (
            column["sample"] * sample
            + column["denoised"] * denoised
            + column["previous"] * previous
            + column["previous2"] * previous2
            + column["uncond"] * (from_sample + column["model_to_denoised"] * m_uncond)
            + column["noise"] * noise
        )
        original = column["known_scale"] * known + column["known_sigma"] * known_noise
        next_sample = mask * next_sample + (1 - mask) * original
        return next_sample, denoised, finite(next_sample) & finite(denoised)


class VaeDecoder(nn.Module):
    """The sampler's latents [B,C,h,w] -> images [B,H,W,3] uint8, finite [B]; scale, shift and squares are undone
    inside."""

    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, vae: AnyVae | AutoencoderTiny) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = None if isinstance(vae, AutoencoderTiny) else vae.post_quant_conv
        self.codebook: nn.Embedding | None = vae.quantize.embedding if isinstance(vae, VQModel) else None
        self.scale, self.shift = latent_scale_and_shift(vae)
        self.patch = latent_patch(vae)
        self.network_dtype = vae.dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (latents / self.scale + self.shift).to(self.network_dtype)
        if self.patch > 1:
            z = F.pixel_shuffle(z, self.patch)
        if self.codebook is not None:
            z = nearest(z, self.codebook.weight)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        x = self.decoder(z).float()
        images = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        return images.to(torch.uint8), finite(x)  # the cast is last: TensorRT has uint8 only as graph input or output


class VaeEncoder(nn.Module):
    """Images [B,H,W,3] uint8 -> the posterior's mean and std [B,C,h,w] in the sampler's space, finite [B].

    A VQModel has no posterior: its std is zero.
    """

    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, vae: AnyVae) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.has_posterior = not isinstance(vae, VQModel)
        self.scale, self.shift = latent_scale_and_shift(vae)
        self.patch = latent_patch(vae)
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
        if self.patch > 1:
            mean, std = (F.pixel_unshuffle(moment, self.patch) for moment in (mean, std))
        mean, std = (mean - self.shift) * self.scale, std * self.scale
        return mean, std, finite(mean) & finite(std)


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Replaces every latent of z [B,C,h,w] by the nearest row of the codebook [K,C]; distances in float32."""
    rows, codes = z.float().permute(0, 2, 3, 1), codebook.float()
    distances = codes.square().sum(dim=1) - 2 * rows @ codes.T  # |z|^2 is the same for every code
    return codebook[distances.argmin(dim=-1)].permute(0, 3, 1, 2)


def weigh_tokens(states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A1111's emphasis: each token's state times its weight, then the row's mean restored; weights of 1 change nothing.

    Returns the states [B,T,D] and the factor [B] that restored the mean. A1111 divides by a mean that may be near zero.
    Here the factor is limited to the range the weights allow (1/max .. 1/min, and at most 10), and is 1 for rows whose
    mean is only rounding error.
    """
    weighted = states * weights[:, :, None]
    before, after = (x.detach().mean(dim=(1, 2)) for x in (states, weighted))  # training: no gradient of 0 / 0
    smallest = 1 / weights.amax(dim=1).clamp(min=1)
    largest = 1 / weights.amin(dim=1).clamp(min=0.1).clamp(max=1)
    factor = torch.minimum(torch.maximum(before / after, smallest), largest)
    rounding = 1e-3 * states.abs().mean(dim=(1, 2))
    has_mean = torch.minimum(before.abs(), after.abs()) > rounding
    factor = torch.where(has_mean, factor, 1.0)
    return weighted * factor[:, None, None], factor


def zero_star_scale(m_uncond: Tensor, m_cond: Tensor, zero_star: Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): s* = <m_c, m_u> / |m_u|^2 [B,1,1,1] if zero_star is 1, else exactly 1."""
    dot, square = ((m_uncond * x).sum(dim=(1, 2, 3), keepdim=True) for x in (m_cond, m_uncond))
    scale = dot / square.clamp(min=1e-12)
    return torch.where(zero_star > 0, 1 + zero_star * (scale - 1), 1.0)


def rescale_guidance(m: Tensor, m_cond: Tensor, rescale: Tensor) -> Tensor:
    """Guidance rescale, section 3.4 of arXiv 2305.08891: pulls the guided standard deviation to the conditional one."""
    std_cond, std = map(standard_deviation, (m_cond, m))  # n and n - 1 give the same ratio
    return m * (1 - rescale + rescale * std_cond / std.clamp(min=1e-12))


def standard_deviation(x: Tensor) -> Tensor:
    """The population standard deviation of each row, [N,1,1,1]; ONNX has no such operator."""
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return (centred * centred).mean(dim=(1, 2, 3), keepdim=True).sqrt()


def causal_mask(t: int, like: Tensor) -> Tensor:
    """[1, 1, T, T]: 0 where a token may attend, the dtype's lowest number elsewhere."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((t, t), lowest, dtype=like.dtype, device=like.device).triu(1)[None, None]


def context_arguments(block: nn.Module, context: Tensor, branch_context: Tensor | None) -> dict[str, Any]:
    """Arguments that pass the context to a block, empty for a block without cross-attention."""
    if not getattr(block, "has_cross_attention", False):
        return {}
    contexts = {} if branch_context is None else {"branch_context": branch_context}
    return {"encoder_hidden_states": context, "cross_attention_kwargs": contexts}


def attention_of(unet: UNet2DConditionModel) -> list[list[Any]]:
    """The attention modules of every transformer of a UNet, in execution order: one list per transformer.

    Raises UsageError for attention that Attend does not support.
    """
    blocks = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    transformers = [t for block in blocks for t in (getattr(block, "attentions", None) or ())]
    layers = [
        [attention for b in t.transformer_blocks for attention in (b.attn1, b.attn2) if attention is not None]
        for t in transformers
        if hasattr(t, "transformer_blocks")
    ]
    for attention in (attention for layer in layers for attention in layer):
        for name in ("group_norm", "norm_cross", "norm_q", "norm_k", "spatial_norm", "added_kv_proj_dim"):
            if getattr(attention, name, None) is not None:
                raise UsageError(f"the UNet's attention has {name}: not supported, give a plain text-to-image model")
    return layers


def finite(x: Tensor) -> Tensor:
    """[B] bool: whether all values in each row of x [B, ...] are finite."""
    return torch.isfinite(x).flatten(1).all(dim=1)


def latent_patch(vae: AnyVae | AutoencoderTiny) -> int:
    """The side of the square of the VAE's latents that is one of the sampler's: 2 in FLUX.2, else 1."""
    return int(vae.config.patch_size[0]) if isinstance(vae, AutoencoderKLFlux2) else 1


def latent_scale_and_shift(vae: AnyVae | AutoencoderTiny) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Scale and shift from the VAE's latents to the sampler's: (z - shift) * scale. They are [C,1,1] where the VAE has
    statistics of each channel: FLUX.2's of its squares, and those that diffusers' SDXL pipeline reads.

    Raises UsageError if the config has other values than numbers.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        statistics: Any = vae.bn
        std = (statistics.running_var.float() + float(vae.config.batch_norm_eps)).sqrt()
        return 1 / std[:, None, None], statistics.running_mean.float()[:, None, None]
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    try:
        scale = float(vae.config.scaling_factor)
        if mean is not None and std is not None:
            return scale / torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
        return scale, float(vae.config.get("shift_factor", None) or 0.0)
    except (TypeError, ValueError, IndexError) as error:
        raise UsageError(
            "the VAE's config.json must have numbers as scaling_factor and shift_factor, and lists of numbers as "
            f"latents_mean and latents_std: {one_line(error)}"
        ) from error
