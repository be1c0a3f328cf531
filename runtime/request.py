"""What to generate: `Request`, and `resolve`, which fills in a bundle's defaults.

Checks everything in a request except the words and token counts of its prompts, which need the tokenizers, and what a
scheduler's config rules out, which `make_schedule` checks. Nothing is loaded or computed.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import BundleError, UsageError, one_of
from oneword.runtime.bundle import Manifest
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import check_prompt
from oneword.runtime.prompt_schedule import prompts_by_step
from oneword.runtime.samplers import CFG_PP_SCALE, MAX_CFG_PP_SCALE, Guidance, Sampler, Schedule, make_schedule
from oneword.runtime.spacing import Spacing

Image: TypeAlias = npt.NDArray[np.uint8]
"""[H, W, 3]"""

MAX_IMAGES = 1024
MAX_STEPS = 1000
MAX_PIXELS = 1 << 24  # 4096 x 4096
MAX_MASK_BLUR = 64
MAX_EMBEDDED_GUIDANCE = 50.0  # networks multiply it by 1,000, which must stay within fp16

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True, eq=False)
class Request:
    """One or more pictures from one prompt. None means the bundle's default; picture i has the seed `seed + i`.

    With `image` that picture is edited: `strength` is how much of it is first replaced by noise. With `mask` only the
    area where it is True, or at least 128, is regenerated, as in Blended Latent Diffusion (arXiv 2206.02779).

    Raises UsageError, one line that says what was given and what is allowed.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    num_images: int = 1
    steps: int | None = None
    sampler: Sampler | str | None = None
    """A `Sampler` or its name."""
    spacing: Spacing | str | None = None
    """A `Spacing` of the sampler's steps, or its name; None means that of the model's scheduler."""
    guidance: Guidance | str = Guidance.CFG
    """A `Guidance` or its name. With cfg++ the guidance scale is 0 to 2, 0.6 if it is left out."""
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    """The guidance scale that a guidance-distilled model takes as an input; refused by other models."""
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    """Only steps with low < sigma / alpha <= high are guided (arXiv 2404.07724); None guides all. A flow model's first
    step is at infinity."""
    eta: float = 0.0
    """Noise that DDIM adds in each step, 0 to 1; must be 0 for other samplers."""
    clip_skip: int = 0
    """Last layers of the text encoder to skip, as in diffusers; A1111 counts one more."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None means those of `image`, else the bundle's."""
    image: Image | None = None
    strength: float = 0.8
    mask: npt.NDArray[Any] | None = None
    """[H, W], bool or uint8, of the size of `image`."""
    previews: int | frozenset[int] = 0
    """Number of steps between previews, or the steps that have one; 0 means none. The last step never has one."""
    paste: bool = True
    """Whether to copy the pixels of `image` back outside the mask; False keeps the decoder's output there."""
    mask_blur: float = 0.0
    """Softens the mask's edge where the picture is pasted into `image`: a Gaussian's standard deviation in pixels of
    the picture, up to 64, as in A1111. What the model regenerates stays the mask itself."""
    draft: bool = False
    """Whether to decode with the bundle's preview decoder, which is faster and less exact; refused if it has none."""
    words: Mapping[str, Concept] | None = None
    """The learned words that the prompts may use, by token; None: those that are loaded in the model."""

    def __post_init__(self) -> None:
        for name, value in [*vars(self).items()]:
            object.__setattr__(self, name, _plain(value))
        check_prompt(self.prompt)
        if self.negative_prompt is not None:
            check_prompt(self.negative_prompt, "negative prompt")
        if self.sampler is not None:
            object.__setattr__(self, "sampler", _known("sampler", self.sampler, Sampler))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", _known("spacing", self.spacing, Spacing))
        object.__setattr__(self, "guidance", _known("guidance", self.guidance, Guidance))
        _within("seed", self.seed, 0, 2**63 - 1, integer=True)
        _within("num_images", self.num_images, 1, MAX_IMAGES, integer=True)
        if self.steps is not None:
            _within("steps", self.steps, 1, MAX_STEPS, integer=True)
        if self.guidance_scale is not None:
            _within("guidance_scale", self.guidance_scale, 0, 100)
        if self.embedded_guidance is not None:
            _within("embedded_guidance", self.embedded_guidance, 0, MAX_EMBEDDED_GUIDANCE)
        _within("guidance_rescale", self.guidance_rescale, 0, 1)
        _within("eta", self.eta, 0, 1)
        _within("clip_skip", self.clip_skip, 0, 100, integer=True)
        _within("strength", self.strength, 0, 1)
        for step in self.previews if isinstance(self.previews, frozenset) else (self.previews,):
            _within("previews", step, 0, MAX_STEPS, integer=True)
        _within("mask_blur", self.mask_blur, 0, MAX_MASK_BLUR)
        if self.guidance_interval is not None:
            _check_pair("guidance_interval", self.guidance_interval)
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise UsageError(
                    f"guidance_interval is {low:g} to {high:g}, but must start at 0 or more and end higher"
                )
        if self.size is not None:
            _check_pair("size", self.size, integer=True)
        if self.image is not None:
            _check_image(self.image)
            if self.strength == 0:
                raise UsageError("strength is 0, which changes nothing: it must be more than 0 and at most 1")
        if self.mask is not None:
            _check_mask(self.mask, self.image)

    def has_preview(self, step: int) -> bool:
        """Whether to show the picture after this step, the first being 1."""
        if isinstance(self.previews, frozenset):
            return step in self.previews
        return self.previews > 0 and step % self.previews == 0


@dataclass(frozen=True)
class ResolvedSettings:
    """A request's numbers with the bundle's defaults filled in, and its schedule."""

    steps: int
    sampler: Sampler
    guidance_scale: float
    width: int
    height: int
    schedule: Schedule
    embedded_guidance: float | None = None
    """None for a model that does not take one."""
    prompts: Sequence[str] = ()
    """[S]: the text of the prompt in each step."""
    negative_prompts: Sequence[str] | None = None
    """[S]; None if the request has none."""

    @property
    def texts(self) -> list[str]:
        """All texts of both prompts, each once."""
        return [*dict.fromkeys([*self.prompts, *(self.negative_prompts or ())])]


def resolve(request: Request, manifest: Manifest) -> ResolvedSettings:
    """Fills in the bundle's defaults; needs only its manifest.

    Raises UsageError for settings that the model does not support, BundleError for an unknown default sampler.
    """
    defaults = manifest.defaults
    width, height = _size(request, manifest)
    sampler = _default_sampler(defaults.sampler) if request.sampler is None else Sampler(request.sampler)
    if request.eta > 0 and sampler is not Sampler.DDIM:
        raise UsageError(f"eta is {request.eta:g} with the sampler {sampler}, but must be 0: only ddim allows more")
    for encoder in manifest.encoders:
        if encoder.default_layer is not None and encoder.default_layer - request.clip_skip not in encoder.layers:
            limit = encoder.default_layer - min(encoder.layers)
            raise UsageError(f"clip_skip is {request.clip_skip}, this model allows 0 to {limit}")
    if request.clip_skip and all(encoder.default_layer is None for encoder in manifest.encoders):
        raise UsageError(f"clip_skip is {request.clip_skip}, but must be 0: this model's encoders skip no layers")
    if request.image is not None and "vae_encoder" not in manifest.graphs:
        raise UsageError("this bundle has no vae_encoder, so it cannot edit pictures: export it again with ti-export")
    if request.draft and not manifest.has_preview_decoder:
        raise UsageError(
            "draft needs a preview decoder, which this bundle does not have: leave it out, or export the bundle again "
            "with ti-export --preview"
        )
    _check_scaled_mask(request.mask, width, height)
    steps = defaults.steps if request.steps is None else request.steps
    guidance_scale = _guidance_scale(request, defaults.guidance_scale)
    embedded_guidance = defaults.embedded_guidance
    if request.embedded_guidance is not None:
        if embedded_guidance is None:
            raise UsageError("this model takes no embedded_guidance: use guidance_scale")
        embedded_guidance = request.embedded_guidance
    schedule = make_schedule(
        manifest.scheduler,
        sampler,
        steps,
        guidance_scale=guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        guidance_interval=request.guidance_interval,
        strength=1.0 if request.image is None else request.strength,
        kind=manifest.schedule,
        image_tokens=height // manifest.size_multiple * (width // manifest.size_multiple),
        embedded_guidance=embedded_guidance or 0.0,
        spacing=None if request.spacing is None else Spacing(request.spacing),
        guidance=Guidance(request.guidance),
    )
    schedule.check(manifest.columns)
    negative = request.negative_prompt
    return ResolvedSettings(
        steps,
        sampler,
        guidance_scale,
        width,
        height,
        schedule,
        embedded_guidance,
        prompts_by_step(request.prompt, schedule.steps),
        None if negative is None else prompts_by_step(negative, schedule.steps),
    )


def _size(request: Request, manifest: Manifest) -> tuple[int, int]:
    """Width and height: the request's, else those of its image rounded down, else the bundle's."""
    defaults, factor = manifest.defaults, manifest.size_multiple
    if request.size is not None:
        width, height = request.size
    elif request.image is not None:
        h, w = request.image.shape[:2]
        if min(h, w) < factor:
            raise UsageError(
                f"the image is {w}x{h}, but must have at least {factor} pixels per side: enlarge it, or set the size"
            )
        height, width = h - h % factor, w - w % factor
    else:
        width, height = defaults.size
    for name, side in (("width", width), ("height", height)):
        if side < factor or side % factor:
            nearest = max(factor, round(side / factor) * factor)
            raise UsageError(f"size {width}x{height}: {name} must be a multiple of {factor}, for example {nearest}")
    if manifest.max_side is not None and max(width, height) > manifest.max_side:
        raise UsageError(f"size {width}x{height}: this model allows up to {manifest.max_side} pixels per side")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"size {width}x{height} has {width * height} pixels, but may have at most {MAX_PIXELS}: choose a smaller "
            "size"
        )
    return width, height


def _guidance_scale(request: Request, default: float) -> float:
    """The request's guidance scale, else the default one of its kind of guidance."""
    plus_plus = request.guidance is Guidance.CFG_PP
    if request.guidance_scale is None:
        return CFG_PP_SCALE if plus_plus else default
    if plus_plus and request.guidance_scale > MAX_CFG_PP_SCALE:
        raise UsageError(
            f"guidance_scale is {request.guidance_scale:g} with cfg++, but must be 0 to {MAX_CFG_PP_SCALE:g}: "
            f"{CFG_PP_SCALE:g} is usual"
        )
    return request.guidance_scale


def _known(field: str, name: str, choices: type[Choice]) -> Choice:
    try:
        return choices(name)
    except ValueError:
        raise UsageError(f"{field} is {name!r}, but must be {one_of(choices)}") from None


def _default_sampler(name: str) -> Sampler:
    try:
        return Sampler(name)
    except ValueError:
        raise BundleError(
            f"bundle.json names {name!r} as the default sampler, but must name {one_of(Sampler)}"
        ) from None


def _check_pair(name: str, pair: Any, integer: bool = False) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UsageError(f"{name} is {pair!r}, but must be two {'whole ' if integer else ''}numbers")
    for value in pair:
        _check_number(name, value, integer)


def _check_number(name: str, value: Any, integer: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise UsageError(f"{name} is {value!r}, but must be a {'whole ' if integer else ''}number")
    if abs(value) > sys.float_info.max and value not in (math.inf, -math.inf):
        raise UsageError(f"{name} has more than 300 digits: give a smaller number")


def _within(name: str, value: float, low: float, high: float, integer: bool = False) -> None:
    _check_number(name, value, integer)
    if not low <= value <= high:  # false for NaN
        raise UsageError(f"{name} is {value}, but must be {low} to {high}")


def _plain(value: Any) -> Any:
    """The value with Python's numbers in place of numpy's: a seed from its generator, for one."""
    if isinstance(value, np.generic):
        return value.item()
    return type(value)(map(_plain, value)) if type(value) in (tuple, frozenset) else value


def _check_array(name: str, value: Any, allowed: str) -> None:
    if not isinstance(value, np.ndarray):
        raise UsageError(f"{name} is of type {type(value).__name__}, but must be a numpy array of {allowed}")


def _check_image(image: Image) -> None:
    _check_array("image", image, "uint8 [H, W, 3], as oneword.runtime.images.read_image returns")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UsageError(f"image is {image.dtype} {list(image.shape)}, but must be uint8 [H, W, 3]")


def scaled_mask(mask: npt.NDArray[Any], width: int, height: int) -> npt.NDArray[np.bool_]:
    """A request's mask [H, W] at another size, by nearest neighbour: True where the picture is regenerated."""
    rows, columns = (np.arange(to) * side // to for side, to in zip(mask.shape, (height, width), strict=True))
    return _white(mask[np.ix_(rows, columns)])


def _check_scaled_mask(mask: npt.NDArray[Any] | None, width: int, height: int) -> None:
    if mask is None or mask.shape == (height, width) or scaled_mask(mask, width, height).any():
        return
    raise UsageError(
        f"the mask is all black at {width}x{height}, so it would change nothing: paint a larger area white, or choose "
        "a larger size"
    )


def _white(mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(mask if mask.dtype == np.bool_ else mask >= 128)


def _check_mask(mask: npt.NDArray[Any], image: Image | None) -> None:
    if image is None:
        raise UsageError("a mask was given without an image: add the image it belongs to")
    _check_array("mask", mask, "uint8 or bool [H, W]")
    if mask.dtype not in (np.uint8, np.bool_) or mask.ndim != 2:
        raise UsageError(f"mask is {mask.dtype} {list(mask.shape)}, but must be uint8 or bool [H, W]")
    if mask.shape != image.shape[:2]:
        (height, width), (h, w) = image.shape[:2], mask.shape
        raise UsageError(f"the mask is {w}x{h}, the image {width}x{height}: they must have the same size")
    if not _white(mask).any():
        raise UsageError("the mask is all black, so it would change nothing: paint the area to regenerate white")
