"""The processes of the serving benchmark: a real `ti-serve` on one core, and the scheduler alone on the same core.

The benchmark itself, which makes the load, stays on the other core. Linux only: it reads /proc.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx
import numpy as np

from oneword.runtime.concept import Concept, concept_bytes, concept_of, read_safetensors

SERVER_CORE: Final = 0
LOAD_CORE: Final = 1
CORES: Final = frozenset(os.sched_getaffinity(0))
"""Those that this process may use, before it moves itself to one of them."""
ROOT: Final = Path(__file__).resolve().parent.parent.parent
_START_SECONDS: Final = 120.0
_SAMPLE: Final = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Setup:
    """What every section needs. `scale` shortens all of them: 1 is the full benchmark."""

    bundle: Path
    work: Path
    engine: str = "onnxruntime"
    scale: float = 1.0

    def count(self, full: int, least: int = 1) -> int:
        """A number of things, at this scale."""
        return max(least, round(full * self.scale))

    def seconds(self, full: float, least: float = 2.0) -> float:
        """A duration, at this scale."""
        return max(least, full * self.scale)

    def log(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Moves this thread to a core for the duration of the block; what it starts there stays there."""
    before = os.sched_getaffinity(0)
    if core in CORES:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """`ti-serve`, unmodified but for `changes` (see `benchmarks.served.changes`), with its watchdog. A context manager.

    Its output goes to a log file. `words` are put into it before it counts as started.
    """

    def __init__(
        self,
        setup: Setup,
        name: str,
        *arguments: str,
        changes: Mapping[str, Any] | None = None,
        words: Sequence[Concept] = (),
        store: Path | None = None,
    ) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        folder = setup.work / name
        folder.mkdir(parents=True, exist_ok=True)
        store = store or folder / f"words-{time.time_ns()}"
        command = [sys.executable, "-m", "oneword.serve.cli", str(setup.bundle), "--engine", setup.engine]
        command += ["--threads", "1", "--port", str(self.port), "--words", str(store)]
        command += ["--jobs", str(folder / "jobs"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if changes:
            path.insert(0, str(Path(__file__).parent / "injected"))
            environment["ONEWORD_BENCHMARK"] = json.dumps(changes)
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self._log = (folder / "server.log").open("ab")
        with on_core(SERVER_CORE):
            self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)
        try:
            self.wait_ready()
            with self.client() as client:
                for word in words:
                    client.put(f"/v1/words/{quoted(word.token)}", content=concept_bytes(word)).raise_for_status()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self) -> httpx.Client:
        """A client for questions beside the load."""
        return httpx.Client(base_url=self.url, timeout=60)

    def wait_ready(self, seconds: float = _START_SECONDS) -> None:
        """Waits until the server is ready. Raises RuntimeError if it ended, or takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: see {self._log.name}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the server was not ready after {seconds:g} s: see {self._log.name}")

    @property
    def child(self) -> int | None:
        """The id of the serving process; the watchdog's is `process.pid`."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            ids = children.read_text().split()
            return int(ids[0]) if ids else None
        return None

    @property
    def resident_mb(self) -> float:
        """Resident memory of the serving process, in MB."""
        status = Path(f"/proc/{self.child}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found, status
        return int(found[1]) * 1024 / 1e6

    @property
    def open_files(self) -> int:
        """Open file descriptors of the serving process."""
        return len(os.listdir(f"/proc/{self.child}/fd"))

    def metrics(self) -> dict[str, float]:
        """The server's own figures: name, with its labels if it has some, without the prefix."""
        return read_metrics(httpx.get(f"{self.url}/metrics", timeout=60).text)

    def wait_idle(self, seconds: float = 120.0) -> float:
        """Waits until no work is accepted, and returns for how long; infinity if there still is some."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < seconds:
            if self.metrics()["queued_seconds"] == 0:
                return waited
            time.sleep(0.02)
        return float("inf")

    def ended(self, seconds: float = 120.0) -> int:
        """Waits until it has ended by itself. Returns the exit status."""
        try:
            return int(self.process.wait(seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._log.close()

    def stop(self, seconds: float = 60.0) -> int:
        """Ends it by SIGTERM, and by SIGKILL after so long. Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()
        return int(self.process.wait())

    def kill(self) -> None:
        """Ends the watchdog, so that nothing starts again, and the serving process."""
        child = self.child
        self.process.kill()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus's text as name -> value, without the prefix of this server's names."""
    return {name.removeprefix("oneword_") + labels: float(value) for name, labels, value in _SAMPLE.findall(text)}


def quoted(token: str) -> str:
    """A word's name in a path."""
    return token.replace("<", "%3C").replace(">", "%3E")


def random_words(bundle: Path, tokens: Sequence[str], seed: int = 0) -> list[Concept]:
    """Words of 1 to 3 vectors, each the mean of four rows of the model's table."""
    from oneword.runtime.bundle import Bundle
    from oneword.runtime.table import base_table

    opened = Bundle.open(bundle)
    tables = {encoder.graph: base_table(opened.file(encoder.table)) for encoder in opened.manifest.encoders}
    rng = np.random.default_rng(seed)
    common = min(2000, *map(len, tables.values()))
    words = []
    for number, token in enumerate(tokens):
        rows = rng.integers(0, common, (1 + number % 3, 4))
        vectors = {name: table[rows].mean(axis=1, dtype=np.float32) for name, table in tables.items()}
        words.append(Concept(token, vectors))
    return words


@dataclass
class Drawn:
    """What the scheduler made of some requests that it got together."""

    seconds: float
    step_seconds: float
    """Mean over the turns."""
    turns: int
    pictures: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By request and index."""


class Engine:
    """The scheduler without HTTP, on the server's core, in a process of its own. A context manager."""

    def __init__(self, setup: Setup, words: Sequence[Concept] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, setup.bundle, setup.engine, [concept_bytes(word) for word in words])
        with on_core(SERVER_CORE):
            self._process = context.Process(target=_run_engine, args=arguments, daemon=True)
            self._process.start()
        theirs.close()
        self.backend = str(self._pipe.recv())
        """The engine of `denoise_step`, its version and precision: `onnxruntime 1.32.0 cpu fp32`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join(10)

    def draw(self, requests: Sequence[Mapping[str, Any]], keep: bool = False) -> Drawn:
        """Draws requests together; with `keep`, their pictures come back too."""
        self._pipe.send(("draw", [*requests], keep))
        result: Drawn = self._pipe.recv()
        return result

    def saturate(self, seed: int, sizes: Sequence[tuple[int, int]], backlog: int, seconds: float) -> float:
        """Branches per second of mixed requests in a closed loop with a backlog of so many pictures."""
        self._pipe.send(("saturate", seed, [*sizes], backlog, seconds))
        return float(self._pipe.recv())


def _run_engine(pipe: Any, bundle: Path, backend: str, words: Sequence[bytes]) -> None:
    from oneword.runtime.model import Model
    from oneword.runtime.scheduler import Scheduler

    model = Model.open(bundle, backend, threads=1)
    for data in words:
        model.load(concept_of(*read_safetensors(data, "word"), "word"))
    scheduler = Scheduler(model)
    scheduler.warm()
    commands: dict[str, Callable[..., Any]] = {"draw": drawn, "saturate": _saturate}
    pipe.send(model.engine("denoise_step").backend)
    while (command := pipe.recv()) is not None:
        name, *arguments = command
        pipe.send(commands[name](scheduler, *arguments))


def drawn(scheduler: Any, requests: Sequence[Mapping[str, Any]], keep: bool) -> Drawn:
    """What a scheduler makes of some requests that it gets together."""
    from oneword.runtime.events import PictureDone
    from oneword.runtime.request import Request

    start, denoising = time.perf_counter(), scheduler.seconds["denoise"]
    ids = {scheduler.add(Request(**settings)): number for number, settings in enumerate(requests)}
    turns, pictures = 0, {}
    while scheduler:
        turns += 1
        for event in scheduler.step():
            if isinstance(event, PictureDone):
                pictures[ids[event.id], event.index] = event.image if keep else None
    seconds = time.perf_counter() - start
    return Drawn(seconds, (scheduler.seconds["denoise"] - denoising) / turns, turns, pictures)


def _saturate(scheduler: Any, seed: int, sizes: Any, backlog: int, seconds: float) -> float:
    from benchmarks.arrivals import orders
    from oneword.runtime.events import StepDone
    from oneword.runtime.request import Request

    source, per_step, branches = orders(seed, sizes), dict[int, int](), 0
    lead, start = seconds / 4, time.perf_counter()
    while (now := time.perf_counter() - start) < seconds + lead:
        while len(scheduler) < backlog:
            order = next(source)
            per_step[scheduler.add(Request(**order.settings))] = order.branches
        for event in scheduler.step():
            if isinstance(event, StepDone) and now >= lead:
                branches += per_step[event.id]
    scheduler.cancel_all()
    return branches / seconds
