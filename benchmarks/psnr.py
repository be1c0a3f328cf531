"""PSNR, the distance of two pictures in decibels."""

import numpy as np
import numpy.typing as npt


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Of pictures in 256 levels; infinite if they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
