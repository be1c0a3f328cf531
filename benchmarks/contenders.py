"""The contenders of `benchmarks.traffic`: this project's scheduler, on the host or on simulated CUDA, and the batch it
replaced. Each is imported when it is created, because both packages have the same name.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.arrivals import WORDS, Order, Size, word

DENOISE = "denoise_step"


@dataclass(frozen=True, eq=False)
class Run:
    """One call of an engine. `size`, `branches` and `rerun` are set for `denoise_step` only."""

    graph: str
    seconds: float
    size: tuple[int, ...] = ()
    """h and w of the latents."""
    branches: int = 0
    rerun: Callable[[], None] | None = None
    """Repeats the call; it changes no row's state."""


@dataclass(eq=False)
class Meter:
    """Times every run of every binding of the engines it watches."""

    runs: list[Run] = field(default_factory=list)
    """All runs since the list was last cleared."""
    bindings: int = 0
    """Bindings of `denoise_step` created so far."""

    def watch(self, engine: Any) -> None:
        """Starts timing an engine, which must not have bindings yet."""
        bind, run, name = engine.bind, engine.run, engine.name

        def timed_bind(*args: Any) -> Any:
            binding = bind(*args)
            size, branches, rerun = (), 0, None
            if name == DENOISE:
                self.bindings += 1
                size, rerun = binding.inputs["sample"].shape[2:], binding.run
                branches = binding.inputs["branch_row"].shape[0]
            binding.run = self._timed(binding.run, name, size, branches, rerun)
            return binding

        engine.bind, engine.run = timed_bind, self._timed(run, name)

    def _timed(self, call: Callable[..., Any], name: str, *facts: Any) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.runs.append(Run(name, time.perf_counter() - start, *facts))

        return timed


class Contender(Protocol):
    """A queue of requests that is advanced turn by turn."""

    max_rows: int
    meter: Meter
    backend: str
    """The engine of `denoise_step`, its version and precision."""

    def __len__(self) -> int:
        """Unfinished pictures."""
        ...

    def add(self, order: Order) -> int:
        """Adds a request and returns its id."""
        ...

    def step(self) -> Sequence[Any]:
        """Runs one turn and returns its events."""
        ...

    def cancel(self, id: int) -> None:
        """Cancels a request."""
        ...


class New:
    """`oneword.runtime.Scheduler`, warmed up."""

    def __init__(self, bundle: Path, engine: str, threads: int, max_rows: int, sizes: Iterable[Size]) -> None:
        from oneword.runtime.model import Model
        from oneword.runtime.scheduler import Scheduler

        self.max_rows, self.meter = max_rows, Meter()
        model = Model.open(bundle, engine, threads=threads)
        _prepare(model, self.meter)
        self.backend = model.engine(DENOISE).backend
        self.scheduler = Scheduler(model, max_rows)
        self.scheduler.warm(*sizes)

    def __len__(self) -> int:
        return len(self.scheduler)

    def add(self, order: Order) -> int:
        """See Contender."""
        return self.scheduler.add(_request(order))

    def step(self) -> Sequence[Any]:
        """See Contender."""
        return self.scheduler.step()

    def cancel(self, id: int) -> None:
        """See Contender."""
        self.scheduler.cancel(id)


class Old:
    """`oneword.runtime.batch.Batch`, which creates its bindings on demand."""

    def __init__(self, bundle: Path, engine: str, threads: int, max_rows: int, sizes: Iterable[Size]) -> None:
        from oneword.engines.open import Backend
        from oneword.runtime.batch import Batch  # type: ignore[import-not-found]
        from oneword.runtime.model import Model

        self.max_rows, self.meter = max_rows, Meter()
        open_model: Any = Model.open
        model = open_model(bundle, Backend(engine), threads)
        _prepare(model, self.meter)
        self.backend = model.engine(DENOISE).backend
        self.batch = Batch(model, max_rows, listen=True)

    def __len__(self) -> int:
        return len(self.batch)

    def add(self, order: Order) -> int:
        """See Contender."""
        return int(self.batch.add(_request(order)))

    def step(self) -> Sequence[Any]:
        """See Contender."""
        return list(self.batch.step())

    def cancel(self, id: int) -> None:
        """See Contender."""
        self.batch.cancel(id)


def on_simulated_cuda(bundle: Path, max_rows: int, sizes: Iterable[Size]) -> New:
    """The scheduler on the tests' simulated CUDA, which captures runs as TensorRT does.

    Patches modules of this process permanently.
    """
    from benchmarks.simulated import simulate_cuda

    simulate_cuda()
    return New(bundle, "onnxruntime-cuda", 1, max_rows, sizes)


def _prepare(model: Any, meter: Meter) -> None:
    """Opens every engine and loads learned words of 1 to 3 vectors, each vector the mean of four rows of the table."""
    from oneword.runtime.concept import Concept

    for name in model.manifest.graphs:
        meter.watch(model.engine(name))
    rng = np.random.default_rng(0)
    tables = {name: table.base for name, table in model._tables.items()}
    for number in range(WORDS):
        count = 1 + number % 3
        vectors = {
            name: table[rng.integers(0, 2000, (count, 4))].mean(axis=1, dtype=np.float32)
            for name, table in tables.items()
        }
        model.load(Concept(word(number), vectors))


def _request(order: Order) -> Any:
    from oneword.runtime.request import Request
    from oneword.runtime.samplers import Sampler

    return Request(**{**order.settings, "sampler": Sampler(order.settings["sampler"])})
