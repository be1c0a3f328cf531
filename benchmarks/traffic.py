"""Many users at once: mixed requests arrive while others are on their way.

    python -m benchmarks.traffic                       both engines; prints tables, ends in one line of JSON
    python -m benchmarks.traffic --old PATH            beside the code before slots, a checkout at PATH
    python -m benchmarks.traffic --old PATH --write    and writes docs/results/traffic.md
    python -m benchmarks.traffic --quick               seconds instead of minutes: does everything run?

The miniature, on each CPU engine; every contender in a process of its own, driven directly, without a server. Requests
are those of `benchmarks.arrivals`: of one size (64x64), then of two sizes in turn. Time is real. A request that arrives
during a turn is added when the turn ends, and a turn begins with adding: tokenizing is part of it. Old and new get the
same requests at the same times.

Phases, of each set of sizes:

    closed    whenever fewer than twice as many pictures as slots of each size are on their way, requests are added
    0.6, 0.8  a Poisson process of this load

Terms:

    alone         The engine's own time at N branches: right after every third turn the clock is stopped and the turn's
                  calls of `denoise_step` are run again, with nothing in between. What a neighbour on the machine
                  takes is in both. Pairs that differ by more than a factor of two are left out.
    engine-busy   Time inside a binding's run of `denoise_step`.
    full batches  Of the same mix of N: the branches of all calls over the time that these calls take alone, which is
                  busy time times the ratio of alone to busy in the pairs.
    load          Rate of arrival times mean branch evaluations of a request, over the branch evaluations per second of
                  the new code in the closed loop with the same sizes. The number of arrivals is chosen so that it is
                  met. A quarter of a phase passes before it is measured.
    other work    Encoding and decoding, whose time in the engines is added to that of the full batches.
    useful        Branch evaluations that a step of a picture needed, counted from its events: 2 with guidance, else 1.
    wait          From a picture's arrival to the end of the turn that made its first step; in turns, those that ended
                  after the arrival, the first step's included: 2 is the turn it arrived in and the next. "Slot free":
                  when it arrived, fewer pictures of its size than slots were on their way, or before it in its request.
    overhead      A turn's time less the engine's own time at the N of its calls (alone, the median; between measured N
                  interpolated): encoding, decoding and the host together.
    bindings      Made of `denoise_step` in all phases. The new code is warmed up first, the old one cannot be.

p99 is the smallest value that 99 in 100 do not exceed. On the simulated CUDA of the tests, whose runs are captured as
TensorRT's are, the steps that were replayed and the padding are counted; its times mean nothing, and its load is over
the closed loop's own rate. A busy machine makes every time here worse than it is: run it on a quiet one. Not here:
prompts of several chunks, limited guidance intervals, HTTP, GPUs.
"""

import argparse
import bisect
import contextlib
import datetime
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

ENGINES = ("onnxruntime", "openvino")
SIZES: dict[str, tuple[Size, ...]] = {"one size": ((64, 64),), "two sizes": ((64, 64), (96, 64))}
LOADS = (0.6, 0.8)
SIMULATED = "simulated CUDA"
PAGE = Path("docs/results/traffic.md")
BEGIN, END = "<!-- generated: traffic -->", "<!-- end -->"
EVERY = 3  # turns, of which one is measured alone


@dataclass(frozen=True)
class Bar:
    """One number of a phase that has an aim."""

    phase: str
    key: str
    title: str
    limit: float
    least: bool = False

    def met(self, value: float) -> bool:
        """Whether a value reaches the aim."""
        return value >= self.limit if self.least else value <= self.limit


BARS = (
    Bar("closed", "busy_rate", "closed loop: branches a second of engine time, over full batches", 0.95, least=True),
    Bar("closed", "rate", "closed loop: branches a second, over full batches", 0.95, least=True),
    Bar("0.6", "busy_rate", "load 0.6: branches a second of engine time, over full batches", 0.95, least=True),
    Bar("0.8", "busy_rate", "load 0.8: branches a second of engine time, over full batches", 0.95, least=True),
    Bar("0.6", "wait_turns", "load 0.6: wait for the first step, turns, p99", 2),
    Bar("0.6", "wait_median_turns", "load 0.6: the same, ms over the median turn", 2),
    Bar("0.8", "free_turns", "load 0.8, slot free: wait for the first step, turns, p99", 2),
    Bar("0.8", "free_median_turns", "load 0.8, slot free: the same, ms over the median turn", 2),
    Bar("0.6", "overhead", "load 0.6: overhead of a turn over the median turn, p99", 0.5),
    Bar("0.8", "overhead", "load 0.8: overhead of a turn over the median turn, p99", 0.5),
    Bar("all", "bindings", "bindings made after warm-up", 0),
)
SIMULATED_BARS = (
    Bar("all", "replayed", "steps replayed, of all", 0.95, least=True),
    Bar("all", "useful", "useful branches, of those run", 0.9, least=True),
)
PLAIN = (  # numbers without an aim
    ("closed", "pictures_per_second", "closed loop: pictures a second"),
    ("closed", "branches_per_second", "closed loop: branches a second"),
    ("closed", "rate_with_other", "closed loop: branches a second, over full batches and the other work"),
    ("closed", "engine_share", "closed loop: share of time in `denoise_step`"),
    ("closed", "other_share", "closed loop: share of time in text encoder and VAE"),
    ("0.6", "turn_ms", "load 0.6: median turn, ms"),
    ("0.6", "wait_ms", "load 0.6: wait for the first step, ms, p99"),
    ("0.6", "free_turns", "load 0.6, slot free: wait for the first step, turns, p99"),
    ("0.6", "host", "load 0.6: time outside all engines over the median turn, p99"),
    ("0.8", "turn_ms", "load 0.8: median turn, ms"),
    ("0.8", "wait_ms", "load 0.8: wait for the first step, ms, p99"),
    ("0.8", "host", "load 0.8: time outside all engines over the median turn, p99"),
)

Result = dict[str, dict[str, float]]
"""Numbers by phase."""


class Clock:
    """Real seconds since it was made, less those while it was stopped."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start

    def sleep(self, seconds: float) -> None:
        """Lets time pass."""
        time.sleep(seconds)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done within takes no time."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn: what was run, and for every run of `denoise_step` its time alone, if it was measured."""

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
    """A picture's times: arrival, the end of its first step's turn, the end of its last step's."""

    arrived: float
    order: Order
    first: float = math.inf
    last: float = math.inf


@dataclass(eq=False)
class Log:
    """What happened in a phase of so many seconds. Pictures are in the order of their arrival."""

    seconds: float
    slots: int
    turns: list[Turn] = field(default_factory=list)
    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)
    start: float = 0.0
    """Turns that began and pictures that arrived before it are not measured."""

    def after(self, start: float) -> "Log":
        """The same phase, measured from `start` on."""
        return replace(self, start=start)


Feed = Callable[[float, int], list[tuple[float, Order]]]
"""The requests to add now, each with its time of arrival, given the time and the pictures that are on their way."""


def main() -> None:
    """Runs every contender in turn, prints a table for each engine, ends in one line of JSON."""
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
        each = {"new": new["sizes"]}
        if options.old:
            each["old"] = _child("old", engine, bundles["old"], options, new["sizes"])["sizes"]
        results[new["backend"]] = each
        print(f"\n{new['backend']}\n\n{table(each)}\n")
    if not options.no_simulation:
        results[SIMULATED] = {"new": _child("simulated", SIMULATED, bundles["new"], options)["sizes"]}
        print(f"\n{SIMULATED}\n\n{table(results[SIMULATED], SIMULATED_BARS, ())}\n")
    if options.write and not options.quick:
        write(results, options, load)
    print(json.dumps({"threads": options.threads, "load_average": load, "results": results}))


def contend(options: argparse.Namespace) -> dict[str, Any]:
    """In a contender's own process: every set of sizes, every phase."""
    sizes = {name: SIZES[name] for name in options.sizes}
    every = [*dict.fromkeys(size for each in sizes.values() for size in each)]
    contender: Contender
    if options.contender == "simulated":
        contender = on_simulated_cuda(options.bundle, options.max_rows, every)
    else:
        make = New if options.contender == "new" else Old
        contender = make(options.bundle, options.engine, options.threads, options.max_rows, every)
    given = json.loads(options.rates)
    results: dict[str, Result] = {}
    for number, (name, each) in enumerate(sizes.items()):
        backlog = 2 * options.max_rows * len(each)
        drive(contender, closed(orders(100 + number, each), backlog), options.seconds / 4, Clock())  # warm-up
        bindings = contender.meter.bindings
        before = _counts(contender)
        phases: Result = {}
        log = drive(contender, closed(orders(10 + number, each), backlog), options.seconds / 2, Clock())
        phases["closed"] = summary(log)
        rate = given.get(name, phases["closed"]["branches_per_second"])
        lead, seconds = options.seconds / 4, options.seconds * 5 / 4
        for load in LOADS:
            source = orders(20 + number, each)
            arrivals = open_loop(source, load * rate * seconds, seconds, 30 + number)
            phases[f"{load:g}"] = summary(drive(contender, scripted(arrivals), seconds, Clock()).after(lead))
        phases["all"] = {"bindings": contender.meter.bindings - bindings, **_shares(before, _counts(contender))}
        results[name] = phases
    return {"backend": contender.backend, "sizes": results}


def closed(source: Iterator[Order], backlog: int) -> Feed:
    """As many requests as keep this many pictures on their way."""

    def feed(now: float, pictures: int) -> list[tuple[float, Order]]:
        due = []
        while pictures < backlog:
            due.append((now, next(source)))
            pictures += due[-1][1].pictures
        return due

    return feed


def scripted(arrivals: Sequence[tuple[float, Order]]) -> Feed:
    """Those whose time has come."""
    left = list(arrivals)[::-1]

    def feed(now: float, _pictures: int) -> list[tuple[float, Order]]:
        due = []
        while left and left[-1][0] <= now:
            due.append(left.pop())
        return due

    return feed


def drive(contender: Contender, feed: Feed, seconds: float, clock: Any) -> Log:
    """Feeds a contender for so long, then waits at most as long for the first steps that are missing; what is left is
    cancelled."""
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
            alone = [_seconds(run.again) for run in runs if run.again] if len(log.turns) % EVERY == 0 else []
        log.turns.append(Turn(start, end, useful, runs, alone))
    for id in ids:
        contender.cancel(id)
    while len(contender):
        contender.step()
    return log


def summary(log: Log) -> dict[str, float]:
    """The numbers of a phase; see the module for their terms."""
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
    own = own_times(pairs)
    median = statistics.median(turn.end - turn.start for turn in turns)
    overheads = [turn.end - turn.start - sum(own(run) for run in turn.steps) for turn in turns]
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
    """The engine's own seconds at a run's size and N: the median alone, between measured N interpolated."""
    measured: dict[tuple[int, ...], dict[int, list[float]]] = {}
    for run, alone in pairs:
        measured.setdefault(run.size, {}).setdefault(run.branches, []).append(alone)
    points = {
        size: sorted((n, statistics.median(times)) for n, times in each.items()) for size, each in measured.items()
    }

    def own(run: Run) -> float:
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

    return own


def found_slot(log: Log, picture: Picture) -> bool:
    """Whether a slot of its size was free for a picture when it arrived."""
    ahead = 0
    for other in log.pictures.values():
        if other is picture:
            break
        ahead += other.order.size == picture.order.size and other.last > picture.arrived
    return ahead < log.slots


def p99(values: Sequence[float]) -> float:
    """The smallest of the values that 99 in 100 do not exceed; NaN of none."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else math.nan


def table(results: Mapping[str, Mapping[str, Result]], bars: Sequence[Bar] = BARS, plain: Any = PLAIN) -> str:
    """One engine's results in Markdown; what misses its bar is bold."""
    sizes = list(results["new"])
    columns = [(size, name) for size in sizes for name in results]
    lines = ["| | bar | " + " | ".join(f"{size}, {name}" for size, name in columns) + " |"]
    lines.append("|---|---:|" + "---:|" * len(columns))
    for bar in bars:
        cells = []
        for size, name in columns:
            value = results[name][size][bar.phase][bar.key]
            cells.append(_number(value) if bar.met(value) else f"**{_number(value)}**")
        limit = f"{'at least' if bar.least else 'at most'} {bar.limit:g}" if bar.limit else "0"
        lines.append(f"| {bar.title} | {limit} | {' | '.join(cells)} |")
    for phase, key, title in plain:
        cells = [_number(results[name][size][phase][key]) for size, name in columns]
        lines.append(f"| {title} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(results: Mapping[str, Any], options: argparse.Namespace, load: Sequence[float]) -> None:
    """docs/results/traffic.md, or what stands between its markers."""
    parts = [
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, {options.threads} threads for each engine, load average "
        f"{load[0]:g} before the run; {options.max_rows} slots of each size, {options.seconds:g} s of each load. Made "
        "by\n\n"
        f"    python -m benchmarks.traffic{' --old PATH' if options.old else ''} --write\n\n"
        "whose docstring defines every term. Bold: misses its bar."
    ]
    for engine, each in results.items():
        bars = (SIMULATED_BARS, ()) if engine == SIMULATED else (BARS, PLAIN)
        parts.append(f"## {engine}\n\n{table(each, *bars)}")
    text = f"{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"# Traffic\n\n{BEGIN}\n{END}\n"
    head, _, rest = page.partition(BEGIN)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(head + text + rest.partition(END)[2], encoding="utf-8")


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _counts(contender: Contender) -> dict[str, int]:
    scheduler = getattr(contender, "scheduler", None)
    return {} if scheduler is None else dict(vars(scheduler.denoiser.stats))


def _shares(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Of the steps and branches in between: replayed, and useful."""
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
    """The last line of what a Python process prints, with the contender's code."""
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
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--max-rows", type=int, default=16, help="slots of each size")
    parser.add_argument("--seconds", type=float, default=16, help="of each load; the closed loop takes half of it")
    parser.add_argument("--no-simulation", action="store_true", help="leave out the simulated CUDA")
    parser.add_argument("--quick", action="store_true", help="no measurement: does everything run?")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    parser.add_argument("--work", type=Path, default=Path("build/traffic"), help="where bundles are kept")
    for name in ("--contender", "--engine", "--bundle"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--rates", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick and not options.contender:
        options.seconds, options.max_rows, options.sizes = 2.0, 4, ["two sizes"]
    return options


if __name__ == "__main__":
    main()
