"""The network of FLUX.1: diffusers' own forward, with packing, position ids and rotations inside the graph."""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from oneword.export.joint import JointTransformer, of_branches


class Flux(JointTransformer):
    """FluxTransformer2DModel on unpacked latents. Its rotations are computed in float32: TensorRT has no float64."""

    patch = 2

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__(transformer)
        self.in_channels = int(transformer.config.in_channels) // self.patch**2
        self.embeds_guidance = bool(transformer.config.guidance_embeds)
        transformer.pos_embed = Rotations(tuple(transformer.config.axes_dims_rope))

    def forward(
        self,
        sample: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        time_ids: None = None,
        branch_context: Tensor | None = None,
        embedded_guidance: Tensor | None = None,
    ) -> Tensor:
        """Latents [N,C,h,w], times [N] (1000 sigma), contexts [N,T,D] (or [M,T,D] with branch_context [N,2,1]), pooled
        [N,P], embedded_guidance [N] -> [N,C,h,w], the direction from picture to noise."""
        context = of_branches(context, branch_context)
        _, c, h, w = sample.shape
        prediction: Tensor = self.transformer(
            hidden_states=packed(sample),
            timestep=t / 1000,  # multiplied by 1000 inside
            guidance=embedded_guidance,
            pooled_projections=pooled.to(sample.dtype),
            encoder_hidden_states=context,
            txt_ids=sample.new_zeros(context.shape[1], 3, dtype=torch.float32),
            img_ids=image_ids(h // 2, w // 2, sample.device),
            return_dict=False,
        )[0]
        return unpacked(prediction, c, h // 2, w // 2)


class Rotations(nn.Module):
    """FluxPosEmbed in float32: ids [tokens, axes] -> cosines and sines [tokens, D], pairs of columns alike."""

    def __init__(self, widths: tuple[int, ...], theta: float = 10_000.0) -> None:
        super().__init__()
        self.frequencies = nn.ParameterList(
            nn.Parameter((theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)).float(), False)
            for width in widths
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.cat([ids[:, i, None].float() * f.float() for i, f in enumerate(self.frequencies)], dim=1)
        angles = angles[:, :, None].expand(-1, -1, 2).flatten(1)
        return angles.cos(), angles.sin()


def packed(sample: Tensor) -> Tensor:
    """Latents [N,C,h,w] as tokens [N,hw/4,4C], each a square of four latents."""
    n, c, h, w = sample.shape
    return sample.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, channels: int, rows: int, columns: int) -> Tensor:
    """Tokens [N,rows * columns,4C] as latents [N,C,h,w]."""
    squares = tokens.unflatten(1, (rows, columns)).unflatten(3, (channels, 2, 2))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows * columns, 3]: 0, the row and the column of each image token."""
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device, dtype=torch.float32)[None].expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=2).flatten(0, 1)
