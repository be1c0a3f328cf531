"""The network of Stable Diffusion 3 and 3.5 (arXiv 2403.03206): diffusers' own forward, with a pool of contexts."""

from diffusers import SD3Transformer2DModel
from torch import Tensor

from oneword.export.joint import JointTransformer, of_branches


class StableDiffusion3(JointTransformer):
    """SD3Transformer2DModel."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__(transformer)
        self.in_channels = int(transformer.config.in_channels)
        self.patch = int(transformer.config.patch_size)

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
        context = of_branches(context, branch_context)
        prediction: Tensor = self.transformer(
            hidden_states=sample,
            timestep=t,
            encoder_hidden_states=context,
            pooled_projections=pooled.to(sample.dtype),
            return_dict=False,
        )[0]
        return prediction
