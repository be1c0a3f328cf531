"""The mask of a masked edit: at the picture's size, at the latents' size, and softened to paste the original back."""

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
    original = resized(request.image, settings.width, settings.height)
    if not request.mask_blur:
        return np.where(mask[..., None], image, original)
    return blended(image, original, paste_weights(mask, request.mask_blur))


def paste_weights(mask: Mask, blur: float) -> npt.NDArray[np.float32]:
    """How much of the new picture is pasted at each pixel, 0 to 1: the mask, blurred.

    The blur is A1111's: a Gaussian of standard deviation `blur`, cut off at 2.5 deviations, with the mask mirrored at
    its border. Source: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, and OpenCV's GaussianBlur.
    """
    radius = int(2.5 * blur + 0.5)
    weights = mask.astype(np.float32)
    if radius == 0:
        return weights
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / blur) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        lines = np.moveaxis(weights, axis, 0)
        padded = np.pad(lines, ((radius, radius), (0, 0)), "reflect")
        lines = np.zeros_like(lines)
        for shift, factor in enumerate(kernel):
            lines += factor * padded[shift : shift + len(lines)]
        weights = np.moveaxis(lines, 0, axis)
    return weights.clip(0, 1)


def blended(image: Image, original: Image, weights: npt.NDArray[np.float32]) -> Image:
    """`image` where a weight is 1, `original` where it is 0, a mixture in between."""
    mixture = original + weights[..., None] * (image.astype(np.float32) - original)
    return np.rint(mixture).astype(np.uint8)
