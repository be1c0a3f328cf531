"""Aspects of a word, and the file that lists them: `Aspect`, `parse_aspects`, `DEFAULT_ASPECTS`. Text only: no model.

    # a comment
    colour: red, orange, yellow, light blue
    material: wooden, glass, <brass>

One aspect per line: its name, a colon, and its words, separated by commas. A word is ordinary text or a learned word.
A refined word reads its aspects in this order, then its start: `red wooden toy`.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from oneword.engines.errors import FileError, UsageError, counted

MAX_ASPECTS: Final = 16
MAX_WORDS: Final = 64
MAX_LENGTH: Final = 40
MAX_FILE_BYTES: Final = 16 << 10

DEFAULT_TEXT: Final = """\
style: photo, drawing, painting, icon, sketch, watercolor, cartoon, anime, vintage, realistic, minimalist
light: bright, dark, sunlight, moonlight, neon, candlelight, backlit, foggy, golden, studio
texture: plain, stripes, dots, base, checkered, spotted, smooth, rough, fluffy, shiny, cracked, woven
colour: red, orange, yellow, lime, green, cyan, blue, purple, pink, brown, white, black, grey, gold, silver
material: wooden, metal, glass, plastic, leather, wool, paper, stone, ceramic, rubber, cotton, clay
shape: circle, square, triangle, star, ring, cross, heart, moon, diamond, arrow, flower, bolt, cube, sphere, cylinder
"""
"""The aspects that are used unless others are given."""


@dataclass(frozen=True)
class Aspect:
    """One property of a word and the words that may describe it. Raises UsageError."""

    name: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        for text in (self.name, *self.words):
            _check(text)
        if not 2 <= (count := len(self.words)) <= MAX_WORDS:
            raise UsageError(f"aspect {self.name!r} has {counted(count, 'word')}, but must have 2 to {MAX_WORDS}")
        if repeated := _first_repeated(self.words):
            raise UsageError(f"aspect {self.name!r} lists {repeated!r} twice: list each word once")


def check_aspects(aspects: tuple[Aspect, ...]) -> None:
    """Raises UsageError for too many or too few aspects, and for two of one name."""
    if not 1 <= len(aspects) <= MAX_ASPECTS:
        raise UsageError(f"there are {len(aspects)} aspects, but there must be 1 to {MAX_ASPECTS}")
    if repeated := _first_repeated([aspect.name for aspect in aspects]):
        raise UsageError(f"two aspects are called {repeated!r}: put their words on one line")


def parse_aspects(text: str, source: str = "the aspects") -> tuple[Aspect, ...]:
    """The aspects in a text; see the module. Raises UsageError, which names `source` and the line."""
    aspects: list[Aspect] = []
    for number, line in enumerate(unicodedata.normalize("NFC", text).splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, colon, words = content.partition(":")
        if not colon:
            raise UsageError(f"{source}, line {number}: {content[:60]!r} is not NAME: WORD, WORD, ...")
        try:
            aspects.append(Aspect(_squeezed(name), tuple(_squeezed(word) for word in words.split(","))))
        except UsageError as error:
            raise UsageError(f"{source}, line {number}: {error}") from None
    try:
        check_aspects(tuple(aspects))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return tuple(aspects)


def read_aspects(path: Path) -> tuple[Aspect, ...]:
    """The aspects in a file. Raises UsageError, FileError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise FileError(f"{path} has more than {MAX_FILE_BYTES} bytes: list fewer aspects or words")
        return parse_aspects(data.decode("utf-8-sig"), str(path))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}: --aspects takes a text file with lines NAME: WORD, WORD") from None
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8 text: save it as UTF-8, with lines NAME: WORD, WORD, ...") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error


def _check(text: str) -> None:
    if not text or len(text) > MAX_LENGTH or not text.isprintable() or re.search(r"[,:#]", text):
        raise UsageError(
            f"{text[:60]!r} is not a name or word of an aspect: it must be 1 to {MAX_LENGTH} printable characters "
            "without , : #"
        )


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _first_repeated(texts: tuple[str, ...] | list[str]) -> str | None:
    return next((text for i, text in enumerate(texts) if text in texts[:i]), None)


DEFAULT_ASPECTS: Final = parse_aspects(DEFAULT_TEXT)
