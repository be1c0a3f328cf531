"""The network of FLUX.2: diffusers' own forward, with position ids and rotations inside the graph."""

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad

from oneword.export.flux import Rotations, image_ids
from oneword.export.joint import JointTransformer, of_branches


class Flux2(JointTransformer):
    """Flux2Transformer2DModel on latents that are not packed: a token is one latent of the sampler, whose channels are
    those of a square of the VAE's latents."""

    patch = 1

    def __init__(self, transformer: Flux2Transformer2DModel) -> None:
        super().__init__(transformer)
        self.in_channels = int(transformer.config.in_channels)
        transformer.pos_embed = Rotations(
            tuple(transformer.config.axes_dims_rope), float(transformer.config.rope_theta)
        )

    def forward(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: None = None,
        time_ids: None = None,
        branch_context: Tensor | None = None,
    ) -> Tensor:
        """Latents [N,C,h,w], times [N] (1000 sigma), contexts [N,T,D] (or [M,T,D] with branch_context [N,2,1]) ->
        [N,C,h,w], the direction from picture to noise."""
        context = of_branches(context, branch_context)
        _, _, h, w = sample.shape
        prediction: Tensor = self.transformer(
            hidden_states=sample.flatten(2).transpose(1, 2),
            timestep=t / 1000,  # multiplied by 1000 inside
            encoder_hidden_states=context,
            txt_ids=pad(torch.arange(context.shape[1], device=sample.device)[:, None].float(), (3, 0)),
            img_ids=pad(image_ids(h, w, sample.device), (0, 1)),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, (h, w))
