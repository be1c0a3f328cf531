"""Many pictures as one, labelled: prompts down, words and seeds across. No model, no files."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from oneword.engines.errors import UsageError
from oneword.runtime.request import Image

Font: TypeAlias = PIL.ImageFont.ImageFont | PIL.ImageFont.FreeTypeFont

MAX_PIXELS = 1 << 26
_GAP = 8
_FONT_SIZE = 13
_LINE = 17
_INK = (30, 30, 30)


def labelled_grid(
    pictures: Sequence[Sequence[Image]],
    rows: Sequence[str],
    columns: Sequence[Sequence[str]],
    smallest: int = 128,
) -> Image:
    """One picture [H, W, 3] of a table of pictures, a label before each row, headings above the columns.

    `columns` are levels of headings, top first: each level's labels share the columns evenly, so that
    `[["<toy>", "<cat>"], ["7", "8", "7", "8"]]` has each word above its two seeds. A level of empty labels takes no
    room. Cells are as large as the largest picture, and enlarged by a whole number to `smallest` pixels or more; text
    is Pillow's own font, which knows Latin letters.

    Raises UsageError where labels and pictures do not fit together, and for a grid of too many pixels.
    """
    count = max(map(len, pictures), default=0)
    if not count or any(len(row) != count for row in pictures) or len(rows) != len(pictures):
        raise UsageError(f"a grid of rows {[len(row) for row in pictures]} with {len(rows)} labels is no table")
    if any(not level or count % len(level) for level in columns):
        raise UsageError(f"headings of {[len(level) for level in columns]} labels do not share {count} columns evenly")
    height, width = (max(image.shape[axis] for row in pictures for image in row) for axis in (0, 1))
    zoom = max(1, -(-smallest // max(height, width)))
    height, width = height * zoom, width * zoom
    font = PIL.ImageFont.load_default(_FONT_SIZE)
    side = _wrapped(rows, min(max(160, width), 320), font)
    levels = [
        _wrapped(level, (width + _GAP) * count // len(level) - _GAP, font) for level in columns if any(map(str, level))
    ]
    left = 2 * _GAP + max(_width(text, font) for text in side) if any(side) else _GAP
    heads = [_GAP + _LINE * max(len(text.split("\n")) for text in level) for level in levels]
    top = sum(heads) + _GAP
    row_height = max(height, _LINE * max(len(text.split("\n")) for text in side)) + _GAP
    size = (left + count * (width + _GAP), top + len(pictures) * row_height)
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"a grid of {size[0]}x{size[1]} pixels, allowed are {MAX_PIXELS}: make fewer or smaller ones")
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    y = _GAP
    for level, head in zip(levels, heads, strict=True):
        span = count // len(level)
        for i, text in enumerate(level):
            draw.multiline_text((left + i * span * (width + _GAP), y), text, _INK, font, spacing=_LINE - _FONT_SIZE)
        y += head
    for i, (row, text) in enumerate(zip(pictures, side, strict=True)):
        y = top + i * row_height
        draw.multiline_text((_GAP, y), text, _INK, font, spacing=_LINE - _FONT_SIZE)
        for j, image in enumerate(row):
            enlarged = PIL.Image.fromarray(image.repeat(zoom, axis=0).repeat(zoom, axis=1))
            sheet.paste(enlarged, (left + j * (width + _GAP), y))
    return np.asarray(sheet)


def _wrapped(labels: Sequence[str], width: int, font: Font) -> list[str]:
    """Each label in lines of at most `width` pixels, cut within a word only where the word alone is wider."""
    return ["\n".join(_lines(label, width, font)) for label in labels]


def _lines(text: str, width: int, font: Font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            kept = next(n for n in range(len(lines[-1]), 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:kept], lines[-1][kept:]]
    return lines


def _width(text: str, font: Font) -> int:
    return max(int(np.ceil(font.getlength(line))) for line in text.split("\n"))
