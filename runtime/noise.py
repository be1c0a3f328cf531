"""PyTorch's CPU noise, in numpy. Seeds and normals only: no devices, no schedules.

`torch.randn(shape, generator=torch.Generator().manual_seed(seed))` draws 32-bit words from an MT19937 seeded with the
lower 32 bits of the seed. From 16 values on, words become 24-bit uniforms, and blocks of 16 uniforms become 16 normals
by Box-Muller (eight radii, eight angles); if the last block is partial, the last 16 values are drawn again. Below 16
values, normals come in pairs from 53-bit doubles, and the generator keeps the second of a pair for the next call.

Equal bit for bit, except for the last bits of log, sin and cos: at most 5e-7 apart.
Source: pytorch/aten/src/ATen/native/cpu/DistributionTemplates.h (`normal_fill`) and ATen/core/DistributionsHelper.h.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from oneword.engines.errors import UsageError

_BLOCK: Final = 16
_UNIFORM_BITS: Final = 24
_DOUBLE_BITS: Final = 53


class TorchGenerator:
    """The stream of one `torch.Generator` on the CPU; each call continues where the last one stopped."""

    def __init__(self, seed: int) -> None:
        """Accepts the seeds of `manual_seed`, -2^63 to 2^64 - 1; only the lower 32 bits count, as in PyTorch."""
        if not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed {seed} is outside -2^63 to 2^64 - 1")
        unseeded: Any = _Unseeded()  # numpy accepts an ISeedSequence here, its stubs do not
        self._words = np.random.MT19937(unseeded)
        np.random.RandomState(self._words).seed(seed & 0xFFFFFFFF)
        self._second: float | None = None

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Standard normals of this shape, float32, as `torch.randn(shape, generator=...)` draws them."""
        size = int(np.prod(shape, dtype=np.int64))
        values = self._in_blocks(size) if size >= _BLOCK else self._one_by_one(size)
        return values.reshape(tuple(shape))

    def _in_blocks(self, size: int) -> npt.NDArray[np.float32]:
        values = self._uniforms(size)
        complete = size - size % _BLOCK
        values[:complete] = _box_muller(values[:complete])
        if complete < size:
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _one_by_one(self, size: int) -> npt.NDArray[np.float32]:
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._second is not None:
                values[i], self._second = self._second, None
                continue
            u, v = self._doubles(2)
            radius, angle = np.sqrt(-2.0 * np.log1p(-v)), 2.0 * np.pi * u
            values[i], self._second = radius * np.cos(angle), float(radius * np.sin(angle))
        return values

    def _uniforms(self, size: int) -> npt.NDArray[np.float32]:
        words = self._words.random_raw(size) & ((1 << _UNIFORM_BITS) - 1)
        return words.astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)

    def _doubles(self, size: int) -> npt.NDArray[np.float64]:
        high, low = self._words.random_raw(2 * size).reshape(size, 2).T  # the first word is the higher half
        return (((high << 32) | low) & ((1 << _DOUBLE_BITS) - 1)).astype(np.float64) * 2.0**-_DOUBLE_BITS


class _Unseeded(ISeedSequence):
    """Skips numpy's own seeding of a generator that is seeded right afterwards: it takes five times as long."""

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> npt.NDArray[Any]:
        """Zeros."""
        return np.zeros(n_words, dtype)


def _box_muller(uniforms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normals from uniforms, both [16 k]: radii from the first eight of each block, angles from the last eight."""
    u1, u2 = np.moveaxis(uniforms.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log1p(-u1))
    angle = np.float32(2 * np.pi) * u2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
