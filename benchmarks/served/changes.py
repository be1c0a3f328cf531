"""What the benchmark changes in a server's process, so that the product itself needs no hooks.

    switch_seconds    the interpreter's switch interval, whatever the server sets
    journal           a file that gets records of five doubles: their kind, and what is listed below
    leak              bytes that are kept for ever with each request
    fault             a file that makes the engine's next turn go wrong once, in the way that it names: `exception`;
                      `hang`, in native code; `hold`, the same while it holds the interpreter

    TURN        start, end, branches, rows
    WORK        end of a turn, seconds of it outside of the steps, bindings of `denoise_step` that it created
    FIRST_STEP  arrival of a picture's request, end of its first step
    LAST_STEP   end of a picture's last step
    PROMPT      time, 1 if the prompt was cached, 1 if it has a learned word

Times are monotonic, thus comparable between the processes of a machine. A picture's decoding and encoding are outside
of the steps, as is the scheduler's own work.
"""

import ctypes
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

TURN: Final = 1
FIRST_STEP: Final = 2
PROMPT: Final = 3
LAST_STEP: Final = 4
WORK: Final = 5
_RECORD: Final = struct.Struct("5d")
_FOR_EVER: Final = 3600


def apply(changes: Mapping[str, Any]) -> None:
    """Changes this process."""
    if "switch_seconds" in changes:
        set_interval = sys.setswitchinterval
        sys.setswitchinterval = lambda _seconds: set_interval(changes["switch_seconds"])
    if "journal" in changes:
        _keep_journal(changes["journal"])
    if "leak" in changes:
        _leak(changes["leak"])
    if "fault" in changes:
        _obey(Path(changes["fault"]))


def read_journal(path: Path, kind: int) -> npt.NDArray[np.float64]:
    """[N, 4]: the records of a kind so far."""
    values = np.frombuffer(path.read_bytes(), np.float64)
    values = values[: len(values) // 5 * 5].reshape(-1, 5)
    return values[values[:, 0] == kind, 1:]


def _keep_journal(path: str) -> None:
    from oneword.runtime.events import StepDone
    from oneword.runtime.model import Model
    from oneword.runtime.scheduler import Scheduler
    from oneword.serve.pool import Pool

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    guided: dict[int, Sequence[bool]] = {}
    add, step, encode, advance = Scheduler.add, Scheduler.step, Model.encode, Pool._advance

    def write(*values: float) -> None:
        os.write(file, _RECORD.pack(*values, *[0.0] * (5 - len(values))))

    def add_and_note(self: Any, request: Any, settings: Any = None) -> int:
        id = add(self, request, settings)
        guided[id] = settings.schedule.guided
        return id

    def step_and_note(self: Any, *args: Any) -> Any:
        start, denoising, bindings = time.monotonic(), self.seconds["denoise"], self.denoiser.stats.bindings
        events = step(self, *args)
        end = time.monotonic()
        denoising, bindings = self.seconds["denoise"] - denoising, self.denoiser.stats.bindings - bindings
        done = [event for event in events if isinstance(event, StepDone)]
        branches = sum(1 + int(guided[event.id][event.step - 1]) for event in done)
        for event in done:
            if event.step == event.steps:
                del guided[event.id]
                write(LAST_STEP, end)
        write(TURN, start, end, branches, len(done))
        write(WORK, end, end - start - denoising, bindings)
        return events

    def encode_and_note(self: Any, prompts: Sequence[Any], layers: Mapping[bytes, Any] | None = None) -> Any:
        for tokens in prompts:
            write(PROMPT, time.monotonic(), tokens.key in self._contexts, bool(tokens.concepts))
        return encode(self, prompts, layers)

    def advance_and_note(self: Any, picture: Any) -> None:
        if picture.step == 0 < picture.reported:  # the server may count it turns later
            write(FIRST_STEP, picture.generation.created, picture.first_step)
        advance(self, picture)

    Scheduler.add, Scheduler.step = add_and_note, step_and_note  # type: ignore[assignment, method-assign]
    Model.encode = encode_and_note  # type: ignore[method-assign]
    Pool._advance = advance_and_note  # type: ignore[method-assign]


def _leak(size: int) -> None:
    from oneword.serve.pool import Pool

    buffers, enter = list[bytes](), Pool.enter

    def enter_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        buffers.append(b"x" * (size + len(buffers) % 2))  # written to, so that it is resident
        return enter(self, *args, **kwargs)

    Pool.enter = enter_and_keep  # type: ignore[method-assign]


def _obey(order: Path) -> None:
    from oneword.runtime.scheduler import Scheduler

    step = Scheduler.step

    def step_or_fail(self: Any, *args: Any) -> Any:
        if order.exists():
            kind = order.read_text()
            order.unlink()
            match kind:
                case "exception":
                    raise RuntimeError("the benchmark's exception")
                case "hang":
                    ctypes.CDLL(None).sleep(_FOR_EVER)  # releases the interpreter
                case "hold":
                    ctypes.PyDLL(None).sleep(_FOR_EVER)
                case _:
                    raise ValueError(kind)
        return step(self, *args)

    Scheduler.step = step_or_fail  # type: ignore[assignment, method-assign]
