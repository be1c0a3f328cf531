"""A labelled grid of pictures: a row per prompt, a column per word and seed. No model, no files."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Grid:
    """The layout of a table of pictures, known before any picture exists.

    `columns` are levels of headings, top first: each level's labels share the `count` columns evenly, so that
    `[["<toy>", "<cat>"], ["7", "8", "7", "8"]]` has each word above its two seeds. A level of empty labels takes no
    space. Cells are `cell` (width, height), enlarged by a whole number to `smallest` pixels or more; text is in
    Pillow's default font, which has only Latin letters.

    Raises UsageError if labels do not fit the columns or the grid has too many pixels.
    """

    rows: Sequence[str]
    columns: Sequence[Sequence[str]]
    count: int
    cell: tuple[int, int]
    smallest: int = 128

    def __post_init__(self) -> None:
        if any(not level or self.count % len(level) for level in self.columns):
            counts = [len(level) for level in self.columns]
            raise UsageError(f"headings of {counts} labels do not share {self.count} columns evenly")
        width, height = self.size
        if width * height > MAX_PIXELS:
            raise UsageError(
                f"the grid would have {width}x{height} pixels, but may have at most {MAX_PIXELS}: make fewer or "
                "smaller pictures"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid in pixels."""
        width, _ = self._cell
        return self._margin + self.count * (width + _GAP), self._top + len(self.rows) * self._row_height

    def draw(self, pictures: Sequence[Sequence[Image]]) -> Image:
        """The grid [H, W, 3], from one row of pictures for each of `rows`. Raises UsageError for any other table."""
        if len(pictures) != len(self.rows) or any(len(row) != self.count for row in pictures):
            raise UsageError(
                f"a grid of rows {[len(row) for row in pictures]} with {len(self.rows)} labels is not a table"
            )
        width, _ = self._cell
        sheet = PIL.Image.new("RGB", self.size, "white")
        draw = PIL.ImageDraw.Draw(sheet)
        y = _GAP
        for level, head_height in zip(self._levels, self._head_heights, strict=True):
            span = self.count // len(level)
            for i, text in enumerate(level):
                left = self._margin + i * span * (width + _GAP)
                draw.multiline_text((left, y), text, _INK, self._font, spacing=_LINE - _FONT_SIZE)
            y += head_height
        for i, (row, text) in enumerate(zip(pictures, self._row_labels, strict=True)):
            y = self._top + i * self._row_height
            draw.multiline_text((_GAP, y), text, _INK, self._font, spacing=_LINE - _FONT_SIZE)
            for j, image in enumerate(row):
                enlarged = PIL.Image.fromarray(image.repeat(self._zoom, axis=0).repeat(self._zoom, axis=1))
                sheet.paste(enlarged, (self._margin + j * (width + _GAP), y))
        return np.asarray(sheet)

    @cached_property
    def _font(self) -> Font:
        return PIL.ImageFont.load_default(_FONT_SIZE)

    @property
    def _zoom(self) -> int:
        return max(1, -(-self.smallest // max(self.cell)))

    @property
    def _cell(self) -> tuple[int, int]:
        width, height = self.cell
        return width * self._zoom, height * self._zoom

    @cached_property
    def _row_labels(self) -> list[str]:
        """The rows' labels, wrapped."""
        return [_wrapped(label, min(max(160, self._cell[0]), 320), self._font) for label in self.rows]

    @cached_property
    def _levels(self) -> list[list[str]]:
        """The headings, wrapped."""
        return [
            [_wrapped(label, (self._cell[0] + _GAP) * self.count // len(level) - _GAP, self._font) for label in level]
            for level in self.columns
            if any(level)
        ]

    @property
    def _head_heights(self) -> list[int]:
        return [_GAP + _LINE * max(text.count("\n") + 1 for text in level) for level in self._levels]

    @property
    def _margin(self) -> int:
        return 2 * _GAP + max(_width(text, self._font) for text in self._row_labels) if any(self._row_labels) else _GAP

    @property
    def _top(self) -> int:
        return sum(self._head_heights) + _GAP

    @property
    def _row_height(self) -> int:
        return max(self._cell[1], _LINE * max(text.count("\n") + 1 for text in self._row_labels)) + _GAP


def labelled_grid(
    pictures: Sequence[Sequence[Image]],
    rows: Sequence[str],
    columns: Sequence[Sequence[str]],
    smallest: int = 128,
) -> Image:
    """The grid [H, W, 3] of a table of pictures, with cells as large as the largest picture. See Grid."""
    count = max(map(len, pictures), default=0)
    if not count:
        raise UsageError("a grid without pictures is not a table: pass at least one")
    height, width = (max(image.shape[axis] for row in pictures for image in row) for axis in (0, 1))
    return Grid(rows, columns, count, (width, height), smallest).draw(pictures)


def _wrapped(label: str, width: int, font: Font) -> str:
    """A label in lines of at most `width` pixels; a word is split only if it is wider than that."""
    return "\n".join(_lines(label, width, font))


def _lines(text: str, width: int, font: Font) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while len(lines[-1]) > 1 and font.getlength(start := lines[-1][: width + 1]) > width:  # letters have a pixel
            split = max(1, bisect_left(range(1, len(start)), True, key=lambda n: font.getlength(start[:n]) > width))
            lines[-1:] = [lines[-1][:split], lines[-1][split:]]
    return lines


def _width(text: str, font: Font) -> int:
    return max(int(np.ceil(font.getlength(line))) for line in text.split("\n"))
