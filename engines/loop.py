"""The denoising loop over one binding of `denoise_step`, its state where the engine works. Knows no back end.

Between two steps nothing crosses to the host and nothing waits: the step's row of the schedule (and its noise) is
copied from a table on the device, the graph runs, its outputs become its inputs. `step` queues one step and `finish`
all that are left; either is captured once and replayed after, where the engine's runs can be. Reading waits.

On the host the same code runs step by step. What is encoded, drawn or decoded is not known here.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Array, Binding, HostArray, NumpyArray
from oneword.engines.errors import EngineError

_WARM_UP = 2

Replay: TypeAlias = Callable[[], None]
"""Queues captured work once more."""


class Queue(Protocol):
    """Where a binding's work is put in order: a stream of a GPU, or the host itself."""

    def put(self, values: NumpyArray) -> Array:
        """An array with these values where the work is done: on the host, they themselves."""
        ...

    def copy(self, target: Array, source: Array, row: int | None = None) -> None:
        """target = source, or source[row]."""
        ...

    def keep(self, target: Array, row: int, source: Array) -> None:
        """target[row] = source."""
        ...

    def run(self, binding: Binding) -> None:
        """The binding's graph, once."""
        ...

    def capture(self, work: Callable[[], None]) -> Replay:
        """Records what `work` queues, without doing it, to be replayed as one piece."""
        ...

    def wait(self) -> None:
        """Until all that was queued is done."""
        ...

    def memory_in_use(self) -> int | None:
        """Bytes of the device that anyone uses; None on the host."""
        ...


class HostQueue:
    """The host: everything is done at once, and replaying is doing it again."""

    def put(self, values: NumpyArray) -> Array:
        """See Queue."""
        return HostArray(values)

    def copy(self, target: Array, source: Array, row: int | None = None) -> None:
        """See Queue."""
        target.write(..., source.numpy() if row is None else source.numpy()[row])

    def keep(self, target: Array, row: int, source: Array) -> None:
        """See Queue."""
        target.write(row, source.numpy())

    def run(self, binding: Binding) -> None:
        """See Queue."""
        binding.run()

    def capture(self, work: Callable[[], None]) -> Replay:
        """See Queue."""
        return work

    def wait(self) -> None:
        """See Queue."""

    def memory_in_use(self) -> None:
        """See Queue."""


class Loop:
    """Steps of one batch over one binding, begun as often as one likes. The caller has written what stays the same into
    `binding.inputs`: context, branches, mask; and the state, `sample` and `previous`.

    What is captured is replayed as long as the binding lives. What cannot be captured is queued again every time.
    """

    def __init__(self, binding: Binding, queue: Queue) -> None:
        self.binding = binding
        self._queue = queue
        self._warm = 0  # runs so far; libraries allocate and tune in the first two, which therefore are not captured
        self._captures = binding.capturable
        self._step: Replay | None = None
        self._whole: Replay | None = None
        self._schedule: Array = HostArray(np.empty((0, 0, 0), np.float32))
        self._noise: Array | None = None
        self._finite: Array = HostArray(np.empty((0, 0), np.bool_))
        self.steps = self.done = 0

    def begin(self, schedule: npt.NDArray[np.float32], noise: npt.NDArray[np.float32] | None = None) -> None:
        """`schedule` [S, B, 11] and, where a sampler draws, `noise` [S, B, C, h, w] go to the device once."""
        self.steps, self.done = len(schedule), 0
        same = self._schedule.shape == schedule.shape and (self._noise is None) == (noise is None)
        if self._whole is not None and same:  # it reads the tables where they are
            self._schedule.write(..., schedule)
            self._finite.write(..., True)
            if self._noise is not None and noise is not None:
                self._noise.write(..., noise)
            return
        self._whole = None
        self._schedule = self._queue.put(schedule)
        self._noise = None if noise is None else self._queue.put(noise)
        self._finite = self._queue.put(np.ones(schedule.shape[:2], np.bool_))

    def step(self) -> None:
        """Queues one step and does not wait for it: replayed, where it could be captured."""
        self._feed(self.done)
        if self._captures and self._step is None and self._warm >= _WARM_UP:
            self._step = self._captured(self._advance)
        (self._step or self._advance)()
        self._keep(self.done)
        self._warm += 1
        self.done += 1

    def finish(self) -> None:
        """Queues all steps that are left: replayed as one piece, where that could be captured and they are all."""
        if self.done == 0 and self._captures and self._warm >= _WARM_UP:
            self._whole = self._whole or self._captured(self._advance_all)
            if self._whole is not None:
                self._whole()
                self.done = self.steps
        while self.done < self.steps:
            self.step()

    @property
    def sample(self) -> NumpyArray:
        """The state after the last step that was queued [B, C, h, w]. Waits."""
        return self.binding.inputs["sample"].numpy()

    @property
    def denoised(self) -> NumpyArray:
        """The picture as the model sees it after the last step [B, C, h, w], to preview. Waits."""
        return self.binding.inputs["previous"].numpy()

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Of the steps that were queued, whether each row was free of NaN and infinity [done, B]. Waits."""
        return self._finite.numpy()[: self.done]

    def _captured(self, work: Callable[[], None]) -> Replay | None:
        """The work to be replayed; None, and no other try, where the engine refuses."""
        try:
            return self._queue.capture(work)
        except EngineError:
            self._captures = False
            return None

    def _advance_all(self) -> None:
        for step in range(self.steps):
            self._feed(step)
            self._advance()
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._queue.keep(self._finite, step, self.binding.outputs["finite"])

    def _feed(self, step: int) -> None:
        inputs = self.binding.inputs
        self._queue.copy(inputs["schedule"], self._schedule, step)
        if self._noise is not None:
            self._queue.copy(inputs["noise"], self._noise, step)

    def _advance(self) -> None:
        """One run of the graph, and what it gave becomes what it takes."""
        inputs, outputs = self.binding.inputs, self.binding.outputs
        self._queue.run(self.binding)
        self._queue.copy(inputs["sample"], outputs["next_sample"])
        self._queue.copy(inputs["previous"], outputs["denoised"])
