"""T5's encoder as a torch module whose embedding table is an input (arXiv 1910.10683), for SD3, FLUX.1 and Chroma.

The prompt's padding is attended to like every token, unless the family masks it. The states between blocks are float32
where the weights of `wo` are, which transformers keeps in float32 in an fp16 model because its outputs overflow.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from oneword.export.modules import finite, weigh_tokens


class T5Encoder(nn.Module):
    """A T5 encoder over rows of up to `max_length` tokens. All of its layers run: it has no `layer` input.

    `masks_padding`: whether tokens after `eos_index`, which is an input then, are not attended to.
    """

    pools = False
    weighs_tokens = True
    num_layers = 0
    pooled_width = 0
    buckets: Tensor
    table: Tensor

    def __init__(self, model: T5EncoderModel, max_length: int, *, masks_padding: bool = False) -> None:
        super().__init__()
        self.masks_padding = masks_padding
        stack: Any = model.encoder
        self.blocks, self.norm = stack.block, stack.final_layer_norm
        self.max_length = max_length
        first = self.blocks[0].layer[0].SelfAttention
        distances = torch.arange(1 - max_length, max_length)
        buckets = first._relative_position_bucket(
            distances,
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        self.register_buffer("buckets", buckets, persistent=False)
        self.register_buffer("table", model.get_input_embeddings().weight.detach(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The number type the network computes in."""
        return self.table.dtype

    @property
    def hidden_width(self) -> int:
        """D of the hidden states."""
        return int(self.norm.weight.shape[0])

    def forward(
        self, input_ids: Tensor, embedding_table: Tensor, token_weights: Tensor, eos_index: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """input_ids [B,T], table [V,D], token_weights [B,T], eos_index [B] if it masks padding ->
        hidden_states [B,T,D], weight_scale [B], finite [B]."""
        x = embedding_table[input_ids].to(self.dtype)
        bias = self._position_bias(input_ids.shape[1]).to(x.dtype)
        if eos_index is not None:
            padding = torch.arange(input_ids.shape[1], device=input_ids.device) > eos_index[:, None]
            bias = bias.masked_fill(padding[:, None, None], torch.finfo(bias.dtype).min)
        for block in self.blocks:
            x = x + attend(block.layer[0].SelfAttention, block.layer[0].layer_norm(x), bias)
            x = x + block.layer[1].DenseReluDense(block.layer[1].layer_norm(x))
        states, weight_scale = weigh_tokens(self.norm(x).float(), token_weights)
        return states, weight_scale, finite(states)

    def _position_bias(self, t: int) -> Tensor:
        """[1, heads, T, T]: added to the scores; it depends on the distance of two tokens only."""
        positions = torch.arange(t, device=self.buckets.device)
        distances = positions[None, :] - positions[:, None] + (self.max_length - 1)
        bias: Tensor = self.blocks[0].layer[0].SelfAttention.relative_attention_bias(self.buckets[distances])
        return bias.permute(2, 0, 1)[None]


def attend(attention: Any, x: Tensor, bias: Tensor) -> Tensor:
    """T5's self-attention of states [B,T,D] -> [B,T,D]: the scores are not scaled."""
    q, k, v = (
        project(x).unflatten(2, (attention.n_heads, attention.key_value_proj_dim)).transpose(1, 2)
        for project in (attention.q, attention.k, attention.v)
    )
    attended = (q @ k.transpose(2, 3) + bias).softmax(dim=-1) @ v
    out: Tensor = attention.o(attended.transpose(1, 2).flatten(2))
    return out
