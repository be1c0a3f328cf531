"""A server's parent process, with real children: they raise, hang, are killed, and lose their parent."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oneword.serve.watchdog import WatchdogSettings

SECONDS = 60.0
"""More than anything here takes: a test that waits for so long fails."""

PARENT = """
import sys
from oneword.serve.watchdog import WatchdogSettings, watch
assert not {"numpy", "fastapi", "asyncio"} & set(sys.modules)
sys.exit(watch([sys.executable, "-c", sys.argv[1], *sys.argv[3:]], eval(sys.argv[2])))
"""

BEATING = """
import os, signal, sys, threading, time
from oneword.serve.watchdog import Heartbeat, Pulse
def beat(pulse=lambda: Pulse.WORKING):
    heartbeat = Heartbeat.from_environment(pulse, seconds=0.1, grace_seconds=1.0)
    assert heartbeat is not None
    heartbeat.start()
def say(word):
    os.write(1, f"{word}\\n".encode())
"""

ENGINE = """
import ctypes
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.scheduler import Scheduler
from oneword.serve.worker import Step, Worker
worker = Worker(lambda: Model.open(sys.argv[1], "onnxruntime", threads=1), max_rows=2)
worker.start()
pulses = [Pulse.STARTING]
works = threading.Event()
def pulse():
    if pulses[-1] is Pulse.WORKING:  # it has been written
        works.set()
    pulses.append(worker.pulse(hang_seconds=0.5))
    return pulses[-1]
beat(pulse)
works.wait()
running = threading.Event()
def listen(event):
    if isinstance(event, Step):
        running.set()
worker.submit(Request("a cat", steps=900), frozenset(), listen)
running.wait()
"""

RELOADS = """
signal.signal(signal.SIGHUP, lambda number, frame: say("reloaded"))
beat()
say("ready")
while True:
    signal.pause()
"""


class Process:
    """A parent process, its output line by line, and what is left of it at the end."""

    def __init__(self, child: str, settings: WatchdogSettings, *arguments: str) -> None:
        code = textwrap.dedent(child)
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PARENT, BEATING + code, repr(settings), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def line(self) -> str:
        """The next line on standard output; empty at its end."""
        assert self.popen.stdout is not None
        readable, _, _ = select.select([self.popen.stdout], [], [], SECONDS)
        assert readable, "nothing was printed"
        return self.popen.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Exit status and standard error, once it has ended."""
        _, errors = self.popen.communicate(timeout=SECONDS)
        return self.popen.returncode, errors


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.popen.kill()
        process.popen.communicate()


def start(
    processes: list[Process],
    child: str,
    *arguments: str,
    hang: float = SECONDS,
    supervise: bool = False,
    starts: int = 5,
) -> Process:
    settings = WatchdogSettings(
        hang_seconds=hang,
        start_seconds=SECONDS,
        grace_seconds=2.0,
        supervise=supervise,
        first_delay=0.05,
        longest_delay=0.1,
        starts=starts,
    )
    processes.append(Process(child, settings, *arguments))
    return processes[-1]


def gone(pid: int) -> bool:
    """Whether a process has ended, after waiting for that."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], SECONDS)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("status", [0, 1, 2, 7])
def test_the_exit_status_is_the_childs(processes: list[Process], status: int) -> None:
    assert start(processes, f"beat(); sys.exit({status})").end() == (status, "")


def test_an_exception_on_the_engine_thread_ends_the_server(processes: list[Process], tiny_bundle: Path) -> None:
    child = """
    def broken(scheduler):
        raise ZeroDivisionError
    Scheduler.step = broken
    threading.Event().wait()
    """
    status, errors = start(processes, ENGINE + textwrap.dedent(child), str(tiny_bundle)).end()

    assert status == 1
    assert "the engine failed" in errors


def test_an_engine_thread_that_hangs_ends_the_server(processes: list[Process], tiny_bundle: Path) -> None:
    child = """
    Scheduler.step = lambda scheduler: threading.Event().wait()
    threading.Event().wait()
    """
    status, errors = start(processes, ENGINE + textwrap.dedent(child), str(tiny_bundle)).end()

    assert status == 1
    assert "the engine hangs" in errors


def test_native_code_that_holds_the_interpreter_ends_the_server(processes: list[Process], tiny_bundle: Path) -> None:
    child = """
    def hanging(scheduler):
        say("hangs")
        ctypes.PyDLL(None).sleep(600)  # unlike CDLL, it keeps the lock
    Scheduler.step = hanging
    threading.Event().wait()
    """
    process = start(processes, ENGINE + textwrap.dedent(child), str(tiny_bundle), hang=2.0)

    assert process.line() == "hangs"
    status, errors = process.end()
    assert status == 1
    assert "silent for 2 seconds" in errors


def test_a_killed_server_is_started_again_if_it_is_supervised(processes: list[Process]) -> None:
    child = """
    beat()
    say(os.getpid())
    threading.Event().wait()
    """
    process = start(processes, child, supervise=True)
    first = int(process.line())
    os.kill(first, signal.SIGKILL)
    second = int(process.line())
    process.popen.terminate()
    status, errors = process.end()

    assert second != first
    assert gone(second)
    assert status == 128 + signal.SIGTERM
    assert "starting it again" in errors


def test_a_killed_server_is_an_error_if_it_is_not_supervised(processes: list[Process]) -> None:
    process = start(processes, "beat(); say(os.getpid()); threading.Event().wait()")
    os.kill(int(process.line()), signal.SIGKILL)

    assert process.end() == (1, "")


def test_a_hung_and_a_failed_server_are_started_again_if_they_are_supervised(
    processes: list[Process], tmp_path: Path
) -> None:
    child = """
    with open(sys.argv[1], "a+") as file:
        file.write("x")
        file.flush()
        file.seek(0)
        starts = len(file.read())
    say(starts)
    beat(lambda: {1: Pulse.HANGING, 2: Pulse.FAILED}.get(starts, Pulse.WORKING))
    if starts == 3:
        sys.exit(0)
    threading.Event().wait()
    """
    process = start(processes, child, str(tmp_path / "starts"), supervise=True)

    assert [process.line() for _ in range(3)] == ["1", "2", "3"]
    status, errors = process.end()
    assert status == 0
    assert "hangs" in errors
    assert "failed" in errors


def test_a_server_that_never_works_is_given_up(processes: list[Process]) -> None:
    child = "os.kill(os.getpid(), signal.SIGKILL)"
    status, errors = start(processes, child, supervise=True, starts=3).end()

    assert status == 1
    assert errors.count("starting it again") == 2
    assert "3 times in a row: giving up" in errors


def test_a_server_that_ends_by_itself_before_any_has_worked_is_not_tried_again(processes: list[Process]) -> None:
    assert start(processes, "sys.exit(3)", supervise=True).end() == (3, "")


def test_a_server_that_has_worked_once_is_tried_again_however_it_ends(processes: list[Process], tmp_path: Path) -> None:
    child = """
    say("x")
    if os.path.exists(sys.argv[1]):
        sys.exit(3)
    open(sys.argv[1], "x").close()
    pulses = []
    def pulse():
        pulses.append(Pulse.WORKING)
        return Pulse.WORKING
    beat(pulse)
    while len(pulses) < 2:
        time.sleep(0.01)
    sys.exit(1)
    """
    status, errors = start(processes, child, str(tmp_path / "worked"), supervise=True, starts=3).end()

    assert status == 3
    assert errors.count("starting it again") == 3


def test_a_server_asks_for_its_settings(processes: list[Process]) -> None:
    child = """
    heartbeat = Heartbeat.from_environment(lambda: Pulse.WORKING, seconds=0.1)
    heartbeat.start()
    heartbeat.ask(hang_seconds=1.5, supervise=True)
    say(os.getpid())
    def hang():
        import ctypes
        ctypes.PyDLL(None).sleep(600)
    time.sleep(0.5)
    hang()
    """
    process = start(processes, child)

    assert process.line() != process.line()
    process.popen.terminate()
    _, errors = process.end()
    assert "silent for 1.5 seconds" in errors


def test_a_wrong_command_line_is_not_tried_again(processes: list[Process]) -> None:
    assert start(processes, "sys.exit(2)", supervise=True).end() == (2, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_end_reaches_the_server_which_ends_in_its_way(processes: list[Process], name: str) -> None:
    child = """
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (say(signal.Signals(number).name), ended.set()))
    beat()
    say("ready")
    ended.wait()
    sys.exit(0)
    """
    process = start(processes, child, supervise=True)
    assert process.line() == "ready"
    process.popen.send_signal(signal.Signals[name])

    assert process.line() == name
    assert process.end() == (0, "")


def test_sighup_reaches_the_server_which_goes_on(processes: list[Process]) -> None:
    process = start(processes, RELOADS)
    assert process.line() == "ready"
    for _ in range(2):
        process.popen.send_signal(signal.SIGHUP)
        assert process.line() == "reloaded"
    assert process.popen.poll() is None


def test_sighup_does_not_end_a_server_that_does_not_handle_it_yet(processes: list[Process]) -> None:
    process = start(processes, f'say("starting")\nsys.stdin.readline()\n{RELOADS}')
    assert process.line() == "starting"
    process.popen.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # it is passed on
    assert process.popen.stdin is not None
    process.popen.stdin.write("go on\n")
    process.popen.stdin.flush()
    assert process.line() == "ready"
    process.popen.send_signal(signal.SIGHUP)
    assert process.line() == "reloaded"


@pytest.mark.parametrize("obedient", [True, False])
def test_the_server_ends_when_its_parent_is_killed(processes: list[Process], obedient: bool) -> None:
    child = f"""
    if not {obedient}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    beat()
    say(os.getpid())
    threading.Event().wait()
    """
    process = start(processes, child)
    pid = int(process.line())
    process.popen.kill()

    assert gone(pid)


def test_a_process_without_a_watchdog_has_no_heartbeat() -> None:
    code = BEATING + "assert Heartbeat.from_environment(lambda: Pulse.WORKING) is None"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)
