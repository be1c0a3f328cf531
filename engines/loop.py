"""The denoising loop over one binding of `denoise_step`, its state where the engine works. Knows no back end.

Between two steps nothing crosses to the host and nothing waits: the step's row of the schedule (and its noise) is
copied from a table on the device, the graph runs, its outputs become its inputs. `step` queues one step, captured once
for a binding and replayed after; `finish` queues all that are left as one captured piece. Reading waits.

On the host the same code runs step by step. What is encoded, drawn or decoded is not known here.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Array, Binding, HostArray, NumpyArray

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
    """

    def __init__(self, binding: Binding, queue: Queue) -> None:
        self.binding = binding
        self._queue = queue
        self._warm = False  # libraries allocate and tune at their first call, which therefore is not captured
        self._replay: Replay | None = None
        self.steps = self.done = 0

    def begin(self, schedule: npt.NDArray[np.float32], noise: npt.NDArray[np.float32] | None = None) -> None:
        """`schedule` [S, B, 11] and, where a sampler draws, `noise` [S, B, C, h, w] go to the device once."""
        self.steps, self.done = len(schedule), 0
        self._schedule = self._queue.put(schedule)
        self._noise = None if noise is None else self._queue.put(noise)
        self._finite = self._queue.put(np.ones(schedule.shape[:2], np.bool_))

    def step(self) -> None:
        """Queues one step and does not wait for it. The first of all is run as it is, the second captured."""
        self._feed(self.done)
        if not self._warm:
            self._advance()
            self._warm = True
        else:
            if self._replay is None:
                self._replay = self._queue.capture(self._advance)
            self._replay()
        self._queue.keep(self._finite, self.done, self.binding.outputs["finite"])
        self.done += 1

    def finish(self) -> None:
        """Queues all steps that are left, captured as one piece; the first step of all is run as it is."""
        if not self._warm and self.done < self.steps:
            self.step()
        left = range(self.done, self.steps)
        if left:
            self._queue.capture(lambda: self._whole(left))()
        self.done = self.steps

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

    def _whole(self, steps: range) -> None:
        for step in steps:
            self._feed(step)
            self._advance()
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
