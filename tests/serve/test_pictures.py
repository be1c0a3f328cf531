"""Pictures from outside are read safely, and A1111's parameters survive in every format."""

import base64
import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from oneword.runtime.request import MAX_PIXELS, Image
from oneword.serve.errors import ApiError, Invalid, TooLarge, Unprocessable
from oneword.serve.pictures import MAX_BYTES, decode, decode_base64, decode_mask, encode, read_parameters

Format = Literal["png", "jpeg", "webp"]
RED = np.full((8, 12, 3), (255, 0, 0), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
PARAMETERS = (
    "кот <toy>, 猫 🐈\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 64x64"
)


def file(picture: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of 8-bit grey pixels; by default black, as zlib's output is not padded."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = pixels or zlib.compress(bytes((width + 1) * min(height, 100)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks]
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP" + b"".join(parts)


def webp_chunk(data: bytes) -> tuple[bytes, bytes]:
    """The only chunk of a simple WebP file."""
    (size,) = struct.unpack("<I", data[16:20])
    return data[12:16], data[20 : 20 + size]


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    return bytes((flags, 0, 0, 0)) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"", order: str = "<") -> bytes:
    """EXIF with one directory of (tag, type, count, value) at offset 8."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    body = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    return head + struct.pack(order + "H", len(entries)) + body + bytes(4) + data


def animation(format: str) -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return file(frames[0], format, save_all=True, append_images=frames[1:])


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes 1,000 times."""
    data = file(PIL.Image.fromarray(NOISE), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + b"\xff\xd9"


def shared_exif() -> bytes:
    """A WebP whose 60,000 EXIF entries all have the same 8 MB: half a terabyte for a reader that copies them."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 8_000_000, 8) for tag in range(1, 60_000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 59_999) + entries + bytes(8_000_000)
    return riff((b"VP8X", canvas(12, 8, 8)), webp_chunk(file(PIL.Image.fromarray(RED), "WEBP")), (b"EXIF", exif))


BOMB = zlib.compress(bytes(20_000_000))
WHOLE_JPEG = file(PIL.Image.fromarray(NOISE), "JPEG")
WHOLE_PNG = file(PIL.Image.fromarray(NOISE))
WHOLE_WEBP = file(PIL.Image.fromarray(NOISE), "WEBP")


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16")]
    + [("JPEG", mode) for mode in ("RGB", "L", "1", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "RGBA")],
)
def test_every_format_and_mode_becomes_rgb(format: str, mode: str) -> None:
    if mode == "I;16":
        picture = PIL.Image.fromarray(np.full((8, 12), 65535, np.uint16))
    else:
        picture = PIL.Image.new("RGB", (12, 8), "white").convert(mode)
    data = file(picture, format, **({"quality": 100} if format != "PNG" else {}))

    image = decode(data, "image")

    assert image.dtype == np.uint8
    assert image.shape == (8, 12, 3)
    np.testing.assert_allclose(image.astype(int), 255, atol=3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_what_pillow_reads(format: str) -> None:
    data = file(PIL.Image.fromarray(NOISE), format)

    np.testing.assert_array_equal(decode(data, "image"), np.asarray(PIL.Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"optimize": True, "restart_marker_rows": 1}]
)
def test_every_kind_of_jpeg_is_read(options: dict[str, Any]) -> None:
    data = file(PIL.Image.fromarray(NOISE), "JPEG", icc_profile=bytes(200_000), comment=b"x" * 60_000, **options)

    np.testing.assert_array_equal(decode(data, "image"), np.asarray(PIL.Image.open(io.BytesIO(data))))


def test_a_cmyk_jpeg_of_photoshop_keeps_its_colours() -> None:
    data = file(PIL.Image.fromarray(NOISE).convert("CMYK"), "JPEG", quality=95)  # Pillow writes it inverted, as Adobe

    expected = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(data, "image"), np.asarray(expected))


def test_a_phones_jpeg_with_a_second_picture_is_its_first() -> None:
    second = PIL.Image.fromarray(NOISE[:32])
    data = file(PIL.Image.fromarray(NOISE), "MPO", save_all=True, append_images=[second])

    assert decode(data, "image").shape == (64, 64, 3)


def test_transparency_is_on_white() -> None:
    for data in (
        file(PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        file(PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP", lossless=True),
        file(PIL.Image.new("P", (4, 4), 0), transparency=0),
        file(PIL.Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0)),
    ):
        np.testing.assert_array_equal(decode(data, "image"), np.full((4, 4, 3), 255))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = file(PIL.Image.fromarray(NOISE[:, :48]), format, exif=exif)

    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, "image"), np.asarray(expected))


def test_a_picture_of_exactly_the_largest_size_is_accepted_and_one_more_pixel_is_not() -> None:
    assert decode(file(PIL.Image.new("L", (4096, 4096))), "image").shape == (4096, 4096, 3)
    message = f"'image' is 4096x4097, but may have at most {MAX_PIXELS} pixels: make it smaller"
    with pytest.raises(Unprocessable, match=message):
        decode(file(PIL.Image.new("L", (4096, 4097))), "image")


REFUSED = {
    "nothing": (b"", "is empty"),
    "text": (b"no picture at all", "is not a PNG, JPEG or WebP picture"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG, JPEG or WebP picture"),
    "a GIF": (file(PIL.Image.fromarray(RED), "GIF"), "is not a PNG, JPEG or WebP picture"),
    "a TIFF": (file(PIL.Image.fromarray(RED), "TIFF"), "is not a PNG, JPEG or WebP picture"),
    "an EPS": (file(PIL.Image.fromarray(RED), "EPS"), "is not a PNG, JPEG or WebP picture"),
    "a PNG of 3.6 gigapixels": (
        png(60_000, 60_000),
        "is 60000x60000, but may have at most 16777216 pixels: make it smaller",
    ),
    "a WebP of 268 megapixels": (
        riff(
            (b"VP8X", canvas(16_383, 16_383)),
            (b"VP8L", b"\x2f" + (16_382 | 16_382 << 14).to_bytes(4, "little") + bytes(9)),
        ),
        "is 16383x16383, but may have at most 16777216 pixels: make it smaller",
    ),
    "a JPEG of 4.3 gigapixels": (
        WHOLE_JPEG.replace(b"\xff\xc0\0\x11\x08\0\x40\0\x40", b"\xff\xc0\0\x11\x08\xff\xff\xff\xff"),
        "is 65535x65535, but may have at most 16777216 pixels: make it smaller",
    ),
    "a WebP whose canvas is larger than its picture": (
        riff((b"VP8X", canvas(16_384, 16_384)), webp_chunk(WHOLE_WEBP)),
        "is damaged",
    ),
    "a PNG of no size": (png(0, 1), "is damaged"),
    "a JPEG of no size": (WHOLE_JPEG.replace(b"\x11\x08\0\x40\0\x40", b"\x11\x08\0\0\0\0"), "is damaged"),
    "an animated PNG": (animation("PNG"), "is an animation"),
    "an animated WebP": (animation("WEBP"), "is an animation"),
    "a truncated PNG": (WHOLE_PNG[:-20], "is cut off"),
    "a truncated JPEG": (WHOLE_JPEG[:-20], "is cut off"),
    "a JPEG cut off in its tables": (WHOLE_JPEG[:300], "is cut off"),
    "a truncated WebP": (WHOLE_WEBP[:-20], "is cut off"),
    "the first bytes of a PNG": (WHOLE_PNG[:20], "is cut off"),
    "the first bytes of a JPEG": (WHOLE_JPEG[:4], "is cut off"),
    "the first bytes of a WebP": (WHOLE_WEBP[:14], "is cut off"),
    "a PNG without pixels": (b"\x89PNG\r\n\x1a\n" + WHOLE_PNG[8:33] + chunk(b"IEND", b""), "has no pixels"),
    "a PNG of garbage": (png(64, 64, pixels=b"garbage" * 10), "is damaged"),
    "a PNG of a million parts": (png(8, 8, chunk(b"IDAT", b"") * 1_000_000), "has too many parts"),
    "a JPEG of 18 MiB of padding": (WHOLE_JPEG[:2] + b"\xff" * (18 << 20), "is cut off"),
    "a JPEG of a million parts": (WHOLE_JPEG[:2] + b"\xff\xd0" * 1_000_000, "has too many parts"),
    "a JPEG of a thousand scans": (many_scans(), "has too many scans"),
    "a WebP of a million parts": (riff(*[(b"JUNK", b"")] * 1_000_000), "has too many parts"),
    "a WebP of garbage": (riff((b"VP8 ", b"\0\0\0\x9d\x01\x2a\x40\0\x40\0" + b"x" * 50)), "is damaged"),
    "a WebP without pixels": (riff((b"VP8X", canvas(8, 8))), "has no pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_and_malformed_pictures_are_refused_in_our_words_before_they_cost_anything(name: str) -> None:
    data, message = REFUSED[name]

    seconds = []
    for _ in range(3):
        start = time.thread_time()
        with pytest.raises(ApiError) as caught:
            decode(data, "image")
        seconds.append(time.thread_time() - start)

    assert str(caught.value).startswith(f"'image' {message}")
    assert (caught.value.status, caught.value.param) == (422, "image")
    assert min(seconds) < 0.05  # of CPU


HARMLESS = {
    "compressed texts": png(8, 8, *[chunk(b"zTXt", b"k\0\0" + BOMB)] * 900),
    "compressed profiles": png(8, 8, *[chunk(b"iCCP", b"k\0\0" + BOMB)] * 900),
    "a text of 19 MiB": png(8, 8, chunk(b"tEXt", b"k\0" + b"x" * (19 << 20))),
    "parameters that are a bomb": png(8, 8, chunk(b"zTXt", b"parameters\0\0" + BOMB)),
    "EXIF whose entries share their bytes": shared_exif(),
    "a broken EXIF": WHOLE_JPEG[:2] + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff" + WHOLE_JPEG[2:],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_bombs_in_metadata_are_skipped(name: str) -> None:
    data = HARMLESS[name]
    decode(data, "image")  # the first call imports Pillow's decoder

    seconds = []
    for _ in range(3):
        start = time.thread_time()
        decode(data, "image")
        assert len(read_parameters(data)) <= 1 << 20
        seconds.append(time.thread_time() - start)

    assert min(seconds) < 0.05


def test_a_file_that_is_too_large_is_refused() -> None:
    with pytest.raises(TooLarge, match=r"'image' has 20971521 bytes, but at most 20971520 are allowed \(20 MiB\)"):
        decode(b"\x89PNG\r\n\x1a\n".ljust(MAX_BYTES + 1, b"x"), "image")


@pytest.mark.parametrize("whole", [WHOLE_PNG, WHOLE_JPEG, WHOLE_WEBP])
def test_a_damaged_picture_is_a_picture_or_refused_in_our_words(whole: bytes) -> None:
    rng = np.random.default_rng(0)
    intact = np.frombuffer(whole, np.uint8)
    for _ in range(300):
        damaged = intact.copy()
        damaged[rng.integers(0, min(len(intact), 700), 4)] = rng.integers(0, 256, 4)
        cut = int(rng.integers(1, 2 * len(intact)))
        for message in (refusal(decode, damaged.tobytes()[:cut]), refusal(read_parameters, damaged.tobytes()[:cut])):
            assert message is None or message.startswith("'image' ")
            assert "0x" not in (message or "")


def refusal(function: Callable[[bytes, str], object], data: bytes) -> str | None:
    try:
        function(data, "image")
    except Unprocessable as error:
        return str(error)
    return None


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_openais_mask_repaints_where_it_is_transparent(format: str) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 127, 128)
    pixels[1, :, 3] = 255
    data = file(PIL.Image.fromarray(pixels), format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))

    mask = decode_mask(data, transparent=True)

    np.testing.assert_array_equal(mask, [[True, True, False], [False, False, False]])
    assert mask.dtype == bool


def test_openais_mask_without_transparent_pixels_is_refused() -> None:
    for mode in ("RGB", "L", "RGBA"):
        with pytest.raises(Invalid, match="'mask' has no transparent pixels: make the area to repaint transparent"):
            decode_mask(file(PIL.Image.new(mode, (4, 4), "white")), transparent=True)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "LA"])
def test_a1111s_mask_repaints_where_it_is_white(mode: str) -> None:
    grey = PIL.Image.fromarray(np.array([[0, 127, 128, 255], [255, 0, 255, 0]], np.uint8))
    if mode == "1":
        grey = grey.point(lambda value: 255 * (value >= 128))
    data = file(grey.convert("RGB").convert(mode) if mode == "P" else grey.convert(mode))

    mask = decode_mask(data, transparent=False)

    np.testing.assert_array_equal(mask, [[False, False, True, True], [True, False, True, False]])


def test_a1111s_mask_with_transparent_pixels_repaints_where_it_is_opaque() -> None:
    pixels = np.zeros((1, 4, 4), np.uint8)  # black strokes on a transparent canvas, as a painting program saves them
    pixels[0, :, 3] = (0, 100, 129, 255)

    np.testing.assert_array_equal(
        decode_mask(file(PIL.Image.fromarray(pixels)), transparent=False), [[False, False, True, True]]
    )


def test_base64_is_read_in_every_form_that_clients_send() -> None:
    data = bytes(range(256)) + b"\xfb\xff\xfe"
    plain = base64.b64encode(data).decode()
    for text in (
        plain,
        plain.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        base64.encodebytes(data).decode(),
        f"  {plain}\r\n",
        f"data:image/png;base64,{plain}",
        f"DATA:image/webp;charset=utf-8;base64,\n{plain}",
        f"data:;base64,{plain}",
        "\t".join(plain),
    ):
        assert decode_base64(text, "image") == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://example.com/a.png", "is an address, which is never fetched: send the picture itself as base64"),
        ("https://example.com/a.png", "is an address, which is never fetched"),
        ("HTTPS://example.com", "is an address, which is never fetched"),
        ("file:///etc/passwd", "is an address, which is never fetched"),
        ("data:image/png,abc", "is an address, which is never fetched"),
        ("/etc/passwd!", "is not base64: send the file's bytes as base64 text"),
        ("not base64 at all!", "is not base64"),
        ("abc=def=", "is not base64"),
        ("a", "is not base64"),
        ("кот", "is not base64"),
        ("\ud800", "is not base64"),
        ("", "is empty"),
        ("====", "is empty"),
        ("data:image/png;base64,", "is empty"),
    ],
)
def test_what_is_not_base64_is_refused_and_never_fetched(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(Unprocessable) as caught:
        decode_base64(text, "image")

    assert str(caught.value).startswith(f"'image' {message}")
    assert "passwd" not in str(caught.value)


def test_base64_that_is_too_long_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TooLarge, match="'image' has more than 20 MiB"):
        decode_base64("A" * (40 << 20), "image")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("parameters", [PARAMETERS, "a cat\nSteps: 1", "x", "кот", "a" * 20_000, ""])
def test_the_parameters_are_read_back_from_every_format(format: Format, parameters: str) -> None:
    data = encode(NOISE, format, parameters=parameters)

    assert read_parameters(data) == parameters
    assert decode(data, "image").shape == NOISE.shape


def test_a_png_keeps_every_pixel_and_the_others_nearly() -> None:
    smooth = np.stack(np.meshgrid(np.arange(64) * 3, np.arange(64) * 3), -1).astype(np.uint8)
    image: Image = np.concatenate([smooth, smooth[:, :, :1]], -1)

    np.testing.assert_array_equal(decode(encode(image, "png"), "image"), image)
    for format in ("jpeg", "webp"):
        error = np.abs(decode(encode(image, format), "image").astype(int) - image)
        assert error.mean() < 3


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_higher_compression_setting_is_a_higher_quality(format: Format) -> None:
    sizes = [len(encode(NOISE, format, compression)) for compression in (0, 25, 50, 75, 100)]

    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 2


def test_parameters_too_long_for_a_jpeg_are_cut_off_rather_than_lost_with_the_picture() -> None:
    assert read_parameters(encode(RED, "jpeg", parameters="猫" * 50_000)) == "猫" * 32_000
    assert read_parameters(encode(RED, "png", parameters="猫" * 50_000)) == "猫" * 50_000


def user_comment(comment: bytes, order: str) -> bytes:
    """EXIF as piexif writes it for A1111: a directory that points to a second one, which has the comment."""
    inner = struct.pack(order + "HHHII", 1, 0x9286, 7, len(comment), 44) + bytes(4)
    return tiff((0x8769, 4, 1, 26), data=inner + comment, order=order)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("codec", ["utf-16-be", "utf-16-le"])
def test_the_comments_of_other_programs_are_read(order: str, codec: str) -> None:
    exif = user_comment(b"UNICODE\0" + PARAMETERS.encode(codec), order)
    for data in (
        file(PIL.Image.fromarray(RED), "JPEG", exif=b"Exif\0\0" + exif),
        file(PIL.Image.fromarray(RED), "WEBP", exif=exif),
        riff((b"VP8X", canvas(64, 64, 8)), webp_chunk(WHOLE_WEBP), (b"EXIF", b"Exif\0\0" + exif)),  # as piexif
    ):
        assert read_parameters(data) == PARAMETERS


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("text", [PARAMETERS, "a cat\nSteps: 1"])
def test_the_texts_of_other_programs_are_read(compressed: bool, text: str) -> None:
    add: Callable[[PngInfo], None] = lambda info: info.add_itxt("parameters", text, "en", "übersetzt", zip=compressed)  # noqa: E731
    info = PngInfo()
    info.add_text("prompt", "{}")  # ComfyUI's
    add(info) if not text.isascii() else info.add_text("parameters", text, zip=compressed)

    assert read_parameters(file(PIL.Image.fromarray(RED), pnginfo=info)) == text


def test_a_picture_without_parameters_has_none() -> None:
    assert [read_parameters(data) for data in (WHOLE_PNG, WHOLE_JPEG, WHOLE_WEBP)] == ["", "", ""]
    with pytest.raises(Unprocessable, match="'image' is not a PNG, JPEG or WebP picture"):
        read_parameters(b"no picture")
