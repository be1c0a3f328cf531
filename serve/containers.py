"""PNG, JPEG and WebP files from outside, taken apart without decoding a pixel.

`take_apart` finds the size, the orientation and A1111's parameters, and rebuilds the file from what a decoder needs and
nothing else. Metadata never reaches Pillow: a few kilobytes of compressed profiles, of EXIF entries that share their
bytes, or of progressive scans would otherwise keep it busy for minutes. The work is linear in the file's size, with a
limit on the number of parts. Not covered: the pixels themselves, and animations, which are refused.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_PARTS = 10_000  # a 20 MiB PNG of libpng has 2,560 chunks of 8 KiB
_MAX_SCANS = 100  # a progressive JPEG has about 10
_MAX_TEXT = 1 << 20
_MAX_ENTRIES = 1000

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_FILL = re.compile(rb"\xff*")
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantization, restart interval
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length

_ORIENTATION, _EXIF, _COMMENT = 0x0112, 0x8769, 0x9286


class Refused(Exception):
    """The file is not accepted; the message is a predicate: "is cut off"."""


@dataclass(frozen=True)
class Container:
    """A still picture that is not decoded yet."""

    format: str
    """As Pillow names it."""
    width: int
    height: int
    file: bytes
    """The file without metadata."""
    orientation: int = 1
    """EXIF's, 1 to 8."""
    parameters: str = ""
    """A1111's generation parameters."""


def take_apart(data: bytes) -> Container:
    """The picture in a file, by its first bytes, whatever it is called. Raises Refused."""
    try:
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(_JPEG):
            return _jpeg(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        raise Refused("is cut off") from None
    raise Refused("is not a PNG, JPEG or WebP picture")


def _png(data: bytes) -> Container:
    width, height = struct.unpack(">II", data[16:24])
    if data[8:16] != b"\0\0\0\x0dIHDR" or not width or not height:
        raise Refused("is damaged")
    head: list[bytes] = []
    pixels: list[bytes] = []
    orientation, parameters = 1, ""
    for kind, start, end in _png_chunks(data):
        match kind:
            case b"IDAT":
                pixels.append(data[start:end])
            case b"IHDR" | b"PLTE" | b"tRNS":
                head.append(data[start - 8 : end + 4])
            case b"acTL":
                raise Refused("is an animation")
            case b"eXIf":
                orientation = _orientation(data[start:end])
            case b"tEXt" | b"zTXt" | b"iTXt" if not parameters and data.startswith(b"parameters\0", start):
                parameters = _png_text(kind, data[start + 11 : end])
    if not pixels:
        raise Refused("has no pixels")
    file = b"".join([_PNG, *head, _png_chunk(b"IDAT", b"".join(pixels)), _png_chunk(b"IEND", b"")])
    return Container("PNG", width, height, file, orientation, parameters)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk's content, up to the end of the picture."""
    position = len(_PNG)
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            raise Refused("is cut off")
        if kind == b"IEND":
            return
        yield kind, start, end
        position = end + 4
    raise Refused("has too many parts")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def _png_text(kind: bytes, content: bytes) -> str:
    """The text of a chunk after its keyword, at most 1 MiB of it; empty if it is damaged."""
    match kind:
        case b"tEXt":
            return content[:_MAX_TEXT].decode("latin-1")
        case b"zTXt":
            return _inflated(content[1:]).decode("latin-1")
        case _:
            compressed = content[:1] == b"\1"
            text = content[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
            return (_inflated(text) if compressed else text[:_MAX_TEXT]).decode("utf-8", "replace")


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, _MAX_TEXT)
    except zlib.error:
        return b""


def _jpeg(data: bytes) -> Container:
    parts = [data[:2]]
    width = height = 0
    exif = b""
    position = 2
    for _ in range(_MAX_PARTS):
        position, found = _FILL.match(data, position).end(), position  # type: ignore[union-attr]
        marker = data[position]
        position += 1
        if position - found < 2 or marker in (0x00, 0xD9):
            raise Refused("is damaged")
        if marker in _ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        segment = data[position : position + length]
        if length < 2 or len(segment) < length:
            raise Refused("is cut off")
        if marker == 0xDA:
            break
        if marker in _SIZES:
            height, width = struct.unpack_from(">HH", segment, 3)
        if marker == 0xE1 and segment[2:8] == b"Exif\0\0":
            exif = exif or segment[8:]
        app = (marker == 0xE0 and segment[2:7] == b"JFIF\0") or (marker == 0xEE and segment[2:7] == b"Adobe")
        if marker in _SIZES or marker in _TABLES or app:
            parts.append(bytes((0xFF, marker)) + segment)
        position += length
    else:
        raise Refused("has too many parts")
    if not width or not height:
        raise Refused("is damaged")
    if data.rfind(b"\xff\xd9", position) < 0:
        raise Refused("is cut off")
    if data.count(b"\xff\xda", position) >= _MAX_SCANS:
        raise Refused("has too many scans")
    parts += [b"\xff\xda", data[position:]]
    return Container("JPEG", width, height, b"".join(parts), _orientation(exif), _comment(exif))


def _webp(data: bytes) -> Container:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise Refused("is cut off")
    chunks: dict[bytes, bytes] = {}
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > size + 8:
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data):
            raise Refused("is cut off")
        chunks.setdefault(kind, data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    else:
        raise Refused("has too many parts")
    if b"ANIM" in chunks or b"ANMF" in chunks:
        raise Refused("is an animation")
    width, height = _webp_size(chunks)
    file = b""
    if (canvas := chunks.get(b"VP8X")) is not None:
        # The canvas is allocated before anything is checked: it must be as large as the picture in it.
        if len(canvas) != 10 or [int.from_bytes(canvas[i : i + 3], "little") + 1 for i in (4, 7)] != [width, height]:
            raise Refused("is damaged")
        file += _riff_chunk(b"VP8X", bytes((canvas[0] & 0x10,)) + canvas[1:])  # of the flags, only that of alpha
    for kind in (b"ALPH", b"VP8 ", b"VP8L"):  # codespell:ignore alph
        if kind in chunks:
            file += _riff_chunk(kind, chunks[kind])
    exif = chunks.get(b"EXIF", b"").removeprefix(b"Exif\0\0")
    return Container("WEBP", width, height, _riff_chunk(b"RIFF", b"WEBP" + file), _orientation(exif), _comment(exif))


def _webp_size(chunks: dict[bytes, bytes]) -> tuple[int, int]:
    """Width and height, as the coded picture has them."""
    if (lossy := chunks.get(b"VP8 ")) is not None and lossy[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", lossy, 6)
        width, height = width & 0x3FFF, height & 0x3FFF
    elif (lossless := chunks.get(b"VP8L")) is not None and lossless[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", lossless, 1)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise Refused("has no pixels")
    if not width or not height:
        raise Refused("is damaged")
    return width, height


def _riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 if there is none."""
    order, first = _tiff_head(tiff)
    for tag, kind, _, value in _tiff_entries(tiff, order, first):
        if tag == _ORIENTATION and kind == 3:
            orientation = int(struct.unpack_from(order + "H", value)[0])
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _comment(tiff: bytes) -> str:
    """EXIF's UserComment, empty if there is none."""
    order, first = _tiff_head(tiff)
    for tag, _, _, value in _tiff_entries(tiff, order, first):
        if tag == _EXIF:
            for inner, _, count, place in _tiff_entries(tiff, order, struct.unpack(order + "I", value)[0]):
                if inner == _COMMENT:
                    (start,) = struct.unpack(order + "I", place)
                    return _comment_text(tiff[start : start + min(count, _MAX_TEXT)])
    return ""


def _tiff_head(tiff: bytes) -> tuple[str, int]:
    """Byte order, as struct names it, and where the first directory is; beyond the end if this is no TIFF."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "<")
    if tiff[:2] not in (b"II", b"MM") or len(tiff) < 8:
        return order, len(tiff)
    return order, int(struct.unpack_from(order + "I", tiff, 4)[0])


def _tiff_entries(tiff: bytes, order: str, start: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, count and the four bytes of value or offset of a directory's entries, as far as they are there."""
    if start + 2 > len(tiff):
        return
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for i in range(min(count, _MAX_ENTRIES)):
        place = start + 2 + 12 * i
        if place + 12 > len(tiff):
            return
        yield struct.unpack_from(order + "HHI4s", tiff, place)


def _comment_text(comment: bytes) -> str:
    """The text of a UserComment, whose first 8 bytes name its encoding."""
    kind, text = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        # A1111 writes big-endian whatever the file's order is; in other files the zeros of ASCII show the order
        little = text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if little else "utf-16-be", "replace").rstrip("\0")
    return text.decode("utf-8", "replace").rstrip("\0")
