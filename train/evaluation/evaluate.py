"""Scoring words: the runtime draws pictures, the judge embeds them, and the paper's formulas score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.samplers import Sampler
from oneword.runtime.schedule import ScheduleKind
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.prompts import LIKENESS_PROMPT, MINIATURE_PROMPTS, PLACE, without_word
from oneword.train.evaluation.scores import (
    SAMPLES,
    STEPS,
    Embeddings,
    Formula,
    Scores,
    editability,
    likeness,
    likeness_within,
)

Pictures = npt.NDArray[np.uint8]  # [N, H, W, 3]

TRAINING, WORDLESS = "training pictures", "prompt without the word"  # the bounds


def evaluate(
    model: Model,
    judge: Judge,
    token: str,
    training: Pictures,
    prompts: Mapping[str, Sequence[str]] = MINIATURE_PROMPTS,
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    formula: Formula = Formula.PAPER,
    likeness_prompt: str = LIKENESS_PROMPT,
) -> tuple[Scores, dict[str, Pictures]]:
    """Returns the scores of a word loaded into `model`, and every prompt's samples [samples, H, W, 3]."""
    flat = [likeness_prompt, *(prompt for group in prompts.values() for prompt in group)]
    pictures = dict(
        zip(flat, sample(model, [p.replace(PLACE, token) for p in flat], samples, steps, seed), strict=True)
    )
    embedded = {prompt: judge.pictures(drawn) for prompt, drawn in pictures.items()}
    scores = Scores(
        likeness(embedded[likeness_prompt], judge.pictures(training)),
        _editabilities(embedded, _texts(judge, prompts), prompts, formula),
    )
    return scores, pictures


def bounds(
    model: Model,
    judge: Judge,
    training: Sequence[Pictures],
    prompts: Mapping[str, Sequence[str]],
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    formula: Formula = Formula.PAPER,
    likeness_prompt: str = LIKENESS_PROMPT,
) -> list[dict[str, Scores]]:
    """Returns the paper's two bounds for each set of training pictures [N, H, W, 3].

    One scores the training pictures themselves as every prompt's samples (left out for a single picture), the other
    the samples of the prompts without the word.
    """
    texts = _texts(judge, prompts)
    bare = {prompt: without_word(prompt) for prompt in [likeness_prompt, *texts]}
    drawn = sample(model, list(bare.values()), samples, steps, seed)
    wordless = {prompt: judge.pictures(pictures) for prompt, pictures in zip(bare, drawn, strict=True)}
    bounds = []
    for pictures in training:
        embedded = judge.pictures(pictures)
        ends = {WORDLESS: (likeness(wordless[likeness_prompt], embedded), wordless)}
        if len(embedded) > 1:
            ends[TRAINING] = (likeness_within(embedded), dict.fromkeys(texts, embedded))
        bounds.append(
            {
                name: Scores(like, _editabilities(by_prompt, texts, prompts, formula))
                for name, (like, by_prompt) in ends.items()
            }
        )
    return bounds


def sample(
    model: Model, prompts: Sequence[str], count: int, steps: int, seed: int, guidance_scale: float | None = None
) -> list[Pictures]:
    """Draws `count` pictures per prompt with the seeds seed, seed + 1, ... Raises the first failure.

    The sampler is DDIM, as in the paper, or Euler for a model of flow matching.
    """
    pictures = draw(
        model,
        *prompts,
        seed=seed,
        sampler=Sampler.DDIM if model.manifest.schedule is ScheduleKind.BETAS else Sampler.EULER,
        num_images=count,
        steps=steps,
        guidance_scale=guidance_scale,
    )
    return [np.stack([picture.image for picture in pictures if picture.id == number]) for number in range(len(prompts))]


def _texts(judge: Judge, prompts: Mapping[str, Sequence[str]]) -> dict[str, Embeddings]:
    """The embedding [P] of every prompt's text without the word."""
    return {prompt: judge.texts([without_word(prompt)])[0] for group in prompts.values() for prompt in group}


def _editabilities(
    samples: Mapping[str, Embeddings],
    texts: Mapping[str, Embeddings],
    prompts: Mapping[str, Sequence[str]],
    formula: Formula,
) -> dict[str, float]:
    """The mean editability of each group of prompts."""
    return {
        name: float(np.mean([editability(samples[prompt], texts[prompt], formula) for prompt in group]))
        for name, group in prompts.items()
    }
