"""What transformers with joint attention share: their layers attend to image and text tokens together."""

from typing import Any

from torch import Tensor, nn


class JointTransformer(nn.Module):
    """A transformer of diffusers. Every text token changes every other one, so all layers share one context."""

    num_layers = 1
    embeds_guidance = False
    masks_context = False

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = transformer.context_embedder.weight.dtype  # of all its weights; a wrapper adds float32 ones
        self.context_width = int(transformer.config.joint_attention_dim)


def of_branches(contexts: Tensor, branch_context: Tensor | None) -> Tensor:
    """The context of each branch: contexts [M,...] and branch_context [N,2,1] -> [N,...]. None: one context each."""
    return contexts if branch_context is None else contexts.index_select(0, branch_context[:, 0, 0])
