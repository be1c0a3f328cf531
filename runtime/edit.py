"""The mask of a masked edit: at the picture's size, at the latents' size, and softened to paste the original back."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import PIL.Image

from oneword.runtime.images import resized
from oneword.runtime.request import Image, Request, ResolvedSettings, scaled_mask

Mask = npt.NDArray[np.bool_]
"""[H, W]: True marks the area to regenerate."""

_EXACT_BLUR: Final = 4.0  # standard deviation in pixels; one twice as large is computed at half the size


def edit_mask(request: Request, settings: ResolvedSettings) -> Mask | None:
    """The request's mask at the size of the picture, by nearest neighbour; None if it has none."""
    if request.mask is None:
        return None
    return scaled_mask(request.mask, settings.width, settings.height)


def latent_mask(mask: Mask, factor: int) -> npt.NDArray[np.float32]:
    """The mask at the latents' size [1, h, w]: 1 where any pixel of the latent's square is marked."""
    height, width = mask.shape
    squares = mask.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(squares.any(axis=(1, 3)), np.float32)[None]


@dataclass(frozen=True, eq=False)
class Paste:
    """What a masked edit keeps of the original, whose pixels the decoder would slightly change."""

    original: Image
    weights: npt.NDArray[np.float32] | Mask
    """[H, W]: how much of the new picture is pasted at each pixel; bool if that is all or nothing."""

    @classmethod
    def of(cls, request: Request, settings: ResolvedSettings) -> Self | None:
        """That of a request; None if it keeps nothing."""
        if request.image is None or not request.paste or (mask := edit_mask(request, settings)) is None:
            return None
        original = resized(request.image, settings.width, settings.height)
        return cls(original, paste_weights(mask, request.mask_blur) if request.mask_blur else mask)

    def pasted(self, image: Image) -> Image:
        """The original with `image` pasted into it."""
        if self.weights.dtype == np.bool_:
            return np.where(self.weights[..., None], image, self.original)
        return blended(image, self.original, self.weights.astype(np.float32, copy=False))


def paste(image: Image, request: Request, settings: ResolvedSettings) -> Image:
    """The picture with the original's pixels outside the mask."""
    prepared = Paste.of(request, settings)
    return image if prepared is None else prepared.pasted(image)


def paste_weights(mask: Mask, blur: float) -> npt.NDArray[np.float32]:
    """How much of the new picture is pasted at each pixel, 0 to 1: the mask, blurred.

    The blur is A1111's: a Gaussian of standard deviation `blur`, cut off at 2.5 deviations, with the mask mirrored at
    its border. Source: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, and OpenCV's GaussianBlur.
    """
    radius = int(2.5 * blur + 0.5)
    weights = mask.astype(np.float32)
    if radius == 0 or not mask.any():
        return weights
    area = _span(mask.any(1), radius + 1), _span(mask.any(0), radius + 1)
    weights[area] = _blurred(weights[area], blur)
    return weights


def _span(line: npt.ArrayLike, margin: int) -> slice:
    """From the first True to the last one, with a margin."""
    places = np.flatnonzero(line)
    return slice(max(int(places[0]) - margin, 0), int(places[-1]) + 1 + margin)


def _blurred(weights: npt.NDArray[np.float32], blur: float) -> npt.NDArray[np.float32]:
    """A large blur is that of a smaller mask: the cost per pixel is the same for all, the error less than 0.01."""
    shrink = max(1, int(blur // _EXACT_BLUR))
    margin = int(2.5 * blur + 0.5) + (2 * shrink if shrink > 1 else 0)  # resizing reads two more small pixels
    mirrored = np.pad(weights, [(margin, margin + (-side - 2 * margin) % shrink) for side in weights.shape], "reflect")
    small = _scaled(mirrored, tuple(side // shrink for side in mirrored.shape), PIL.Image.Resampling.BOX)
    deviation = blur / shrink
    radius = int(2.5 * deviation + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        lines = np.moveaxis(small, axis, 0)
        padded = np.pad(lines, ((radius, radius), (0, 0)), "edge")
        lines = np.zeros_like(lines)
        for shift, factor in enumerate(kernel):
            lines += factor * padded[shift : shift + len(lines)]
        small = np.moveaxis(lines, 0, axis)
    blurred = _scaled(small, mirrored.shape, PIL.Image.Resampling.BICUBIC).clip(0, 1)
    height, width = weights.shape
    return blurred[margin : margin + height, margin : margin + width]


def _scaled(
    weights: npt.NDArray[np.float32], shape: tuple[int, ...], resampling: PIL.Image.Resampling
) -> npt.NDArray[np.float32]:
    if weights.shape == shape:
        return weights
    height, width = shape
    return np.asarray(PIL.Image.fromarray(np.ascontiguousarray(weights)).resize((width, height), resampling))


def blended(image: Image, original: Image, weights: npt.NDArray[np.float32]) -> Image:
    """`image` where a weight is 1, `original` where it is 0, a mixture in between."""
    mixture = original + weights[..., None] * (image.astype(np.float32) - original)
    return np.rint(mixture).astype(np.uint8)
