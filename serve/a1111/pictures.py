"""A1111's picture geometry: its resize modes, and the crop around a mask that is pasted back afterwards.

Pure arrays: no requests, no files. Pictures are resized by Lanczos, masks by nearest neighbour, so that they stay
binary. Source: AUTOMATIC1111/stable-diffusion-webui, modules/images.py (`resize_image`) and modules/masking.py
(`expand_crop_region`).
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFilter

from oneword.runtime.edit import Mask, blended, paste_weights
from oneword.runtime.images import resized
from oneword.runtime.request import Image, scaled_mask

Pixels: TypeAlias = npt.NDArray[Any]
"""A picture [H, W, 3] or a mask [H, W]"""

_FILL_RADII = (256, 64, 16, 4, 2)  # pixels


@dataclass(frozen=True, eq=False)
class Crop:
    """The part of a picture that is regenerated at a size of its own, and how it is pasted back."""

    original: Image
    weights: npt.NDArray[np.float32]
    """[H, W] of `original`: how much of the new picture is pasted at each pixel."""
    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def around(cls, mask: Mask, original: Image, *, blur: float, padding: int, size: tuple[int, int]) -> "Crop":
        """The blurred mask's bounds and `padding` pixels around them, grown to the aspect ratio of `size`.

        At the picture's border the crop is moved, then cut off. The mask must have a white pixel.
        """
        weights = paste_weights(mask, blur)
        height, width = mask.shape
        visible = mask | (np.rint(weights * 255) > 0)  # a wide blur leaves nothing of a small mask
        (top, bottom), (left, right) = (_bounds(visible.any(axis)) for axis in (1, 0))
        left, right = max(left - padding, 0), min(right + padding, width)
        top, bottom = max(top - padding, 0), min(bottom + padding, height)
        if (right - left) * size[1] > (bottom - top) * size[0]:
            top, bottom = _grown(top, bottom, round((right - left) * size[1] / size[0]), height)
        else:
            left, right = _grown(left, right, round((bottom - top) * size[0] / size[1]), width)
        return cls(original, weights, left, top, right, bottom)

    def cut(self, pixels: Pixels) -> Pixels:
        """This part of a picture or mask."""
        return pixels[self.top : self.bottom, self.left : self.right]

    def pasted(self, image: Image) -> Image:
        """The original with `image`, at any size, blended into this part."""
        result = self.original.copy()
        patch = covering(image, self.right - self.left, self.bottom - self.top)
        self.cut(result)[:] = blended(patch, self.cut(self.original), self.cut(self.weights))
        return result


def covering(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize mode 1: scaled until it covers the size, then cut off equally on both sides."""
    h, w = pixels.shape[:2]
    scale = max(width / w, height / h)
    scaled = _scaled(pixels, max(width, round(w * scale)), max(height, round(h * scale)))
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return scaled[top : top + height, left : left + width]


def filling(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize mode 2: scaled until it fits into the size, then filled up with its own outermost pixels."""
    h, w = pixels.shape[:2]
    scale = min(width / w, height / h)
    scaled = _scaled(pixels, min(width, max(1, round(w * scale))), min(height, max(1, round(h * scale))))
    missing = height - scaled.shape[0], width - scaled.shape[1]
    margins = [(side // 2, side - side // 2) for side in missing] + [(0, 0)] * (pixels.ndim - 2)
    return np.pad(scaled, margins, "edge")


def filled(image: Image, mask: Mask) -> Image:
    """Inpainting fill 0: the mask's area in the colours around it, which fade into each other the deeper it is.

    Each blur of what is outside the mask covers the coarser ones as far as it reaches into the area.
    """
    outside = ~mask[..., None]
    area: npt.NDArray[Any] = np.zeros(image.shape, np.float32)
    area += image[~mask].mean(0) if outside.any() else 128
    premultiplied = PIL.Image.fromarray(np.concatenate([image * outside, 255 * outside.astype(np.uint8)], 2))
    for radius in _FILL_RADII:
        blurred = np.asarray(premultiplied.filter(PIL.ImageFilter.GaussianBlur(radius)), np.float32)
        area = blurred[..., :3] + area * (1 - blurred[..., 3:] / 255)
    return np.where(outside, image, np.rint(area).clip(0, 255).astype(np.uint8))


def _scaled(pixels: Pixels, width: int, height: int) -> Pixels:
    return resized(pixels, width, height) if pixels.ndim == 3 else scaled_mask(pixels, width, height)


def _bounds(line: npt.ArrayLike) -> tuple[int, int]:
    """The first True, and one after the last."""
    places = np.flatnonzero(line)
    return int(places[0]), int(places[-1]) + 1


def _grown(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """start..end grown to `length` on both sides and moved into 0..limit; all of that if it is not longer."""
    length = min(max(length, end - start), limit)
    start = min(max(start - (length - (end - start)) // 2, 0), limit - length)
    return start, start + length
