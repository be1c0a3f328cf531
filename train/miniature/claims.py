"""What is true of a picture: captions that describe part of a scene, and a contrastive loss over which are true.

Used to train the miniature's judge, a small CLIPModel, and to ask it questions (`QUESTIONS`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from oneword.train.miniature import world
from oneword.train.miniature.tokenizer import LENGTH

_PARTS = ("shape", "colour", "second_colour", "pattern")
_WEIGHTS = {"shape": 4.0}  # weight of a question's loss; 1 for other questions, which need a tenth of the steps


@dataclass(frozen=True)
class Claim:
    """What a caption states about a thing, and about the scene's medium, background and style; None if not stated."""

    look: tuple[str | None, ...]
    name: str | None
    medium: str | None
    background: str | None
    style: str | None

    def holds(self, scene: world.Scene) -> bool:
        return (
            (self.medium is None or self.medium == scene.medium)
            and (self.background is None or self.background == scene.background)
            and (self.style is None or self.style == scene.style)
            and any(self._fits(thing) for thing in scene.things)
        )

    def _fits(self, thing: world.Thing) -> bool:
        values = (thing.look.shape, thing.look.colour, thing.look.second_colour, thing.look.pattern)
        if self.name is not None:
            return world.NOUNS.get(self.name) == thing.look
        plain = thing.look.pattern == "plain"
        return all(
            wanted is None or (wanted == value and not (plain and part == "second_colour"))
            for part, wanted, value in zip(_PARTS, self.look, values, strict=True)
        )

    @property
    def words(self) -> str:
        shape, colour, second, pattern = self.look
        thing = self.name or " ".join(filter(None, [colour, shape or "object"]))
        if not self.name and pattern == "plain":
            thing = f"plain {thing}"
        elif not self.name and pattern:
            article = "a " if pattern == "base" else ""
            thing += f" with {article}{f'{second} ' if second else ''}{pattern}"
        thing = world.with_article(thing)
        opening = f"{world.with_article(self.medium)} of {thing}" if self.medium else thing
        place = f" {world.BACKGROUNDS[self.background].phrase}" if self.background else ""
        return opening + place + (f" in the style of {self.style}" if self.style else "")


def _single_claim(attribute: str, value: str) -> Claim:
    """The claim that states one attribute and nothing else."""
    look = tuple(value if part == attribute else None for part in _PARTS)
    return Claim(
        look, None, value if attribute == "medium" else None, value if attribute == "background" else None, None
    )


_VALUES = {
    "shape": world.SHAPES,
    "colour": world.COLOURS,
    "background": world.BACKGROUNDS,
    "medium": world.MEDIA,
    "pattern": world.PATTERNS,
}
_CLAIMS = {
    attribute: {value: _single_claim(attribute, value) for value in values} for attribute, values in _VALUES.items()
}
#: The attributes that the judge is asked about, with a caption for each value.
QUESTIONS: dict[str, dict[str, str]] = {
    attribute: {value: claim.words for value, claim in claims.items()} for attribute, claims in _CLAIMS.items()
}


def sample_claim(scene: world.Scene, rng: np.random.Generator) -> Claim:
    """Draws a true claim about a scene, with few or many details."""
    thing = scene.things[rng.integers(len(scene.things))]
    look = thing.look
    stated = rng.random(6) < rng.choice([0.2, 0.5, 0.9])
    name = thing.name if thing.name in world.NOUNS and rng.random() < 0.25 else None
    pattern = look.pattern if stated[3] else None
    second = look.second_colour if pattern and pattern != "plain" and stated[2] else None
    return Claim(
        (look.shape if stated[0] else None, look.colour if stated[1] else None, second, pattern),
        name,
        scene.medium if stated[4] else None,
        scene.background if stated[5] else None,
        scene.style if isinstance(scene.style, str) and stated[4] else None,
    )


def sample_batch(rng: np.random.Generator, count: int, tokens: CLIPTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Draws pictures [B, 3, 64, 64], ids [B + Q, 32] and which text is true of which picture [B, B + Q].

    The texts are a claim about each picture, followed by all Q captions of `QUESTIONS` in order.
    """
    scenes = [world.sample_scene(rng) for _ in range(count)]
    images = np.stack([world.render(scene, int(rng.integers(2**31)))[0] for scene in scenes])
    claims = [sample_claim(scene, rng) for scene in scenes]
    claims += [claim for by_value in _CLAIMS.values() for claim in by_value.values()]
    truth = torch.tensor([[claim.holds(scene) for claim in claims] for scene in scenes])
    ids = tokens(
        [claim.words for claim in claims], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return pixels(images), ids, truth


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> the judge's input, [-1, 1] [B, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """CLIP's loss over the claims, plus each question's weighted cross-entropy over its captions. [B, B + Q] -> []."""
    count = len(logits)
    sizes = [count, *(len(captions) for captions in QUESTIONS.values())]
    claims, *questions = zip(logits.split(sizes, 1), truth.split(sizes, 1), strict=True)
    weighted = (
        _WEIGHTS.get(attribute, 1.0) * _cross_entropy(*question)
        for attribute, question in zip(QUESTIONS, questions, strict=True)
    )
    return contrastive_loss(*claims) + sum(weighted)


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """CLIP's symmetric loss with several right answers per row: cross-entropy to their uniform mix, [B, B] -> []."""
    return (_cross_entropy(logits, truth) + _cross_entropy(logits.T, truth.T)) / 2


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over a row's true captions; rows without any do not count."""
    wanted = truth.float()
    right = wanted.sum(1)
    answered = right > 0
    rows = -(logits.log_softmax(1) * wanted).sum(1)[answered] / right[answered]
    return rows.sum() / answered.sum().clamp(min=1)
