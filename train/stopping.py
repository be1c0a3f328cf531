"""When to stop learning a word: the DVAR criterion. Pure arithmetic on losses.

DVAR (Voronov et al. 2023, "Is This Loss Informative?", arXiv 2302.04841) monitors the loss on one batch with fixed
noise and timesteps. The loss varies while the word changes, and hardly varies once the word has settled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 310  # steps, as in the paper


def dvar(losses: Sequence[float], window: int = WINDOW) -> float:
    """The variance of the last `window` losses over the variance of all: 1 at first, 0 once nothing changes."""
    values = np.asarray(losses, np.float64)
    whole = float(values.var())
    return float(values[-window:].var()) / whole if whole > 0 else 0.0


def has_settled(losses: Sequence[float], below: float, window: int = WINDOW) -> bool:
    """Whether there are more than `window` losses and their ratio is under `below`."""
    return len(losses) > window and dvar(losses, window) < below
