"""Pictures in requests and answers: untrusted bytes become arrays, and arrays become files with A1111's parameters.

PNG, JPEG and WebP, recognised by their content, at most 20 MiB and 16.8 million pixels, all checked before a pixel is
decoded. Not covered: fetching a picture from an address, which this server never does.
"""

import binascii
import io
import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from oneword.engines.errors import FileError
from oneword.runtime.images import decode_picture, on_white, png_bytes
from oneword.runtime.request import MAX_PIXELS, Image
from oneword.serve.containers import Container, Refused, take_apart
from oneword.serve.errors import Invalid, TooLarge, Unprocessable

Format: TypeAlias = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: Final[Mapping[str, str]] = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
"""By format, and by the ending of a file's name."""
MAX_BYTES = 20 << 20
_QUALITY = 95
_EXIF, _COMMENT = 0x8769, 0x9286
_MAX_COMMENT = 32_000  # characters, of 2 bytes each: a JPEG's EXIF holds 65,533 bytes
_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_SPACE = b" \t\r\n\f\v"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_Transpose = PIL.Image.Transpose
_UPRIGHT = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}  # by EXIF's orientation


def decode(data: bytes, name: str) -> Image:
    """An untrusted picture as uint8 [H, W, 3], upright, transparency on white. `name` is the request's field.

    Raises TooLarge and Unprocessable, with nothing of Pillow's texts.
    """
    return np.asarray(on_white(_decoded(data, name)))


def blank(data: bytes, name: str) -> Image:
    """A black picture of the size that `decode` gives, in no memory: no pixel is decoded. Raises as `decode`."""
    container = _checked(data, name)
    size = container.height, container.width
    return np.broadcast_to(np.uint8(0), (*(size[::-1] if container.orientation >= 5 else size), 3))


def decode_mask(data: bytes, transparent: bool, name: str = "mask") -> npt.NDArray[np.bool_]:
    """An untrusted mask as bool [H, W], True where the picture is regenerated.

    With `transparent`, as OpenAI's API has it, that is where the mask is transparent; a mask without transparency is
    refused. Without, as A1111 has it, it is where the mask is white, or, if it has transparent pixels, where it is
    opaque. Raises as `decode`, and Invalid.
    """
    picture = _decoded(data, name)
    if picture.has_transparency_data:
        alpha = np.asarray(picture.convert("RGBA"))[:, :, 3]
        if transparent:
            if (alpha < 128).any():
                return alpha < 128
        elif (alpha < 255).any():
            return alpha > 128
    if transparent:
        raise Invalid(f"{name!r} has no transparent pixels: make the area to repaint transparent, as a PNG", name)
    return np.asarray(picture.convert("L")) >= 128


def decode_base64(text: str, name: str) -> bytes:
    """The bytes of a picture as clients put it into JSON: base64, also URL-safe, with or without a `data:` URI.

    Raises Unprocessable, TooLarge. An address is refused, and never fetched.
    """
    start = 0
    if uri := _DATA_URI.match(text[:200]):
        start = uri.end()
    elif ":" in text[:200]:
        raise Unprocessable(f"{name!r} is an address, which is never fetched: send the picture itself as base64", name)
    if len(text) - start > MAX_BYTES * 3 // 2:  # base64 and line breaks
        raise TooLarge(f"{name!r} has more than {MAX_BYTES >> 20} MiB: send a smaller picture", name)
    try:
        encoded = text[start:].encode("ascii").translate(_URL_SAFE, _SPACE).rstrip(b"=")
        data = binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4), strict_mode=True)
    except ValueError:  # binascii.Error is one too
        raise Unprocessable(f"{name!r} is not base64: send the file's bytes as base64 text", name) from None
    if not data:
        raise Unprocessable(f"{name!r} is empty: send a picture as base64", name)
    return data


def encode(image: Image, format: Format, compression: int | None = None, parameters: str = "") -> bytes:
    """A picture as a file with A1111's parameters: a text chunk in PNG, EXIF's UserComment in JPEG and WebP.

    `compression` is the quality of JPEG and WebP, 0 to 100, as in OpenAI's API; PNG has none.
    """
    if format == "png":
        return png_bytes(image, parameters)
    quality = _QUALITY if compression is None else compression
    exif = PIL.Image.Exif()
    if parameters:
        comment = parameters[:_MAX_COMMENT].encode("utf-16-be", "replace")[: 2 * _MAX_COMMENT]
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + comment
    stream = io.BytesIO()
    picture = PIL.Image.fromarray(image)
    if format == "jpeg":
        picture.save(stream, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, exif=exif)
    else:
        picture.save(stream, "WEBP", quality=quality, method=2, exif=exif)
    return stream.getvalue()


def as_base64(data: bytes) -> str:
    """A picture's file as it is put into JSON."""
    return binascii.b2a_base64(data, newline=False).decode()


def read_parameters(data: bytes, name: str = "image") -> str:
    """A1111's parameters in a PNG, JPEG or WebP; empty if it has none. No pixel is decoded. Raises as `decode`."""
    return _checked(data, name).parameters


def _decoded(data: bytes, name: str) -> PIL.Image.Image:
    container = _checked(data, name)
    try:
        picture = decode_picture(io.BytesIO(container.file), name, MAX_PIXELS, (container.format,))
    except FileError:
        raise _refusal(name, "is damaged") from None
    if picture.size != (container.width, container.height):
        raise _refusal(name, "is damaged")
    method = _UPRIGHT.get(container.orientation)
    return picture if method is None else picture.transpose(method)


def _checked(data: bytes, name: str) -> Container:
    """The picture without its metadata, its size within the limits."""
    if not data:
        raise _refusal(name, "is empty")
    if len(data) > MAX_BYTES:
        raise TooLarge(
            f"{name!r} has {len(data)} bytes, but at most {MAX_BYTES} are allowed ({MAX_BYTES >> 20} MiB): "
            "send a smaller picture",
            name,
        )
    try:
        container = take_apart(data)
    except Refused as error:
        raise _refusal(name, str(error)) from None
    if container.width * container.height > MAX_PIXELS:
        raise Unprocessable(
            f"{name!r} is {container.width}x{container.height}, but may have at most {MAX_PIXELS} pixels: "
            "make it smaller",
            name,
        )
    return container


def _refusal(name: str, predicate: str) -> Unprocessable:
    return Unprocessable(f"{name!r} {predicate}: send one whole PNG, JPEG or WebP picture", name)
