"""Qwen3 as a text encoder whose embedding table is an input (arXiv 2505.09388), for FLUX.2, and its chat template.

The states between layers are float32. Layers after the last tap do not run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, repeat_kv

from oneword.engines.errors import UsageError, one_line
from oneword.export.modules import causal_mask, finite
from oneword.runtime.prompt import Frame

TAPS = (9, 18, 27)
"""The numbers of the layers whose states are side by side in the context, as in Flux2KleinPipeline."""
MAX_LENGTH = 512


class Qwen3Encoder(nn.Module):
    """The states of three of Qwen3's layers, side by side. Padding is not attended to. It has no `layer` input."""

    pools = False
    masks_padding = True
    weighs_tokens = False
    num_layers = 0
    pooled_width = 0
    max_length = MAX_LENGTH
    table: Tensor
    frequencies: Tensor

    def __init__(self, model: Qwen3Model) -> None:
        super().__init__()
        config: Any = model.config
        if config.num_hidden_layers <= TAPS[-1]:
            raise UsageError(
                f"the text encoder has {config.num_hidden_layers} layers, FLUX.2 reads states up to {TAPS[-1]}, before "
                "the last: give a Qwen3 with more layers"
            )
        if model.has_sliding_layers or config.rope_parameters["rope_type"] != "default":
            raise UsageError("the text encoder has sliding windows or scaled positions: give a plain Qwen3")
        self.layers: Any = model.layers[: TAPS[-1]]
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.register_buffer("table", model.get_input_embeddings().weight.detach(), persistent=False)
        self.register_buffer("frequencies", model.rotary_emb.inv_freq.detach().float(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The number type the network computes in."""
        return self.table.dtype

    @property
    def hidden_width(self) -> int:
        """D of the hidden states."""
        return len(TAPS) * int(self.table.shape[1])

    def forward(self, input_ids: Tensor, embedding_table: Tensor, eos_index: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B,T], table [V,D], eos_index [B], after which tokens are padding ->
        hidden_states [B,T,3D], finite [B]."""
        x = embedding_table[input_ids].to(self.dtype).float()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = causal_mask(input_ids.shape[1], x)
        mask = mask.masked_fill((positions > eos_index[:, None])[:, None, None], torch.finfo(x.dtype).min)
        angles = (positions[:, None].float() * self.frequencies.float()).repeat(1, 2)[None]
        rotations, taps = (angles.cos(), angles.sin()), []
        for number, layer in enumerate(self.layers, start=1):
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x).to(self.dtype), mask, rotations).float()
            x = x + layer.mlp(layer.post_attention_layernorm(x).to(self.dtype)).float()
            if number in TAPS:
                taps.append(x)
        states = torch.cat(taps, dim=-1)
        return states, finite(states)

    def _attend(self, attention: Any, x: Tensor, mask: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        """Attention of states [B,T,D] with groups of heads that share keys and values -> [B,T,D]."""
        q, k, v = (
            project(x).unflatten(2, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k, v = (states.transpose(1, 2) for states in (attention.q_norm(q), attention.k_norm(k), v))
        q, k = apply_rotary_pos_emb(q.float(), k.float(), *rotations)
        q, k = q.to(self.dtype), repeat_kv(k.to(self.dtype), self.groups)
        attended = F.scaled_dot_product_attention(
            q, k, repeat_kv(v, self.groups), attn_mask=mask.to(self.dtype), scale=attention.scaling
        )
        out: Tensor = attention.o_proj(attended.transpose(1, 2).flatten(2))
        return out


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """The text before and after a user's prompt in the tokenizer's chat template, without thinking.

    Raises UsageError if there is no template, or if prompts with spaces, newlines or tokens of the template are not in
    it as they are, or share tokens with the text around them.
    """
    probes = ("oneword", "", "\n <think>a  b\t", "<|im_end|> \n\n")
    try:
        first, *texts = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": probe}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for probe in probes
        )
    except Exception as e:  # of any type: the template is a program
        raise UsageError(f"the tokenizer has no chat template that can be used ({one_line(e)})") from e
    prefix, _, suffix = first.partition(probes[0])
    if any(text != prefix + probe + suffix for text, probe in zip(texts, probes[1:], strict=True)):
        raise UsageError("the tokenizer's chat template changes the prompt: give a model with Qwen3's own template")

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    frame = Frame.of(prefix, suffix, tokenizer.bos_token_id, tokenizer.eos_token_id, ids)
    if frame.tail[0] not in tokenizer.added_tokens_decoder or any(  # which no prompt can join
        tokenizer(prefix + probe + suffix).input_ids != [*frame.head, *ids(frame.joined + probe), *frame.tail]
        for probe in probes
    ):
        raise UsageError(
            "the tokenizer does not split the prompt from its chat template: give a model with Qwen3's own tokenizer "
            "and template"
        )
    if tokenizer.padding_side != "right":
        raise UsageError(f"the tokenizer pads on the {tokenizer.padding_side}: give a model whose tokenizer pads right")
    return prefix, suffix
