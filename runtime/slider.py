"""A word between two learned words: `{<toy>|<gem>:0.3}` in a prompt. The prompt's parser finds the words.

Braces that begin with a <word> and a bar are a slider, or an error; all other braces are text. The share cannot change
within the braces: `[{<toy>|<gem>:0.3}:{<toy>|<gem>:0.7}:0.5]` is a schedule of two sliders.

Directions are interpolated on the sphere and lengths linearly, row by row (arXiv 2512.13672, section 4): 0 is the first
word, 1 the second. Vectors for layers are interpolated in the same way.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from oneword.engines.errors import ConceptError, UsageError
from oneword.runtime.concept import Concept, Vectors

START: Final = re.compile(r"\{\s*<[^\s<>]+>\s*\|")
"""What is meant as a slider."""
_WORD: Final = r"\s*(<[\w.+*@#!~&$%^=-]+>)\s*"
SLIDER: Final = re.compile(rf"\{{{_WORD}\|{_WORD}:\s*(\d++\.?\d*|\.\d+)\s*\}}")
"""Its names and the share, which `slider_at` checks. `++` keeps many digits from taking quadratic time."""
_PARALLEL: Final = 1e-4  # radians from 0 or pi


@dataclass(frozen=True, eq=False)
class Slider:
    """A word `share` of the way from `first` to `second`."""

    first: Concept
    second: Concept
    share: float

    @cached_property
    def concept(self) -> Concept:
        """The word in between; where a text stands for it, that of the nearer word.

        Raises UsageError for words of different numbers of vectors or with different kinds of output vectors, and for a
        share that leaves no direction.
        """
        first, second = self.first, self.second
        if counts(first) != counts(second):
            raise UsageError(
                f"{first.token!r} and {second.token!r} have {counts(first)} and {counts(second)} vectors: a slider "
                "needs two words of equally many"
            )
        if kind_of(first) != kind_of(second):
            raise UsageError(
                f"{first.token!r} and {second.token!r} have vectors for layers of different kinds: a slider needs two "
                "words with equal stages, layers, values_only and encoder layers, or two with rows only"
            )
        vectors = {name: between(rows, second.vectors[name], self.share) for name, rows in first.vectors.items()}
        out = {name: between(values, second.out[name], self.share) for name, values in first.out.items()}
        layer_rows = {
            name: between(rows, second.layer_rows[name], self.share) for name, rows in first.layer_rows.items()
        }
        text = (first if self.share < 0.5 else second).text
        try:
            for name, values in out.items():
                if (first.out[name].any(-1) & ~values.any(-1)).any():
                    raise ConceptError("an output vector became zero")
            return Concept(
                "<slider>", vectors, {"text": text}, out, first.values_only, first.encoder_layers, layer_rows
            )
        except ConceptError:
            raise UsageError(
                f"{{{first.token}|{second.token}:{self.share:g}}} is not a word: the two are opposite, change the share"
            ) from None


def slider_at(text: str, position: int) -> re.Match[str] | None:
    """The match of SLIDER at a position, None for other text. Raises UsageError for a malformed slider."""
    if not START.match(text, position):
        return None
    match = SLIDER.match(text, position)
    if match is None or float(match.group(3)) > 1:
        raise UsageError(
            f"{text[position : position + 80]!r} is not a slider: write {{<word>|<word>:0.3}}, with the second word's "
            "share from 0 to 1"
        )
    return match


def between(first: Vectors, second: Vectors, share: float) -> Vectors:
    """Rows [..., D] between rows [..., D]; between parallel or opposite ones along the straight line."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = [np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (a, b)]
    units = [rows / np.maximum(length, 1e-12) for rows, length in zip((a, b), lengths, strict=True)]
    angle = np.arccos(np.clip((units[0] * units[1]).sum(-1, keepdims=True), -1, 1))
    straight = (angle < _PARALLEL) | (angle > np.pi - _PARALLEL) | (lengths[0] == 0) | (lengths[1] == 0)
    sine = np.where(straight, 1, np.sin(angle))
    direction = (np.sin((1 - share) * angle) * units[0] + np.sin(share * angle) * units[1]) / sine
    length = (1 - share) * lengths[0] + share * lengths[1]
    return np.where(straight, (1 - share) * a + share * b, length * direction).astype(np.float32)


def counts(concept: Concept) -> dict[str, int]:
    """The number of vectors by encoder."""
    return {name: len(rows) for name, rows in concept.vectors.items()}


def kind_of(concept: Concept) -> object:
    """What must be equal in two words whose vectors for layers are to be interpolated."""
    shapes = [{name: values.shape for name, values in part.items()} for part in (concept.out, concept.layer_rows)]
    return shapes, concept.values_only, dict(concept.encoder_layers)
