"""The pictures a word is learned from: read, turned upright, cropped to the model's size, and encoded once.

A folder's pictures are its files with an image suffix, sorted by name. `name.txt` beside `name.png` is its caption, and
`name.mask.png` and the alpha channel mark the part that counts. Other files are ignored. Not covered: learning and
noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageChops
from torch.nn.functional import interpolate

from oneword.engines.errors import FileError, NotFinite, UsageError
from oneword.export.modules import VaeEncoder
from oneword.runtime.images import on_white, open_picture

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg", ".jfif")
MIN_SIDE = 16
MASK_ENDING = ".mask.png"


@dataclass(frozen=True)
class Picture:
    """One picture at a size that the model accepts: `pixels` [H, W, 3] uint8 and `mask` [H, W] float32, 0 to 1, if any.

    `digest` is the sha256 of the files it was read from; `caption` is the text of `name.txt`, stripped.
    """

    path: Path
    pixels: np.ndarray
    mask: np.ndarray | None
    caption: str | None
    digest: str


@dataclass(frozen=True)
class Crop:
    """The `share` of both sides that is kept, and its position: 0 is left or top, 1 is right or bottom."""

    share: float = 1.0
    right: float = 0.5
    down: float = 0.5


WHOLE = Crop()


@dataclass(frozen=True)
class Moments:
    """The VAE's posteriors, `mean` and `std` [C, h, w] float32, scaled and shifted for the network.

    Those of the `pictures` pictures come first, followed by those of their crops and mirror images in the same order.
    `masks` [1, h, w] float32 weight the loss; None if everything counts.
    """

    pictures: int
    mean: Sequence[torch.Tensor]
    std: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor] | None


def read_pictures(folder: Path, size: int, *, step: int | None = None) -> list[Picture]:
    """Reads every picture in `folder`, by name, cropped to `size` x `size`, or with `step` to one of `shapes`.

    Raises `UsageError` if there is no folder or no picture in it, `FileError` naming a file that cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give a folder of pictures of the word (three to five are usual)")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and path.name[0] != "."]
    masks = [path for path in files if path.stem.lower().endswith(".mask")]
    paths = [path for path in files if path not in masks]
    unread = unread_pictures(folder)
    if not paths:
        fix = f"put three to five in it ({', '.join(ENDINGS)})"
        if unread:
            fix = f"convert {', '.join(unread)} to PNG or JPEG"
        raise UsageError(f"{folder} has no pictures that can be read: {fix}")
    names = {path.stem + MASK_ENDING for path in [*paths, *map(Path, unread)]}
    if unused := [path for path in masks if path.name not in names]:
        raise FileError(
            f"{unused[0]} is the mask of no picture, but must be named after one: NAME{MASK_ENDING} beside NAME.png"
        )
    return [read_picture(path, size, step=step) for path in paths]


def unread_pictures(folder: Path) -> list[str]:
    """The names of picture files in formats that are not supported."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in UNREAD)


def read_picture(path: Path, size: int, *, step: int | None = None, crop: Crop = WHOLE) -> Picture:
    """Reads one picture, or a crop of it, with its caption and mask. Raises as `read_pictures` does."""
    image = _open(path)
    colours, alpha = _as_rgb(image)
    mask_path = path.with_name(path.stem + MASK_ENDING)
    caption_path = path.with_suffix(".txt")
    files = [file for file in (path, mask_path, caption_path) if file.is_file()]
    mask = alpha
    if mask_path in files:
        mask = _open(mask_path).convert("L")
        if mask.size != colours.size:
            sizes = f"{mask.width}x{mask.height}, its picture {colours.width}x{colours.height}"
            raise FileError(f"{mask_path} is {sizes}: give a mask of the picture's size")
        mask = mask if alpha is None else ImageChops.multiply(mask, alpha)
    shape = nearest_shape(colours.height / colours.width, shapes(size, step)) if step else (size, size)
    return Picture(
        path,
        np.asarray(_cut(colours, shape, crop)),
        None if mask is None else np.asarray(_cut(mask, shape, crop), np.float32) / 255,
        _read_caption(caption_path) if caption_path in files else None,
        hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest(),
    )


def random_crops(
    pictures: Sequence[Picture], count: int, seed: int, size: int, *, step: int | None = None
) -> list[Picture]:
    """Reads all pictures `count` more times, each time cropped to a random 80 to 100 % of their sides."""
    rng = np.random.default_rng(seed)
    return [
        read_picture(picture.path, size, step=step, crop=Crop(rng.uniform(0.8, 1), rng.uniform(), rng.uniform()))
        for _ in range(count)
        for picture in pictures
    ]


def shapes(size: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths: multiples of `step` from half to twice `size`, each pair as large as `size`^2 allows.

    These are the buckets of NovelAI's and kohya's trainers. `step` is the factor by which the VAE and the network
    together reduce a side.
    """
    sides = range(max(step, -(-size // 2 // step) * step), 2 * size + 1, step)
    widest = {side: min(size * size // side // step * step, 2 * size) for side in sides}
    return sorted(
        {shape for height, width in widest.items() for shape in ((height, width), (width, height)) if width >= step}
    )


def nearest_shape(aspect: float, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width whose ratio is nearest to `aspect`; the larger shape in a tie."""
    return min(allowed, key=lambda shape: (round(abs(math.log(shape[0] / shape[1] / aspect)), 9), -shape[0] * shape[1]))


def _open(path: Path) -> Image.Image:
    """Opens a picture as `open_picture` does. Raises UsageError also for a pipe, FileError also if it is too small."""
    if path.is_fifo():  # reading it would wait
        raise UsageError(f"{path} is not a file: remove it, or put a picture in its place")
    image = open_picture(path)
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise FileError(f"{path} is {size}: too small to learn from, give at least {MIN_SIDE} pixels per side")
    return image


def _as_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB over white, and the alpha channel if any of it is not opaque."""
    if not image.has_transparency_data:
        return on_white(image), None
    alpha = image.convert("RGBA").getchannel("A")
    return on_white(image), None if alpha.getextrema()[0] == 255 else alpha


def _cut(image: Image.Image, shape: tuple[int, int], crop: Crop) -> Image.Image:
    """A crop of the largest centred part of the given shape, resized as in the paper's code (bicubic, antialiased)."""
    height, width = shape
    scale = min(image.height / height, image.width / width)
    tall, wide = height * scale, width * scale
    top = (image.height - tall) // 2 + crop.down * tall * (1 - crop.share)
    left = (image.width - wide) // 2 + crop.right * wide * (1 - crop.share)
    box = (left, top, left + wide * crop.share, top + tall * crop.share)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _read_caption(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: save it as UTF-8") from error


@torch.no_grad()
def encode_moments(
    vae: AutoencoderKL, pictures: Sequence[Picture], crops: Sequence[Picture] = (), *, flip: bool = False
) -> Moments:
    """Encodes the pictures once for the whole run; with `flip`, the mirrored pictures follow.

    A latent is `mean + std * eps`; both include the VAE's scaling factor and shift. `crops` are crops of `pictures` in
    the same order, once or several times.
    """
    views = [(view.pixels, view.mask) for view in (*pictures, *crops)]
    if flip:
        views += [(pixels[:, ::-1], None if mask is None else mask[:, ::-1]) for pixels, mask in views]
    encoder = VaeEncoder(vae)
    means, stds, masks = [], [], []
    for place, (pixels, mask) in enumerate(views):
        mean, std, finite = encoder(torch.from_numpy(pixels.copy())[None])
        if not finite.all():
            bad = pictures[place % len(pictures)].path
            raise NotFinite(f"{bad}: the VAE gives NaN for it: its weights are damaged or overflow, use another model")
        whole = np.ones(pixels.shape[:2], np.float32) if mask is None else mask.copy()
        masks.append(interpolate(torch.from_numpy(whole)[None, None], mean.shape[-2:], mode="area")[0])
        means.append(mean[0])
        stds.append(std[0])
    any_masked = any(mask is not None for _, mask in views)
    return Moments(len(pictures), means, stds, masks if any_masked else None)


def near_duplicates(pictures: Sequence[Picture]) -> list[tuple[Path, Path]]:
    """Pairs of pictures that differ by less than two grey levels when shrunk to 16x16: duplicates add nothing."""
    small = [
        np.asarray(Image.fromarray(picture.pixels).resize((16, 16), Image.Resampling.BOX), np.float32)
        for picture in pictures
    ]
    return [
        (pictures[i].path, pictures[j].path)
        for i in range(len(pictures))
        for j in range(i + 1, len(pictures))
        if np.abs(small[i] - small[j]).mean() < 2
    ]
