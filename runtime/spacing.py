"""Spacings of a run's noise levels, in sigma / alpha. Pure arrays: no models, no randomness.

Not covered: spacings in timesteps, which `oneword.runtime.schedule` has, except for the name of one of them here.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]


class Spacing(StrEnum):
    """Where a run's steps are, in place of what the model's scheduler says. Commands accept these names."""

    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"
    SGM_UNIFORM = "sgm-uniform"
    """Even in timesteps from the very last one on: `timestep_spacing` trailing in diffusers."""
    AYS = "ays"
    AYS_XL = "ays-xl"


_ALIGNED: Final[Mapping[Spacing, tuple[float, ...]]] = {
    Spacing.AYS: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    Spacing.AYS_XL: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Align Your Steps (arXiv 2404.14507): the noise levels of ten steps, for Stable Diffusion 1.5 and SDXL."""


def spaced_sigmas(spacing: Spacing, high: float, low: float, steps: int) -> Array:
    """Sigmas [S] from `high` to `low`, without the zero at the end; Align Your Steps has its own ends."""
    match spacing:
        case Spacing.KARRAS:
            return karras_sigmas(high, low, steps)
        case Spacing.EXPONENTIAL:
            return np.exp(np.linspace(np.log(high), np.log(low), steps))
        case Spacing.BETA:
            return low + (high - low) * beta_quantile(1 - np.linspace(0, 1, steps))
        case _:
            return aligned_sigmas(spacing, steps)


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Array:
    """Sigmas [S] evenly spaced in sigma^(1/7), eq. 5 of Karras et al. (2022)."""
    high, low = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** 7)


def aligned_sigmas(spacing: Spacing, steps: int) -> Array:
    """Sigmas [S] of Align Your Steps, log-linear between those of ten steps, as in ComfyUI; at ten steps diffusers'."""
    sigmas = np.log(_ALIGNED[spacing])
    return np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(sigmas)), sigmas))[:-1]


def beta_quantile(p: Array) -> Array:
    """Quantiles [S] of the beta distribution of alpha = beta = 0.6, which "Beta sampling is all you need" (arXiv
    2407.12173) uses: the power series of the distribution below 1/2, which mirrors that above, by bisection."""
    tail = np.minimum(p, 1 - p)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_integral(middle) < tail * 2 * _beta_integral(np.array(0.5))
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p < 0.5, low, 1 - low)


def _beta_integral(x: Array) -> Array:
    """The integral of (u (1 - u))^-0.4 from 0 to x <= 1/2, 26.5.4 of Abramowitz and Stegun."""
    total, factor = np.zeros_like(x), 1.0
    for n in range(60):
        total = total + factor * x**n / (0.6 + n)
        factor *= (n + 0.4) / (n + 1)
    return np.asarray(total * x**0.6)
