"""The linear map from latents to RGB that previews a picture without the decoder."""

from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F

from oneword.export.families import latent_channels
from oneword.export.modules import VaeDecoder
from oneword.export.source import Source
from oneword.runtime.bundle import Preview

LATENTS, SIDE = 16, 16  # the number of random latents to decode, and their height and width
COARSE = (1, 2, 4, 8)  # sides of the noise before it is enlarged: real latents vary slowly across a picture


def preview_of(source: Source) -> Preview:
    """Fits the decoder's pixels, averaged over each latent's square, by least squares on smooth random latents.

    Decodes in float32: in fp16 some processors take minutes for each latent.
    """
    generator = torch.Generator().manual_seed(0)
    channels, decoder = latent_channels(source.vae), VaeDecoder(deepcopy(source.vae).float())
    latents = torch.cat(
        [
            F.interpolate(torch.randn(1, channels, side, side, generator=generator), (SIDE, SIDE), mode="nearest")
            for side in COARSE * (LATENTS // len(COARSE))
        ]
    )
    with torch.no_grad():
        images = torch.cat([decoder(latent[None])[0] for latent in latents])
    factor = images.shape[1] // SIDE
    pixels = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, factor)
    constant = torch.ones(LATENTS, 1, SIDE, SIDE)
    features = torch.cat([latents, constant], dim=1).permute(0, 2, 3, 1).reshape(-1, channels + 1).double().numpy()
    targets = pixels.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    solution = np.linalg.lstsq(features, targets, rcond=None)[0].round(6).tolist()
    *weights, bias = (tuple(line) for line in solution)
    return Preview(tuple(weights), bias)
