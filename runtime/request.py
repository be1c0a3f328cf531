"""What one picture, or a few of one prompt, shall be: `Request`. Settings only; nothing is loaded or computed here."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import BundleError, UsageError
from oneword.runtime.bundle import Manifest
from oneword.runtime.samplers import Sampler

Image: TypeAlias = npt.NDArray[np.uint8]
"""[H, W, 3]"""

MAX_IMAGES = 1024
MAX_STEPS = 1000
MAX_PIXELS = 1 << 24  # 4096 x 4096
MAX_PROMPT = 20_000


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt's pictures. What is None is the bundle's default; picture i has the seed `seed + i`.

    With `image` the picture is edited: `strength` says how much of the way to noise it is sent back. With `mask`
    (255 or True: make anew, 0: keep) only that part is, as Blended Latent Diffusion does (arXiv 2206.02779).

    Raises UsageError with one line that says what was given and what is allowed.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    num_images: int = 1
    steps: int | None = None
    sampler: Sampler | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    """Steps are guided where low < sigma / alpha <= high (arXiv 2404.07724); None guides all."""
    eta: float = 0.0
    clip_skip: int = 0
    """Last layers of the text encoder that are not run, as in diffusers; A1111 counts one more."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: those of `image`, else the bundle's."""
    image: Image | None = None
    strength: float = 0.8
    mask: npt.NDArray[Any] | None = None
    """[H, W], bool or uint8, as large as `image`."""
    previews: int = 0
    """A preview after every so many steps; 0: none."""
    paste: bool = True
    """Outside the mask the pixels are those of `image`; False leaves what the decoder makes of them."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is not None and len(text) > MAX_PROMPT:
                raise UsageError(f"the {name} has {len(text)} characters, allowed are {MAX_PROMPT}")
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise UsageError(f"the {name} is not valid Unicode: it holds half of a surrogate pair")
        _within("seed", self.seed, 0, 2**63 - 1, whole=True)
        _within("num_images", self.num_images, 1, MAX_IMAGES, whole=True)
        if self.steps is not None:
            _within("steps", self.steps, 1, MAX_STEPS, whole=True)
        if self.guidance_scale is not None:
            _within("guidance_scale", self.guidance_scale, 0, 100)
        _within("guidance_rescale", self.guidance_rescale, 0, 1)
        _within("eta", self.eta, 0, 1)
        _within("clip_skip", self.clip_skip, 0, 100, whole=True)
        _within("strength", self.strength, 0, 1)
        _within("previews", self.previews, 0, MAX_STEPS, whole=True)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            _within("guidance_interval", low, 0, 1e9)
            _within("guidance_interval", high, low, 1e9)
        if self.image is not None:
            _check_image(self.image)
            if self.strength == 0:
                raise UsageError("strength is 0, which changes nothing: allowed is more than 0, up to 1")
        if self.mask is not None:
            _check_mask(self.mask, self.image)


@dataclass(frozen=True)
class Settings:
    """A request's numbers once the bundle's defaults stand where it said nothing."""

    steps: int
    sampler: Sampler
    guidance_scale: float
    width: int
    height: int


def settle(request: Request, manifest: Manifest) -> Settings:
    """Fills in the bundle's defaults. Raises UsageError for a size that this model cannot make."""
    defaults, factor = manifest.defaults, manifest.vae.factor
    if request.size is not None:
        width, height = request.size
    elif request.image is not None:
        height, width = (side - side % factor for side in request.image.shape[:2])
    else:
        width, height = defaults.width, defaults.height
    for name, side in (("width", width), ("height", height)):
        if side < factor or side % factor:
            nearest = max(factor, round(side / factor) * factor)
            raise UsageError(f"size {width}x{height}: {name} must be a multiple of {factor}, for example {nearest}")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"size {width}x{height} has {width * height} pixels, allowed are {MAX_PIXELS}: give a smaller size"
        )
    return Settings(
        steps=defaults.steps if request.steps is None else request.steps,
        sampler=_sampler(defaults.sampler) if request.sampler is None else request.sampler,
        guidance_scale=defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        width=width,
        height=height,
    )


def _sampler(name: str) -> Sampler:
    try:
        return Sampler(name)
    except ValueError:
        names = ", ".join(sampler.value for sampler in Sampler)
        raise BundleError(f"bundle.json names the sampler {name!r} as default, there are {names}") from None


def _within(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UsageError(f"{name} is {value!r}, allowed is a {'whole ' if whole else ''}number")
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} is {value}, allowed is {low} to {high}")


def _check_image(image: Image) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UsageError(f"image is {image.dtype} {list(image.shape)}, allowed is uint8 [H, W, 3]")


def _check_mask(mask: npt.NDArray[Any], image: Image | None) -> None:
    if image is None:
        raise UsageError("a mask was given without an image: give the image it belongs to")
    if mask.dtype not in (np.uint8, np.bool_) or mask.ndim != 2:
        raise UsageError(f"mask is {mask.dtype} {list(mask.shape)}, allowed is uint8 or bool [H, W]")
    if mask.shape != image.shape[:2]:
        (height, width), (h, w) = image.shape[:2], mask.shape
        raise UsageError(f"the mask is {w}x{h}, the image {width}x{height}: they must be of one size")
    if not mask.any():
        raise UsageError("the mask is all black, so nothing would change: paint white what shall be made anew")
