"""Processes that do some work when asked, in turn, alone and beside processes that only compute. Linux only.

What the work is, and what is concluded from its times, is up to `benchmarks.engine_threads` and `benchmarks.threads`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

Turns = dict[str, list[dict[str, float]]]
"""By setting: `ms` and `cpu_ms` of each turn."""


def measure(
    commands: Mapping[str, Sequence[object]], environments: Mapping[str, Mapping[str, str]], rounds: int, busy: int
) -> tuple[Turns, Turns]:
    """The turns of every setting, alone and beside `busy` processes; each command calls `serve`."""
    alone: Turns = {name: [] for name in commands}
    beside: Turns = {name: [] for name in commands}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(server(name, command, environments[name])) for name, command in commands.items()
        }
        for number in range(rounds):
            for name, process in processes.items():
                alone[name].append(turn(process))
                with busy_processes(busy):
                    beside[name].append(turn(process))
            load = Path("/proc/loadavg").read_text().split()[0]
            last = ", ".join(f"{name} {alone[name][-1]['ms']:.0f} / {beside[name][-1]['ms']:.0f}" for name in commands)
            print(f"round {number + 1} of {rounds}: {last} ms (load {load})", file=sys.stderr)
    return alone, beside


def serve(work: Callable[[], object], count: int) -> None:
    """Works `count` times per line on standard input; prints the milliseconds that once took, as JSON."""
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            work()
        spent = {"ms": time.perf_counter() - wall, "cpu_ms": time.process_time() - cpu}
        print(json.dumps({key: 1e3 * seconds / count for key, seconds in spent.items()}), flush=True)


def turn(process: subprocess.Popen[str]) -> dict[str, float]:
    """Asks a process for its work."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    result: dict[str, float] = json.loads(process.stdout.readline())
    return result


@contextmanager
def server(name: str, command: Sequence[object], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that works on request (`turn`). Raises SystemExit if it does not get ready."""
    with subprocess.Popen(
        [*map(str, command)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{name} does not run: is everything installed that it needs?")
            yield process
        finally:
            process.kill()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs `count` processes that compute without pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
