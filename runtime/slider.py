"""A word between two learned words: `{<toy>|<gem>:0.3}` in a prompt. Pure arrays; the prompt's parser finds the words.

Directions are interpolated on the sphere and lengths linearly, row by row (arXiv 2512.13672, section 4): 0 is the first
word, 1 the second.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from oneword.engines.errors import UsageError
from oneword.runtime.concept import Concept, Vectors

BRACES: Final = re.compile(r"\{([^{}]*\|[^{}]*)\}")
"""What is meant as a slider: braces around a bar."""
_PARTS: Final = re.compile(r"\s*([^|]+?)\s*\|\s*([^|]+?)\s*:\s*([^|:]*?)\s*")
_PARALLEL: Final = 1e-4  # radians from 0 or pi


@dataclass(frozen=True, eq=False)
class Slider:
    """A word `share` of the way from `first` to `second`."""

    first: Concept
    second: Concept
    share: float

    @cached_property
    def concept(self) -> Concept:
        """The word in between. Raises UsageError for words of different numbers of vectors."""
        first, second = self.first, self.second
        if counts(first) != counts(second):
            raise UsageError(
                f"{first.token!r} and {second.token!r} have {counts(first)} and {counts(second)} vectors: a slider "
                "needs two words of equally many"
            )
        vectors = {name: between(rows, second.vectors[name], self.share) for name, rows in first.vectors.items()}
        return Concept("<slider>", vectors)


def slider_parts(text: str) -> tuple[str, str, float]:
    """The two names and the share in a slider's braces. Raises UsageError."""
    parts = _PARTS.fullmatch(text)
    try:
        share = float(parts.group(3)) if parts else np.nan
    except ValueError:
        share = np.nan
    if parts is None or not 0 <= share <= 1:
        raise UsageError(
            f"{{{text[:80]}}} is no slider: write {{<word>|<word>:0.3}}, with the second word's share from 0 to 1"
        )
    return parts.group(1), parts.group(2), share


def between(first: Vectors, second: Vectors, share: float) -> Vectors:
    """Rows [n, D] between rows [n, D]; between parallel or opposite ones along the straight line."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b)]
    units = [rows / np.maximum(length, 1e-12) for rows, length in zip((a, b), lengths, strict=True)]
    angle = np.arccos(np.clip((units[0] * units[1]).sum(1, keepdims=True), -1, 1))
    straight = (angle < _PARALLEL) | (angle > np.pi - _PARALLEL) | (lengths[0] == 0) | (lengths[1] == 0)
    sine = np.where(straight, 1, np.sin(angle))
    direction = (np.sin((1 - share) * angle) * units[0] + np.sin(share * angle) * units[1]) / sine
    length = (1 - share) * lengths[0] + share * lengths[1]
    return np.where(straight, (1 - share) * a + share * b, length * direction).astype(np.float32)


def counts(concept: Concept) -> dict[str, int]:
    """The number of vectors by encoder."""
    return {name: len(rows) for name, rows in concept.vectors.items()}
