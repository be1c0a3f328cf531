"""The network of Stable Diffusion 3 and 3.5 (arXiv 2403.03206): diffusers' own forward, with a pool of contexts."""

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn


class StableDiffusion3(nn.Module):
    """SD3Transformer2DModel. Every layer attends to image and text tokens together, so all layers share one context."""

    num_layers = 1
    embeds_guidance = False
    masks_context = False

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = transformer.dtype
        self.in_channels = int(transformer.config.in_channels)
        self.patch = int(transformer.config.patch_size)
        self.context_width = int(transformer.config.joint_attention_dim)

    def forward(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        time_ids: None = None,
        branch_context: Tensor | None = None,
    ) -> Tensor:
        """Latents [N,C,h,w], times [N] (1000 sigma), contexts [N,T,D] (or [M,T,D] with branch_context [N,2,1]), pooled
        [N,P] -> [N,C,h,w], the direction from picture to noise."""
        if branch_context is not None:
            context = context.index_select(0, branch_context[:, 0, 0])
        prediction: Tensor = self.transformer(
            hidden_states=sample,
            timestep=t,
            encoder_hidden_states=context,
            pooled_projections=pooled.to(sample.dtype),
            return_dict=False,
        )[0]
        return prediction
