"""The network of Chroma: that of FLUX.1 with T5's tokens alone, whose padding is masked in joint attention.

Diffusers' forward is repeated here: it freezes the batch size, masks queries too, so that padding attends to nothing,
and loses the mask under gradient checkpointing.
"""

from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from oneword.export.flux import Rotations, image_ids, packed, unpacked
from oneword.export.joint import JointTransformer, of_branches


class Chroma(JointTransformer):
    """ChromaTransformer2DModel on unpacked latents, with a pool of contexts and their masks."""

    patch = 2
    masks_context = True

    def __init__(self, transformer: ChromaTransformer2DModel) -> None:
        super().__init__(transformer)
        self.in_channels = int(transformer.config.in_channels) // self.patch**2
        transformer.pos_embed = Rotations(tuple(transformer.config.axes_dims_rope))
        for module in transformer.modules():
            if isinstance(module, FluxAttention):
                module.set_processor(MaskedAttention())

    def forward(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: None = None,
        time_ids: None = None,
        branch_context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Latents [N,C,h,w], times [N] (1000 sigma), contexts [N,T,D] and context_mask [N,T] (or [M,T,D] and [M,T] with
        branch_context [N,2,1]) -> [N,C,h,w], the direction from picture to noise. The mask is 1 for tokens that are
        attended to; None attends to all."""
        context = of_branches(context, branch_context)
        context_mask = None if context_mask is None else of_branches(context_mask, branch_context)
        n, c, h, w = sample.shape
        net: Any = self.transformer
        ids = torch.cat([sample.new_zeros(context.shape[1], 3).float(), image_ids(h // 2, w // 2, sample.device)])
        attention: dict[str, Tensor] = {}
        if context_mask is not None:
            image = context_mask.new_ones(n, (h // 2) * (w // 2), dtype=torch.bool)
            attention["key_mask"] = torch.cat([context_mask > 0, image], dim=1)[:, None, None]
        rotations = net.pos_embed(ids)
        modulation = net.distilled_guidance_layer(self._modulation_inputs(t).to(sample.dtype))
        x, y = net.x_embedder(packed(sample)), net.context_embedder(context)
        image_rows = 3 * len(net.single_transformer_blocks)
        text_rows = image_rows + 6 * len(net.transformer_blocks)
        for i, block in enumerate(net.transformer_blocks):
            parts = [modulation[:, first + 6 * i : first + 6 * i + 6] for first in (image_rows, text_rows)]
            y, x = self._run(block, x, y, torch.cat(parts, dim=1), rotations, None, attention)
        x = torch.cat([y, x], dim=1)
        for i, block in enumerate(net.single_transformer_blocks):
            x = self._run(block, x, modulation[:, 3 * i : 3 * i + 3], rotations, None, attention)
        x = net.norm_out(x[:, context.shape[1] :], modulation[:, -2:])
        return unpacked(net.proj_out(x), c, h // 2, w // 2)

    def _modulation_inputs(self, t: Tensor) -> Tensor:
        """[N, R, D] for R modulation vectors: the time, a guidance of 0, and the vector's number."""
        embed: Any = self.transformer.time_text_embed
        numbers = embed.mod_proj.to(t.dtype)[None].expand(t.shape[0], -1, -1)
        times = torch.cat([embed.time_proj(t), embed.guidance_proj(torch.zeros_like(t))], dim=1)
        return torch.cat([times[:, None].expand(-1, numbers.shape[1], -1), numbers], dim=2)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        """The block's outputs; recomputed in the backward pass if the model checkpoints."""
        transformer: Any = self.transformer
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            return transformer._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class MaskedAttention:
    """FLUX.1's attention with a mask of keys alone, so that every query attends to something."""

    def __init__(self) -> None:
        self._attend = FluxAttnProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        key_mask: Tensor | None = None,
    ) -> Any:
        """As FluxAttnProcessor, with key_mask [N,1,1,T + hw/4] bool in place of attention_mask."""
        return self._attend(attn, hidden_states, encoder_hidden_states, key_mask, image_rotary_emb)
