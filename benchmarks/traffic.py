"""Many users at once: mixed requests arrive while earlier ones are still running.

    python -m benchmarks.traffic                       both engines
    python -m benchmarks.traffic --old PATH            compared with the code before slots, a checkout at PATH
    python -m benchmarks.traffic --old PATH --write    also writes docs/results/traffic.md
    python -m benchmarks.traffic --quick               seconds instead of minutes: checks that everything runs

Runs the miniature on each CPU engine, without a server; every contender has its own process. Requests come from
`benchmarks.arrivals`: first of one size (64x64), then alternating between two sizes. Time is real. A request that
arrives during a turn is added when the turn ends. Adding, which includes tokenizing, is part of the next turn. Old and
new code get the same requests at the same times. Prints tables and ends in one line of JSON.

Phases, per set of sizes:

    closed    requests are added as long as fewer pictures are unfinished than twice the slots of all sizes
    0.6, 0.8  a Poisson process of this load

Terms:

    alone         The engine's own time at N branches. After every third turn the clock is stopped and the turn's calls
                  of `denoise_step` are repeated back to back. Other load on the machine affects both. Pairs that
                  differ by more than a factor of two are dropped.
    engine-busy   Time inside a binding's run of `denoise_step`.
    full batches  For the same mix of N: the branches of all calls, divided by the time these calls take alone, which is
                  the busy time multiplied by the ratio of alone to busy in the pairs.
    load          Arrival rate multiplied by the mean branch evaluations per request, divided by the branch evaluations
                  per second of the new code in the closed loop with the same sizes. The number of arrivals is chosen to
                  meet it. Measurement starts after a quarter of a phase.
    other work    Encoding and decoding; their time in the engines is added to that of the full batches.
    useful        Branch evaluations that a step of a picture needed, counted from its events: 2 with guidance, else 1.
    wait          From a picture's arrival to the end of the turn that ran its first step. In turns: those that ended
                  after the arrival, up to and including that of the first step; 2 is the turn it arrived in and the
                  next. "Slot free": on arrival, fewer pictures of its size were unfinished, or ahead of it in its own
                  request, than there are slots.
    overhead      A turn's time minus the engine's own time at the N of its calls (the median alone, interpolated
                  between measured N): encoding, decoding and the host together.
    bindings      Bindings of `denoise_step` created in all phases. The new code is warmed up first; the old code cannot
                  be.

p99 is the smallest value that 99 of 100 do not exceed. On the tests' simulated CUDA, which captures runs as TensorRT
does, replayed steps and padding are counted; its times mean nothing, and its load is relative to its own closed loop.
A busy machine makes every time worse: run this on an idle one. Not covered: prompts of several chunks, limited guidance
intervals, HTTP, GPUs.
"""

import argparse
import bisect
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.arrivals import Order, Size, open_loop, orders
from benchmarks.contenders import DENOISE, Contender, New, Old, Run, on_simulated_cuda
from benchmarks.pages import RESULTS, empty_page, provenance, write_section
from benchmarks.pages import table as markdown_table

ENGINES = ("onnxruntime", "openvino")
SIZES: dict[str, tuple[Size, ...]] = {"one size": ((64, 64),), "two sizes": ((64, 64), (96, 64))}
LOADS = (0.6, 0.8)
SIMULATED = "simulated CUDA"
PAGE = RESULTS / "traffic.md"
NEW_PAGE = empty_page("Traffic", "Mixed requests that arrive at random, on the miniature.", "traffic")
TURNS_PER_RERUN = 3  # one turn in so many is measured alone


@dataclass(frozen=True)
class Bar:
    """A number of a phase that has a target."""

    phase: str
    key: str
    title: str
    limit: float
    least: bool = False

    def met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value >= self.limit if self.least else value <= self.limit


BARS = (
    Bar(
        "closed",
        "busy_rate",
        "closed loop: branches per second of engine time, relative to full batches",
        0.95,
        least=True,
    ),
    Bar("closed", "rate", "closed loop: branches per second, relative to full batches", 0.95, least=True),
    Bar("0.6", "busy_rate", "load 0.6: branches per second of engine time, relative to full batches", 0.95, least=True),
    Bar("0.8", "busy_rate", "load 0.8: branches per second of engine time, relative to full batches", 0.95, least=True),
    Bar("0.6", "wait_turns", "load 0.6: wait for the first step, turns, p99", 2),
    Bar("0.6", "wait_median_turns", "load 0.6: the same, in median turns", 2),
    Bar("0.8", "free_turns", "load 0.8, slot free: wait for the first step, turns, p99", 2),
    Bar("0.8", "free_median_turns", "load 0.8, slot free: the same, in median turns", 2),
    Bar("0.6", "overhead", "load 0.6: overhead of a turn, in median turns, p99", 0.5),
    Bar("0.8", "overhead", "load 0.8: overhead of a turn, in median turns, p99", 0.5),
    Bar("all", "bindings", "bindings created after warm-up", 0),
)
SIMULATED_BARS = (
    Bar("all", "replayed", "share of steps that were replayed", 0.95, least=True),
    Bar("all", "useful", "share of branches that were useful", 0.9, least=True),
)
PLAIN = (  # numbers without a target
    ("closed", "pictures_per_second", "closed loop: pictures per second"),
    ("closed", "branches_per_second", "closed loop: branches per second"),
    ("closed", "rate_with_other", "closed loop: branches per second, relative to full batches and the other work"),
    ("closed", "engine_share", "closed loop: share of time in `denoise_step`"),
    ("closed", "other_share", "closed loop: share of time in text encoder and VAE"),
    ("0.6", "turn_ms", "load 0.6: median turn, ms"),
    ("0.6", "wait_ms", "load 0.6: wait for the first step, ms, p99"),
    ("0.6", "free_turns", "load 0.6, slot free: wait for the first step, turns, p99"),
    ("0.6", "host", "load 0.6: time outside all engines, in median turns, p99"),
    ("0.8", "turn_ms", "load 0.8: median turn, ms"),
    ("0.8", "wait_ms", "load 0.8: wait for the first step, ms, p99"),
    ("0.8", "host", "load 0.8: time outside all engines, in median turns, p99"),
)

Result = dict[str, dict[str, float]]
"""Numbers per phase."""


class Clock:
    """Real seconds since its creation, without those while it was stopped."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock for the duration of the block."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn: its runs and, if measured, the time alone of each run of `denoise_step`."""

    start: float
    end: float
    useful: int
    runs: Sequence[Run]
    alone: Sequence[float] = ()

    @property
    def steps(self) -> list[Run]:
        """The runs of `denoise_step`."""
        return [run for run in self.runs if run.graph == DENOISE]


@dataclass(eq=False)
class Picture:
    """A picture's arrival, and the ends of the turns that ran its first and its last step."""

    arrived: float
    order: Order
    first: float = math.inf
    last: float = math.inf


@dataclass(eq=False)
class Log:
    """The events of a phase of `seconds`. Pictures are in order of arrival."""

    seconds: float
    slots: int
    turns: list[Turn] = field(default_factory=list)
    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)
    start: float = 0.0
    """Earlier turns and arrivals are not measured."""

    def after(self, start: float) -> "Log":
        """The same phase, measured from `start`."""
        return replace(self, start=start)


Feed = Callable[[float, int], list[tuple[float, Order]]]
"""(time, number of unfinished pictures) -> the requests to add now, with their arrival times."""


def main() -> None:
    """Runs every contender in turn, prints a table per engine and ends in one line of JSON."""
    options = _options()
    if options.contender:
        print(json.dumps(contend(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    engines = [name for name in options.engines if importlib.util.find_spec(name)]
    contenders = ["new", "old"] if options.old else ["new"]
    bundles = {name: _bundle(name, options) for name in contenders}
    load = [round(value, 1) for value in os.getloadavg()]
    results: dict[str, dict[str, dict[str, Result]]] = {}
    for engine in engines:
        new = _child("new", engine, bundles["new"], options)
        measured = {"new": new["sizes"]}
        if options.old:
            measured["old"] = _child("old", engine, bundles["old"], options, new["sizes"])["sizes"]
        results[new["backend"]] = measured
        print(f"\n{new['backend']}\n\n{table(measured)}\n")
    if not options.no_simulation:
        results[SIMULATED] = {"new": _child("simulated", SIMULATED, bundles["new"], options)["sizes"]}
        print(f"\n{SIMULATED}\n\n{table(results[SIMULATED], SIMULATED_BARS, ())}\n")
    if options.write:
        write_section(PAGE, "traffic", section(results, options, load), NEW_PAGE)
    print(json.dumps({"threads": options.threads, "load_average": load, "results": results}))


def contend(options: argparse.Namespace) -> dict[str, Any]:
    """Runs in a contender's own process: every phase of every set of sizes."""
    sizes = {name: SIZES[name] for name in options.sizes}
    distinct = [*dict.fromkeys(size for mix in sizes.values() for size in mix)]
    contender: Contender
    if options.contender == "simulated":
        contender = on_simulated_cuda(options.bundle, options.max_rows, distinct)
    else:
        make = New if options.contender == "new" else Old
        contender = make(options.bundle, options.engine, options.threads, options.max_rows, distinct)
    rates = json.loads(options.rates)
    results: dict[str, Result] = {}
    for number, (name, mix) in enumerate(sizes.items()):
        backlog = 2 * options.max_rows * len(mix)
        drive(contender, closed(orders(100 + number, mix), backlog), options.seconds / 4, Clock())  # warm-up
        bindings = contender.meter.bindings
        before = _counts(contender)
        phases: Result = {}
        log = drive(contender, closed(orders(10 + number, mix), backlog), options.seconds / 2, Clock())
        phases["closed"] = summary(log)
        rate = rates.get(name, phases["closed"]["branches_per_second"])
        lead, seconds = options.seconds / 4, options.seconds * 5 / 4
        for load in LOADS:
            source = orders(20 + number, mix)
            arrivals = open_loop(source, load * rate * seconds, seconds, 30 + number)
            phases[f"{load:g}"] = summary(drive(contender, scripted(arrivals), seconds, Clock()).after(lead))
        phases["all"] = {"bindings": contender.meter.bindings - bindings, **_shares(before, _counts(contender))}
        results[name] = phases
    return {"backend": contender.backend, "sizes": results}


def closed(source: Iterator[Order], backlog: int) -> Feed:
    """Feeds as many requests as keep `backlog` pictures unfinished."""

    def feed(now: float, pictures: int) -> list[tuple[float, Order]]:
        due = []
        while pictures < backlog:
            due.append((now, next(source)))
            pictures += due[-1][1].pictures
        return due

    return feed


def scripted(arrivals: Sequence[tuple[float, Order]]) -> Feed:
    """Feeds each request at its arrival time."""
    pending = list(arrivals)[::-1]

    def feed(now: float, _pictures: int) -> list[tuple[float, Order]]:
        due = []
        while pending and pending[-1][0] <= now:
            due.append(pending.pop())
        return due

    return feed


def drive(contender: Contender, feed: Feed, seconds: float, clock: Any) -> Log:
    """Feeds a contender for `seconds`, then waits at most as long for pictures that have not started.

    Unfinished requests are cancelled.
    """
    log, ids = Log(seconds, contender.max_rows), list[int]()
    while (start := clock.now()) < seconds or (
        start < 2 * seconds and any(picture.first == math.inf for picture in log.pictures.values())
    ):
        for arrived, order in feed(start, len(contender)) if start < seconds else ():
            ids.append(contender.add(order))
            for index in range(order.pictures):
                log.pictures[ids[-1], index] = Picture(arrived, order)
        if not len(contender):
            clock.sleep(2e-4)
            continue
        contender.meter.runs.clear()
        events = [event for event in contender.step() if hasattr(event, "step")]
        end = clock.now()
        runs = [*contender.meter.runs]
        useful = 0
        for event in events:
            picture = log.pictures[event.id, event.index]
            useful += picture.order.branches
            picture.first = min(picture.first, end)
            if event.step == event.steps:
                picture.last = end
        with clock.stopped():
            alone = [_seconds(run.rerun) for run in runs if run.rerun] if len(log.turns) % TURNS_PER_RERUN == 0 else []
        log.turns.append(Turn(start, end, useful, runs, alone))
    for id in ids:
        contender.cancel(id)
    while len(contender):
        contender.step()
    return log


def summary(log: Log) -> dict[str, float]:
    """The numbers of a phase; the module's docstring defines them."""
    turns = [turn for turn in log.turns if log.start <= turn.start and turn.end <= log.seconds] or log.turns[:1]
    ends = [turn.end for turn in log.turns]
    pairs = [pair for turn in turns for pair in zip(turn.steps, turn.alone, strict=False)]
    pairs = [(run, alone) for run, alone in pairs if 0.5 <= alone / run.seconds <= 2]
    ratio = sum(alone for _, alone in pairs) / sum(run.seconds for run, _ in pairs) if pairs else math.nan
    useful, ran = sum(turn.useful for turn in turns), sum(run.branches for turn in turns for run in turn.steps)
    busy = sum(run.seconds for turn in turns for run in turn.steps)
    other = sum(run.seconds for turn in turns for run in turn.runs) - busy
    wall = turns[-1].end - log.start
    full = ran / (busy * ratio) if pairs else useful / wall
    own_time = own_times(pairs)
    median = statistics.median(turn.end - turn.start for turn in turns)
    overheads = [turn.end - turn.start - sum(own_time(run) for run in turn.steps) for turn in turns]
    hosts = [turn.end - turn.start - sum(run.seconds for run in turn.runs) for turn in turns]
    waits, free = [], []
    for picture in (picture for picture in log.pictures.values() if picture.arrived >= log.start):
        first = min(picture.first, ends[-1])
        wait = first - picture.arrived, bisect.bisect_left(ends, first) - bisect.bisect_right(ends, picture.arrived) + 1
        waits.append(wait)
        if found_slot(log, picture):
            free.append(wait)
    return {
        "full_rate": full,
        "branches_per_second": useful / wall,
        "pictures_per_second": sum(log.start < picture.last <= turns[-1].end for picture in log.pictures.values())
        / wall,
        "busy_rate": useful / busy / full if busy else math.nan,
        "rate": useful / wall / full,
        "rate_with_other": (useful / full + other) / wall,
        "engine_share": busy / wall,
        "other_share": other / wall,
        "turns": len(turns),
        "pictures": len(waits),
        "pictures_free": len(free),
        "mean_branches": ran / max(1, sum(len(turn.steps) for turn in turns)),
        "turn_ms": 1e3 * median,
        "wait_turns": p99([turns for _, turns in waits]),
        "wait_ms": 1e3 * p99([seconds for seconds, _ in waits]),
        "wait_median_turns": p99([seconds for seconds, _ in waits]) / median,
        "free_turns": p99([turns for _, turns in free]),
        "free_median_turns": p99([seconds for seconds, _ in free]) / median,
        "overhead": p99(overheads) / median,
        "host": p99(hosts) / median,
        "host_ms": 1e3 * statistics.median(hosts),
    }


def own_times(pairs: Sequence[tuple[Run, float]]) -> Callable[[Run], float]:
    """The engine's own seconds at a run's size and N: the median alone, interpolated between measured N."""
    measured: dict[tuple[int, ...], dict[int, list[float]]] = {}
    for run, alone in pairs:
        measured.setdefault(run.size, {}).setdefault(run.branches, []).append(alone)
    points = {
        size: sorted((n, statistics.median(times)) for n, times in by_branches.items())
        for size, by_branches in measured.items()
    }

    def own_time(run: Run) -> float:
        known = points.get(run.size)
        if not known:
            return run.seconds
        (n0, t0), (n1, t1) = known[0], known[-1]
        for n, seconds in known:
            if n <= run.branches:
                n0, t0 = n, seconds
            if n >= run.branches:
                n1, t1 = n, seconds
                break
        if n0 == n1 or not n0 <= run.branches <= n1:
            return t0 if n0 >= run.branches else t1
        return t0 + (t1 - t0) * (run.branches - n0) / (n1 - n0)

    return own_time


def found_slot(log: Log, picture: Picture) -> bool:
    """Whether a slot of the picture's size was free when it arrived."""
    ahead = 0
    for other in log.pictures.values():
        if other is picture:
            break
        ahead += other.order.size == picture.order.size and other.last > picture.arrived
    return ahead < log.slots


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99 of 100 do not exceed; NaN if there are none."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else math.nan


def table(results: Mapping[str, Mapping[str, Result]], bars: Sequence[Bar] = BARS, plain: Any = PLAIN) -> str:
    """One engine's results in Markdown; values that miss their target are bold."""
    sizes = list(results["new"])
    columns = [(size, name) for size in sizes for name in results]
    rows = []
    for bar in bars:
        limit = f"{'at least' if bar.least else 'at most'} {bar.limit:g}" if bar.limit else "0"
        values = [results[name][size][bar.phase][bar.key] for size, name in columns]
        cells = [_number(value) if bar.met(value) else f"**{_number(value)}**" for value in values]
        rows.append([bar.title, limit, *cells])
    for phase, key, title in plain:
        rows.append([title, "", *(_number(results[name][size][phase][key]) for size, name in columns)])
    return markdown_table(["", "target", *(f"{size}, {name}" for size, name in columns)], rows)


def section(results: Mapping[str, Any], options: argparse.Namespace, load: Sequence[float]) -> str:
    """The generated part of docs/results/traffic.md."""
    parts = [
        provenance("traffic"),
        f"{options.threads} threads per engine, load average {load[0]:g} before the run, {options.max_rows} slots per "
        f"size, {options.seconds:g} s per load. The benchmark's docstring and [Results](README.md#terms) define the "
        "terms. Bold: misses its target.",
    ]
    for engine, measured in results.items():
        bars = (SIMULATED_BARS, ()) if engine == SIMULATED else (BARS, PLAIN)
        parts.append(f"## {engine}\n\n{table(measured, *bars)}")
    return "\n\n".join(parts)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _counts(contender: Contender) -> dict[str, int]:
    scheduler = getattr(contender, "scheduler", None)
    return {} if scheduler is None else dict(vars(scheduler.denoiser.stats))


def _shares(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """The shares of steps that were replayed and of branches that were useful, between two counts."""
    done = {name: after[name] - before[name] for name in after}
    if not done.get("steps"):
        return {}
    useful = done["branches"] - done["padding"]
    return {"replayed": done["replayed"] / done["steps"], "useful": useful / done["branches"]}


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value in range(100) else f"{value:.3g}"


def _bundle(name: str, options: argparse.Namespace) -> Path:
    """The miniature's bundle, exported by the contender's own code."""
    path: Path = (options.work / f"bundle-{name}").resolve()
    script = "from pathlib import Path; from benchmarks.exported import exported; "
    folder = options.old if name == "old" else Path.cwd()
    _python(["-c", f"{script}exported('miniature', Path({str(path)!r}))"], name, options, cwd=folder)
    return path


def _child(
    name: str, engine: str, bundle: Path, options: argparse.Namespace, new: Mapping[str, Result] | None = None
) -> dict[str, Any]:
    rates = {sizes: phases["closed"]["branches_per_second"] for sizes, phases in (new or {}).items()}
    line = ["-m", "benchmarks.traffic", "--contender", name, "--engine", engine, "--bundle", str(bundle)]
    line += ["--threads", str(options.threads), "--max-rows", str(options.max_rows), "--seconds", str(options.seconds)]
    line += ["--sizes", *options.sizes, "--rates", json.dumps(rates)]
    print(f"{engine}, {name} ...", file=sys.stderr)
    result: dict[str, Any] = json.loads(_python(line, name, options))
    return result


def _python(line: Sequence[str], name: str, options: argparse.Namespace, cwd: Path | None = None) -> str:
    """The last line that a Python process with the contender's code prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if name == "old":
        environment["PYTHONPATH"] = str(options.old.resolve() / "src")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *line],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=cwd,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)[:300]} failed with {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout of the code before slots (commit b533d72)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2, help="threads per engine")
    parser.add_argument("--max-rows", type=int, default=16, help="slots per size")
    parser.add_argument(
        "--seconds", type=float, default=16, help="duration of each load; the closed loop takes half of it"
    )
    parser.add_argument("--no-simulation", action="store_true", help="skip the simulated CUDA")
    parser.add_argument("--quick", action="store_true", help="checks that everything runs; measures nothing")
    parser.add_argument("--write", action="store_true", help="write docs/results/traffic.md")
    parser.add_argument("--work", type=Path, default=Path("build/traffic"), help="folder for bundles")
    for name in ("--contender", "--engine", "--bundle"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--rates", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick measures nothing to write: leave out --quick or --write")
    if options.quick and not options.contender:
        options.seconds, options.max_rows, options.sizes = 2.0, 4, ["two sizes"]
    return options


if __name__ == "__main__":
    main()
