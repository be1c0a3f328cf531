"""The mask of a masked edit: at the picture's size, at the latents' size, and to paste the original back."""

import numpy as np
import numpy.typing as npt

from oneword.runtime.images import resized
from oneword.runtime.request import Image, Request, ResolvedSettings

Mask = npt.NDArray[np.bool_]
"""[H, W]: True marks the area to regenerate."""


def edit_mask(request: Request, settings: ResolvedSettings) -> Mask | None:
    """The request's mask at the size of the picture, by nearest neighbour; None if it has none."""
    if request.mask is None:
        return None
    white = request.mask if request.mask.dtype == np.bool_ else request.mask >= 128
    height, width = white.shape
    rows = np.arange(settings.height) * height // settings.height
    columns = np.arange(settings.width) * width // settings.width
    return np.asarray(white[np.ix_(rows, columns)])


def latent_mask(mask: Mask, factor: int) -> npt.NDArray[np.float32]:
    """The mask at the latents' size [1, h, w]: 1 where any pixel of the latent's square is marked."""
    height, width = mask.shape
    squares = mask.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(squares.any(axis=(1, 3)), np.float32)[None]


def paste(image: Image, request: Request, settings: ResolvedSettings) -> Image:
    """The picture with the original's pixels outside the mask, which the decoder would slightly change."""
    mask = edit_mask(request, settings)
    if mask is None or request.image is None or not request.paste:
        return image
    return np.where(mask[..., None], image, resized(request.image, settings.width, settings.height))
