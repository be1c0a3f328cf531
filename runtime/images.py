"""Reads untrusted pictures safely, and writes PNGs with A1111's `parameters` text, whole or not at all."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
from PIL.PngImagePlugin import PngInfo

from oneword.engines.errors import FileError, OnewordError, UsageError, one_line, one_of
from oneword.engines.files import write_whole
from oneword.runtime.bundle import Preview
from oneword.runtime.request import Image, Request, ResolvedSettings
from oneword.runtime.samplers import Guidance, Sampler
from oneword.runtime.spacing import Spacing

_MAX_BYTES = 256 << 20
_MAX_PIXELS = 120_000_000  # of a file; generated pictures are limited by request.MAX_PIXELS
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # none that runs another program
_TOPS = {"I": (255, 65535), "F": (1, 255, 65535)}  # possible values of white in modes without a fixed range
_PNG_LEVEL = 1  # a picture of 1024x1024 takes 83 ms, not 243 as with Pillow's 6; its file is 16 % larger
A1111_SAMPLERS = {
    Sampler.DDIM: "DDIM",
    Sampler.DDPM: "DDPM",
    Sampler.EULER: "Euler",
    Sampler.EULER_A: "Euler a",
    Sampler.DPMPP_2M: "DPM++ 2M",
    Sampler.DPMPP_2M_KARRAS: "DPM++ 2M Karras",
    Sampler.DPMPP_2M_SDE: "DPM++ 2M SDE",
    Sampler.LCM: "LCM",
    Sampler.HEUN: "Heun",
    Sampler.DPM2_A: "DPM2 a",
    Sampler.DPMPP_2S_A: "DPM++ 2S a",
    Sampler.DPMPP_3M_SDE: "DPM++ 3M SDE",
    Sampler.UNIPC: "UniPC",
}
A1111_SPACINGS = {
    Spacing.KARRAS: "Karras",
    Spacing.EXPONENTIAL: "Exponential",
    Spacing.BETA: "Beta",
    Spacing.SGM_UNIFORM: "SGM Uniform",
    Spacing.AYS: "Align Your Steps",
    Spacing.AYS_XL: "Align Your Steps",
}
_GUIDANCE = {Guidance.CFG_PP: "CFG++", Guidance.ZERO_STAR: "CFG-Zero*"}


def save_png(image: Image, path: str | Path, parameters: str = "") -> None:
    """Writes a PNG with A1111's text chunk `parameters`, whole or not at all. Raises FileError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileError(f"{path.parent} is a file: give a folder") from error
    except OSError as error:
        raise FileError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    write_whole(path, png_bytes(image, parameters), sync=False)


def png_bytes(image: Image, parameters: str) -> bytes:
    """The PNG file as bytes."""
    info = PngInfo()
    info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text("parameters", parameters)
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "PNG", pnginfo=info, compress_level=_PNG_LEVEL)
    return stream.getvalue()


def open_picture(path: Path) -> PIL.Image.Image:
    """Reads a picture from an untrusted file, as `decode_picture`.

    Raises UsageError if there is no such file, FileError if it is not a picture or has too many pixels.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileError(f"{path} has more than {_MAX_BYTES >> 20} MiB: pass a smaller picture")
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked in any case
            return decode_picture(stream, str(path))
    except FileNotFoundError:
        raise UsageError(f"there is no picture {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: pass one picture") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read as a picture: {error.strerror or one_line(error)}") from error


def decode_picture(
    stream: BinaryIO, name: str, max_pixels: int = _MAX_PIXELS, formats: tuple[str, ...] = _FORMATS
) -> PIL.Image.Image:
    """Decodes an untrusted picture: rotated as its EXIF says, 8 bits per channel, in its own mode, but RGB for LAB.

    An animation is read as its first frame. 16-bit values are scaled to 8 bits; floats and 32-bit integers, which have
    no fixed range, are scaled by the smallest of 1 (floats only), 255 and 65535 that covers them all.

    Raises FileError, with `name` and, for a damaged picture, Pillow's text, which can hold memory addresses.
    """
    try:
        picture = PIL.Image.open(stream, formats=formats)
        if picture.width * picture.height > max_pixels:
            raise FileError(
                f"{name} is {picture.width}x{picture.height}, but may have at most {max_pixels} pixels: make it smaller"
            )
        picture.load()
        return _eight_bits(PIL.ImageOps.exif_transpose(picture))
    except PIL.UnidentifiedImageError:
        raise FileError(f"{name} cannot be read as a picture: its format must be {one_of(formats)}") from None
    except OnewordError:
        raise
    except Exception as error:  # Pillow's decoders can raise almost anything for a damaged file
        raise FileError(f"{name} cannot be read as a picture: {one_line(error)}") from error


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as RGB, with transparency on white."""
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def read_image(path: Path) -> Image:
    """Reads a picture as uint8 [H, W, 3], transparency on white. Errors as `open_picture`."""
    return np.asarray(on_white(open_picture(path)))


def read_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Reads a mask as bool [H, W]: True where it is more white than black. Errors as `open_picture`."""
    return np.asarray(open_picture(path).convert("L")) >= 128


def resized(image: Image, width: int, height: int) -> Image:
    """The picture stretched to a size (Lanczos, as in diffusers), or the same array if it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


def preview_image(preview: Preview, latents: npt.NDArray[np.float32]) -> Image:
    """A small picture [h, w, 3] of latents [C, h, w] by a bundle's linear map, without the decoder."""
    rgb = np.moveaxis(latents, 0, -1) @ np.array(preview.weights, np.float32) + np.array(preview.bias, np.float32)
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


def parameters_text(request: Request, settings: ResolvedSettings, seed: int, model: str = "") -> str:
    """A1111's generation parameters: prompt, negative prompt, then `Name: value` pairs."""
    pairs: dict[str, object] = {
        "Steps": settings.steps,
        "Sampler": A1111_SAMPLERS[settings.sampler],
        "CFG scale": settings.guidance_scale,
        "Seed": seed,
        "Size": f"{settings.width}x{settings.height}",
    }
    if request.spacing is not None:
        pairs["Schedule type"] = A1111_SPACINGS[Spacing(request.spacing)]
    if request.guidance != Guidance.CFG:
        pairs["Guidance"] = _GUIDANCE[Guidance(request.guidance)]
    if model:
        pairs["Model"] = model
    if request.image is not None:
        pairs["Denoising strength"] = request.strength
    if request.mask is not None and request.mask_blur:
        pairs["Mask blur"] = f"{request.mask_blur:g}"
    if request.clip_skip:
        pairs["Clip skip"] = request.clip_skip + 1  # A1111 counts the last layer as 1
    if request.eta:
        pairs["Eta"] = request.eta
    if settings.embedded_guidance is not None:
        pairs["Distilled CFG Scale"] = settings.embedded_guidance
    if request.draft:
        pairs["VAE Decoder"] = "TAESD"  # A1111's name for a small decoder
    if request.guidance_rescale:
        pairs["CFG Rescale"] = request.guidance_rescale
    if request.guidance_interval is not None:
        pairs["CFG interval"] = "{:g}-{:g}".format(*request.guidance_interval)
    negative = f"Negative prompt: {request.negative_prompt}\n" if request.negative_prompt else ""
    return f"{request.prompt}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in pairs.items())


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a grey picture of 16 or 32 bits to 8 bits, and one in LAB, which Pillow converts to little else, to RGB;
    returns any other unchanged."""
    if picture.mode == "LAB":
        return picture.convert("RGB")
    if picture.mode not in _TOPS and not picture.mode.startswith("I;16"):
        return picture
    transparent = picture.info.get("transparency")  # the value of transparent pixels, in some PNGs
    opaque = None if transparent is None else np.asarray(picture) != transparent
    values = np.asarray(picture).astype(np.float32)
    finite = np.isfinite(values)
    largest = float(values.max(where=finite, initial=0))
    top = next((top for top in _TOPS.get(picture.mode, (65535,)) if largest <= top), largest)
    values = np.where(finite | (values > 0), values, 0).clip(0, top)  # NaN is black, infinity white
    grey = (values / top * 255 + 0.5).astype(np.uint8)
    return PIL.Image.fromarray(grey if opaque is None else np.stack([grey, opaque * np.uint8(255)], -1))
