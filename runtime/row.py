"""One picture in progress: its schedule, its noise, the contexts it attends to, and its state while it has no slot."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from oneword.runtime.contexts import Sources
from oneword.runtime.events import Latents
from oneword.runtime.noise import TorchGenerator
from oneword.runtime.request import Request, ResolvedSettings
from oneword.runtime.samplers import Schedule


class NoiseStream:
    """The noise of the steps that draw any, in order. Each is drawn once, one step ahead, in a helper thread."""

    def __init__(self, generator: TorchGenerator, shape: Sequence[int], draws: npt.NDArray[np.bool_]) -> None:
        self._generator, self._shape = generator, tuple(shape)
        self._remaining = int(draws.sum())
        self._drawn: Future[Latents] | None = None

    def prefetch(self) -> None:
        """Starts to draw the next noise, if any step still needs it."""
        if self._drawn is None and self._remaining:
            self._remaining -= 1
            self._drawn = _helper().submit(self._generator.randn, self._shape)

    def take(self) -> Latents:
        """The next noise [C, h, w]."""
        if self._drawn is None:
            self._remaining -= 1
            return self._generator.randn(self._shape)
        noise, self._drawn = self._drawn.result(), None
        return noise


@dataclass(eq=False)
class Row:
    """One picture. While it has a slot of the Denoiser, `sample`, `previous` and `previous2` are outdated."""

    id: int
    index: int
    request: Request
    settings: ResolvedSettings
    lines: npt.NDArray[np.float32]
    """[R, K]: the schedule in the graph's columns."""
    noise: NoiseStream
    cond: Sequence[Sources]
    """[S]: the prompt's contexts in each step."""
    uncond: Sequence[Sources] | None
    most_contexts: int
    """How many contexts it can need in one step."""
    tokens: int
    """T: the least common multiple of its contexts' lengths."""
    time_ids: Sequence[float]
    sample: Latents
    previous: Latents
    previous2: Latents
    known: Latents | None = None
    known_noise: Latents | None = None
    mask: Latents | None = None
    """[1, h, w]"""
    line: int = 0
    """Lines of the schedule begun so far."""
    broken_at: int | None = None
    """The line, from 1, that produced NaN or infinity."""
    pending_noise: Latents | None = None
    """Noise that was taken for the next step, kept in case that step fails."""

    @property
    def schedule(self) -> Schedule:
        """The schedule of its request."""
        return self.settings.schedule

    @property
    def seed(self) -> int:
        """The seed of this picture."""
        return self.request.seed + self.index

    @property
    def steps(self) -> int:
        """S."""
        return self.schedule.steps

    @property
    def step(self) -> int:
        """Steps whose lines have all begun."""
        return self.schedule.steps_done(self.line)

    @property
    def size(self) -> tuple[int, int, int]:
        """h, w and T: rows of equal size share engine calls."""
        return (*self.sample.shape[1:], self.tokens)

    @property
    def branches(self) -> int:
        """N of the next line: the conditional branch, and before it the unconditional one if the line is guided."""
        return len(self.sources) if self.schedule.guided[self.line] else 1

    @property
    def sources(self) -> tuple[Sources, ...]:
        """What the branches of the next line's step attend to, whether or not that line is guided."""
        step = self.schedule.step_of(self.line + 1) - 1
        return (self.cond[step],) if self.uncond is None else (self.uncond[step], self.cond[step])

    def draw(self) -> Latents | None:
        """The noise of the next line, if it draws any. The same until `began` is called."""
        if not self.schedule.draws[self.line]:
            return None
        if self.pending_noise is None:
            self.pending_noise = self.noise.take()
        return self.pending_noise

    def began(self) -> None:
        """Counts a line that has begun."""
        self.line, self.pending_noise = self.line + 1, None


def time_ids(columns: Sequence[str], settings: ResolvedSettings) -> list[float]:
    """SDXL's size conditioning for an uncropped picture in its original size; see TIME_IDS."""
    height, width = float(settings.height), float(settings.width)
    values: Mapping[str, float] = {
        "original_height": height,
        "original_width": width,
        "crop_top": 0.0,
        "crop_left": 0.0,
        "target_height": height,
        "target_width": width,
    }
    return [values[name] for name in columns]


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "oneword-noise")
