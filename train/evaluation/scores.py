"""Likeness and editability. Pure arithmetic on embeddings: no models, no pictures.

Gal et al. 2022, section 5: likeness is the mean cosine in CLIP's space between 64 samples of "A photo of S*" and the
training pictures; editability is the cosine between the mean embedding of a prompt's 64 samples and the prompt's text
without S*, averaged over prompts. The released scorer averages the samples' cosines instead (`Formula.RELEASE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

Embeddings = npt.NDArray[np.float32]  # [N, P], unit vectors

SAMPLES = 64  # per prompt, as in the paper
STEPS = 50  # of the sampler


class Formula(Enum):
    """Editability of a prompt: cosine of the mean embedding (paper), or mean of the cosines (its released code)."""

    PAPER = "paper"
    RELEASE = "release"


@dataclass(frozen=True)
class Scores:
    """One word's scores, with `editability` by prompt group. All are cosines."""

    likeness: float
    editability: Mapping[str, float]

    @property
    def mean_editability(self) -> float:
        """The mean over the groups."""
        return float(np.mean(list(self.editability.values())))


def likeness(samples: Embeddings, training: Embeddings) -> float:
    """The mean pairwise cosine of samples [S, P] with training pictures [N, P]."""
    return float((samples @ training.T).mean())


def likeness_within(training: Embeddings) -> float:
    """The upper bound: the mean cosine between different training pictures [N, P]. NaN for a single picture."""
    cosines = training @ training.T
    return float(cosines[~np.eye(len(training), dtype=bool)].mean()) if len(training) > 1 else float("nan")


def editability(samples: Embeddings, text: Embeddings, formula: Formula = Formula.PAPER) -> float:
    """How well a prompt's samples [S, P] match the prompt's text [P] without the word."""
    if formula is Formula.RELEASE:
        return float((samples @ text).mean())
    return float(unit(samples.mean(0, keepdims=True))[0] @ text)


def unit(vectors: npt.NDArray[np.float32]) -> Embeddings:
    """The rows, scaled to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
