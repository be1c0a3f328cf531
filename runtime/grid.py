"""Many pictures as one, labelled: prompts down, words and seeds across. No model, no files."""

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
    """A table of pictures, measured before any is made.

    `columns` are levels of headings, top first: each level's labels share the `count` columns evenly, so that
    `[["<toy>", "<cat>"], ["7", "8", "7", "8"]]` has each word above its two seeds. A level of empty labels takes no
    room. Cells are `cell` (width, height), enlarged by a whole number to `smallest` pixels or more; text is Pillow's
    own font, which knows Latin letters.

    Raises UsageError where labels do not fit the columns, and for a grid of too many pixels.
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
                f"a grid of {width}x{height} pixels, allowed are {MAX_PIXELS}: make fewer or smaller pictures"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole, in pixels."""
        width, _ = self._cell
        return self._left + self.count * (width + _GAP), self._top + len(self.rows) * self._row_height

    def draw(self, pictures: Sequence[Sequence[Image]]) -> Image:
        """The one picture [H, W, 3] of a row of pictures for each of `rows`. Raises UsageError for any other table."""
        if len(pictures) != len(self.rows) or any(len(row) != self.count for row in pictures):
            raise UsageError(
                f"a grid of rows {[len(row) for row in pictures]} with {len(self.rows)} labels is no table"
            )
        width, _ = self._cell
        sheet = PIL.Image.new("RGB", self.size, "white")
        draw = PIL.ImageDraw.Draw(sheet)
        y = _GAP
        for level, head in zip(self._levels, self._heads, strict=True):
            span = self.count // len(level)
            for i, text in enumerate(level):
                left = self._left + i * span * (width + _GAP)
                draw.multiline_text((left, y), text, _INK, self._font, spacing=_LINE - _FONT_SIZE)
            y += head
        for i, (row, text) in enumerate(zip(pictures, self._side, strict=True)):
            y = self._top + i * self._row_height
            draw.multiline_text((_GAP, y), text, _INK, self._font, spacing=_LINE - _FONT_SIZE)
            for j, image in enumerate(row):
                enlarged = PIL.Image.fromarray(image.repeat(self._zoom, axis=0).repeat(self._zoom, axis=1))
                sheet.paste(enlarged, (self._left + j * (width + _GAP), y))
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
    def _side(self) -> list[str]:
        """The rows' labels, in lines."""
        return [_wrapped(label, min(max(160, self._cell[0]), 320), self._font) for label in self.rows]

    @cached_property
    def _levels(self) -> list[list[str]]:
        """The headings, in lines."""
        return [
            [_wrapped(label, (self._cell[0] + _GAP) * self.count // len(level) - _GAP, self._font) for label in level]
            for level in self.columns
            if any(level)
        ]

    @property
    def _heads(self) -> list[int]:
        return [_GAP + _LINE * max(text.count("\n") + 1 for text in level) for level in self._levels]

    @property
    def _left(self) -> int:
        return 2 * _GAP + max(_width(text, self._font) for text in self._side) if any(self._side) else _GAP

    @property
    def _top(self) -> int:
        return sum(self._heads) + _GAP

    @property
    def _row_height(self) -> int:
        return max(self._cell[1], _LINE * max(text.count("\n") + 1 for text in self._side)) + _GAP


def labelled_grid(
    pictures: Sequence[Sequence[Image]],
    rows: Sequence[str],
    columns: Sequence[Sequence[str]],
    smallest: int = 128,
) -> Image:
    """One picture [H, W, 3] of a table of pictures, cells as large as the largest of them. See Grid."""
    count = max(map(len, pictures), default=0)
    if not count:
        raise UsageError("a grid without a picture is no table")
    height, width = (max(image.shape[axis] for row in pictures for image in row) for axis in (0, 1))
    return Grid(rows, columns, count, (width, height), smallest).draw(pictures)


def _wrapped(label: str, width: int, font: Font) -> str:
    """A label in lines of at most `width` pixels, cut within a word only where the word alone is wider."""
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
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            kept = next(n for n in range(len(lines[-1]), 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:kept], lines[-1][kept:]]
    return lines


def _width(text: str, font: Font) -> int:
    return max(int(np.ceil(font.getlength(line))) for line in text.split("\n"))
