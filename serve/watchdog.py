"""The parent process of a server: ends one that has failed or hangs, and starts it again if it should.

    sys.exit(watch([sys.executable, "-m", ...], WatchdogSettings()))        parent
    heartbeat = Heartbeat.from_environment(pulse); heartbeat.start()        child

The child writes a line per second into a pipe: whether it starts, works, has failed or hangs, as `pulse` says. No line
at all means that it hangs in native code that holds the interpreter. With a line of JSON it requests settings. SIGTERM,
SIGINT and SIGHUP are passed on to the child, which ignores SIGHUP until it has a handler; when the parent dies, the
pipe breaks and the child ends too. Imports nothing but the standard library, so that the parent stays small. POSIX
only. Not covered: what counts as a hang (`Worker.stalled`).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

VARIABLE: Final = "ONEWORD_HEARTBEAT"
"""The environment variable that holds the file descriptor of the child's end of the pipe."""
FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FINAL: Final = (0, 2)  # exit statuses after which no child is started: done, and wrong usage


class Pulse(Enum):
    """The state of a child, as it reports it."""

    STARTING = b"s"
    WORKING = b"."
    FAILED = b"f"
    HANGING = b"h"


class End(Enum):
    """How a child ended."""

    EXITED = "exited"
    KILLED = "was killed"
    FAILED = "failed"
    HUNG = "hung"


@dataclass(frozen=True)
class WatchdogSettings:
    """When a child is ended, and how often it is started."""

    hang_seconds: float = 30.0
    """A child that works and is silent for so long is killed."""
    start_seconds: float = 600.0
    """The same for one that has not worked yet: libraries may hold the interpreter while they open a model."""
    grace_seconds: float = 5.0
    """A child that has failed may answer its clients for so long."""
    supervise: bool = False
    """Whether to start another child after one that ended by itself, failed or hung."""
    first_delay: float = 1.0
    """Seconds before another start; twice as many each time until a child works."""
    longest_delay: float = 60.0
    starts: int = 5
    """Give up after so many children in a row that never worked."""


def watch(command: Sequence[str], settings: WatchdogSettings, report: Callable[[str], None] | None = None) -> int:
    """Runs a server until it ends, and returns the exit status: the child's, or 1 if it failed, hung or was killed.

    `report` gets a line whenever a child is ended or started again; by default it goes to standard error. Call it from
    the main thread, as it handles signals.
    """
    return _Watchdog(command, settings, _print if report is None else report).run()


class _Watchdog:
    def __init__(self, command: Sequence[str], settings: WatchdogSettings, report: Callable[[str], None]) -> None:
        self._command, self._settings, self._report = [*command], settings, report
        self._signals = -1  # the end of a pipe where the numbers of signals arrive
        self._asked_to_end = False
        self._has_worked = False  # any child

    def run(self) -> int:
        delay, failed_starts = self._settings.first_delay, 0
        with self._signals_as_bytes():
            while True:
                end, status, worked = self._run_child()
                self._has_worked = self._has_worked or worked
                if worked:
                    delay, failed_starts = self._settings.first_delay, 0
                else:
                    failed_starts += 1
                if self._asked_to_end or not self._settings.supervise or self._is_final(end, status):
                    return status
                if failed_starts >= self._settings.starts:
                    self._report(f"the server did not start {failed_starts} times in a row: giving up")
                    return status
                self._report(f"the server {end.value} with status {status}: starting it again in {delay:g} seconds")
                if self._ends_within(delay):
                    return status
                delay = min(2 * delay, self._settings.longest_delay)

    def _is_final(self, end: End, status: int) -> bool:
        """Whether another child would end in the same way: the first one cannot start, and has said why."""
        return end is End.EXITED and (status in _FINAL or not self._has_worked)

    def _run_child(self) -> tuple[End, int, bool]:
        """How a child ended, the exit status that follows, and whether it ever worked."""
        pipe, heartbeat = os.pipe()
        environment = {**os.environ, VARIABLE: str(heartbeat)}
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: else it would end a child that starts
        try:
            # In a process group of its own: Ctrl-C in a terminal reaches it once, from here.
            child = subprocess.Popen(self._command, pass_fds=[heartbeat], env=environment, process_group=0)
        finally:
            signal.signal(signal.SIGHUP, handler)
            os.close(heartbeat)
        try:
            end, worked = self._follow(child, pipe)
            status = child.wait()
        finally:
            os.close(pipe)
        if status < 0 and end is End.EXITED:  # by a signal
            return End.KILLED, 128 - status if self._asked_to_end else 1, worked
        if end is not End.EXITED:
            return end, 1, worked
        return end, status, worked

    def _follow(self, child: subprocess.Popen[bytes], pipe: int) -> tuple[End, bool]:
        """Waits until a child ends or has to be ended. Returns how it ended, and whether it ever worked."""
        worked, heard, remainder = False, time.monotonic(), b""
        while True:
            settings = self._settings
            limit = settings.hang_seconds if worked else settings.start_seconds
            wait = max(0.0, heard + limit - time.monotonic())
            readable, _, _ = select.select([pipe, self._signals], [], [], wait)
            if self._signals in readable:
                self._forward(child)
            data = os.read(pipe, 4096) if pipe in readable else None
            if data == b"" or child.poll() is not None:
                _wait_or_kill(child, settings.grace_seconds)
                return End.EXITED, worked
            *lines, remainder = (remainder + (data or b"")).split(b"\n")
            pulses = [self._pulse(line) for line in lines]
            if pulses:
                heard = time.monotonic()
                worked = worked or Pulse.WORKING in pulses
                if Pulse.FAILED in pulses:
                    self._report("the engine failed: ending the server")
                    child.terminate()
                    _wait_or_kill(child, settings.grace_seconds)
                    return End.FAILED, worked
            hanging = Pulse.HANGING in pulses
            if hanging or not readable:
                self._report("the engine hangs" if hanging else f"the server was silent for {limit:g} seconds")
                child.kill()
                return End.HUNG, worked

    def _pulse(self, line: bytes) -> Pulse:
        """What a line from the child says; one that requests settings changes them, for later children too."""
        if line.startswith(b"{"):
            self._settings = replace(self._settings, **json.loads(line))
            return Pulse.STARTING
        return Pulse(line)

    def _forward(self, child: subprocess.Popen[bytes] | None) -> None:
        """Passes the signals that have arrived on to the child, if there is one."""
        for number in os.read(self._signals, 4096):
            if number in FORWARDED:
                self._asked_to_end = self._asked_to_end or number != signal.SIGHUP
                if child is not None:
                    child.send_signal(number)

    def _ends_within(self, seconds: float) -> bool:
        """Waits between two children; True as soon as a signal requests the end."""
        end = time.monotonic() + seconds
        while not self._asked_to_end and (left := end - time.monotonic()) > 0:
            if select.select([self._signals], [], [], left)[0]:
                self._forward(None)
        return self._asked_to_end

    @contextlib.contextmanager
    def _signals_as_bytes(self) -> Iterator[None]:
        """Signals arrive in a pipe, and are handled in the loop only: none is lost while there is no child."""
        self._signals, waker = os.pipe()
        os.set_blocking(waker, False)
        numbers = (*FORWARDED, signal.SIGCHLD)
        handlers = [signal.signal(number, lambda *_: None) for number in numbers]
        wakeup = signal.set_wakeup_fd(waker)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
            os.close(self._signals)
            os.close(waker)


class Heartbeat:
    """The child's side: a thread that writes a pulse per second. `pulse` may be replaced while it runs."""

    def __init__(
        self, descriptor: int, pulse: Callable[[], Pulse], *, seconds: float = 1.0, grace_seconds: float = 5.0
    ) -> None:
        """`descriptor` is the pipe's. When the parent dies, the process gets a SIGTERM and `grace_seconds` to end."""
        self.pulse = pulse
        self._descriptor = descriptor
        self._seconds, self._grace_seconds = seconds, grace_seconds
        self._thread = threading.Thread(target=self._run, name="oneword-heartbeat", daemon=True)

    @classmethod
    def from_environment(
        cls, pulse: Callable[[], Pulse], *, seconds: float = 1.0, grace_seconds: float = 5.0
    ) -> Self | None:
        """None if this process has no watchdog. Processes that this one starts do not inherit the pipe."""
        value = os.environ.pop(VARIABLE, None)
        if value is None:
            return None
        os.set_inheritable(int(value), False)
        os.set_blocking(int(value), False)
        return cls(int(value), pulse, seconds=seconds, grace_seconds=grace_seconds)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def ask(self, **settings: bool | float) -> None:
        """Asks the parent for other `WatchdogSettings`, by name."""
        os.write(self._descriptor, json.dumps(settings).encode() + b"\n")

    def beat(self) -> None:
        """Writes a pulse now."""
        with contextlib.suppress(BlockingIOError):  # a parent that is stopped does not read
            os.write(self._descriptor, self.pulse().value + b"\n")

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, 0)  # reports only that the pipe is broken
        with contextlib.suppress(BrokenPipeError):
            while True:
                self.beat()
                if poll.poll(1000 * self._seconds):
                    break
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._grace_seconds)
        os._exit(1)


def _wait_or_kill(child: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()


def _print(line: str) -> None:
    print(f"ti-serve: {line}", file=sys.stderr, flush=True)
