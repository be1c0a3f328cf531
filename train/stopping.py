"""When a word has been learned: DVAR, the one rule here. Pure arithmetic on losses.

DVAR (Voronov et al. 2023, "Is This Loss Informative?", arXiv 2302.04841) watches the loss on one batch, drawn once with
its noise and timesteps: while the word still changes, that loss varies; once the word has settled, it hardly does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 310  # steps, as in the paper


def dvar(losses: Sequence[float], window: int = WINDOW) -> float:
    """The variance of the last `window` losses over that of all: 1 at first, 0 once nothing changes."""
    values = np.asarray(losses, np.float64)
    whole = float(values.var())
    return float(values[-window:].var()) / whole if whole > 0 else 0.0


def has_settled(losses: Sequence[float], below: float, window: int = WINDOW) -> bool:
    """Whether the ratio is under `below`; never before there are more than `window` losses."""
    return len(losses) > window and dvar(losses, window) < below
