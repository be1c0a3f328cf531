"""The prompts used to score words. Pure text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from oneword.train.recipe import Subject

PLACE = "{}"
LIKENESS_PROMPT = "a photo of a {}"
STYLE_LIKENESS_PROMPT = "a picture in the style of {}"

PAPER_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "background": ("a photo of a {} on the moon", "a photo of a {} on the beach", "a photo of a {} in the snow"),
        "style": ("an oil painting of a {}", "a watercolor painting of a {}", "a drawing of a {}"),
        "composition": ("a photo of a {} on a table", "a photo of Elmo holding a {}", "a photo of a {} and a dog"),
    }
)
MINIATURE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "background": ("a photo of a {} in the snow", "a photo of a {} at night", "a photo of a {} in the desert"),
        "style": ("a drawing of a {}", "an icon of a {}", "a painting of a {}"),
        "composition": ("a photo of a {} and a blue ring", "a photo of a red star and a {}"),
    }
)
PAPER_STYLE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": ("a cat in the style of {}", "a house in the style of {}", "a sailing boat in the style of {}"),
        "background": ("the moon in the style of {}", "a beach in the style of {}", "a city in the style of {}"),
    }
)
MINIATURE_STYLE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": (
            "a red star in the style of {}",
            "a blue ring in the style of {}",
            "a green heart in the style of {}",
        ),
        "background": ("a white moon at night in the style of {}", "a pink arrow in the snow in the style of {}"),
    }
)

PROMPTS: Mapping[str, Mapping[Subject, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "paper": {Subject.OBJECT: PAPER_PROMPTS, Subject.STYLE: PAPER_STYLE_PROMPTS},
        "miniature": {Subject.OBJECT: MINIATURE_PROMPTS, Subject.STYLE: MINIATURE_STYLE_PROMPTS},
    }
)
"""Prompts by set, subject and group: the paper's, and the miniature's."""


def without_word(prompt: str) -> str:
    """Removes the word from a prompt, as the paper does: 'a photo of a {} in the snow' -> 'a photo of in the snow'."""
    words = prompt.replace(f" in the style of {PLACE}", " ").replace(f"a {PLACE}", " ").replace(PLACE, " ").split()
    return " ".join(words)
