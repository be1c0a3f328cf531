"""Sections of the serving benchmark about time, batches and pictures, without abuse."""

import asyncio
import http.client
import itertools
import json
import math
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.arrivals import WORDS, Order, open_loop, orders, word
from benchmarks.served.changes import FIRST_STEP, LAST_STEP, TURN, WORK, read_journal
from benchmarks.served.load import (
    GENERATIONS,
    PROMPT,
    Answer,
    Answers,
    Call,
    WholeRequests,
    at_times,
    call_of,
    client_of,
    closed_loop,
    each_once,
    events,
    percentile,
    plain_call,
    send,
)
from benchmarks.served.process import Engine, Server, Setup, random_words
from benchmarks.served.results import Result, number, ratio, rows_table

SIZES = ((64, 64), (96, 64))
LOADS = (0.6, 0.8)
ADMIT_ALL = ("--max-wait", "3600")
"""For sections that give the server more than a minute of work: nothing is to be refused."""
SLOTS = 16
BACKLOG = 32
"""Pictures that a closed loop keeps unfinished: twice the slots."""


Array = npt.NDArray[np.float64]


def overhead(setup: Setup) -> Result:
    """What HTTP adds to a picture, one at a time, and to a step while other requests come."""
    result = Result(
        "overhead",
        "HTTP",
        "A picture of ten steps, alternately over one HTTP connection and from a Scheduler in a process of its own on "
        "the same core. Then eight pictures of many steps together: from the Scheduler, and as eight streams with a "
        "preview every 20 steps while 20 other requests a second are answered.",
    )
    with Server(setup, "overhead", *ADMIT_ALL) as server, Engine(setup) as engine:
        served, alone, added = _in_turn(setup, server, engine)
        result.add("a picture over HTTP, ms, p50", 1e3 * statistics.median(served))
        result.add("the same from the Scheduler, ms, p50", 1e3 * statistics.median(alone))
        result.add("HTTP's overhead, ms, p50", 1e3 * statistics.median(added), 2)
        result.add("HTTP's overhead, ms, p99", 1e3 * percentile(added, 99))
        with_load, without = _steps_under_load(setup, server, engine)
        result.add("a step of eight pictures under HTTP's load, ms", 1e3 * with_load)
        result.add("the same from the Scheduler, ms", 1e3 * without)
        result.add("the first, relative to the second", with_load / without, 1.1)
    return result


def batching(setup: Setup) -> Result:
    """Eight clients that send equal requests."""
    result = Result(
        "batching",
        "Equal requests",
        "Eight clients, each with one request of 50 steps at a time, for 30 s, as the server's `batch_rows` says.",
    )
    calls = (plain_call(PROMPT, seed=seed) for seed in itertools.count())
    with Server(setup, "batching") as server:
        before = server.metrics()
        answers = asyncio.run(_closed(server, calls, 8, setup.seconds(30)))
        after = server.metrics()
    rows, turns = (after[f"batch_rows_{name}"] - before[f"batch_rows_{name}"] for name in ("sum", "count"))
    result.add("mean pictures per step", ratio(rows, turns), 7, least=True)
    result.add("pictures per second", len(answers.by_status(200)) / _span(answers))
    result.add("answers other than 200", len(answers.all) - len(answers.by_status(200)), 0)
    return result


def traffic(setup: Setup) -> Result:
    """Mixed requests over HTTP, beside a server with one row and beside batches of whole requests.

    Turns and waits count as in `benchmarks.traffic`, but for the overhead of a turn: it is what the turn took outside
    of the steps, while `benchmarks.traffic` subtracts the engine's own time, measured alone. Branches relative to full
    batches are not measured here, since nothing can be repeated alone in a server. Earlier results counted the turns of
    a wait from the time when the server noticed a first step, which may be turns later.
    """
    seconds = setup.seconds(60)
    result = Result(
        "traffic",
        "Mixed traffic",
        "The mixed requests of [Traffic](traffic.md), of one size, over HTTP: in a closed loop, then at 0.6 and 0.8 of "
        "its branches per second, as a Poisson process. Beside it the same server with `--max-rows 1`, and "
        "batches of whole requests: the client sends what has arrived only when the server is idle. Turns, waits and "
        "median turns count as in Traffic; a turn's overhead is what it takes outside of the steps.",
    )
    words = random_words(setup.bundle, [word(index) for index in range(WORDS)])
    with Engine(setup, words) as engine:
        alone = engine.saturate(10, SIZES[:1], BACKLOG, seconds / 2)
    found: dict[str, dict[str, dict[str, float]]] = {}
    rate = 0.0
    for name, slots in (("steps", SLOTS), ("one row", 1), ("whole requests", SLOTS)):
        setup.log(f"traffic: {name}")
        journal = setup.work / "traffic" / f"journal-{time.time_ns()}"
        journal.parent.mkdir(parents=True, exist_ok=True)
        changes = {"journal": str(journal)}
        arguments = (*ADMIT_ALL, "--max-rows", str(slots))
        with Server(setup, "traffic", *arguments, changes=changes, words=words) as server:
            phases = asyncio.run(_phases(server, journal, seconds, rate, slots, name == "whole requests"))
        found[name], rate = phases, rate or phases["closed"]["branches"]
    steps = found["steps"]
    result.add("Scheduler without HTTP, closed loop: branches per second", alone)
    result.add(
        "closed loop: branches per second, relative to it", ratio(steps["closed"]["branches"], alone), 0.95, least=True
    )
    for load in LOADS:
        result.add(f"load {load:g}: wait for the first step, turns, p50", steps[f"{load:g}"]["turns50"])
        bar = 2 if load == LOADS[0] else None
        figures = steps[f"{load:g}"]
        result.add(f"load {load:g}: the same, p99", figures["turns99"], bar)
        result.add(f"load {load:g}: the same, in median turns, p99", figures["median_turns99"], bar)
        result.add(f"load {load:g}, slot free: wait for the first step, turns, p99", figures["free_turns99"], 2)
        result.add(f"load {load:g}, slot free: the same, in median turns", figures["free_median_turns99"], 2)
        result.add(f"load {load:g}, slot free: share of the pictures", figures["free_share"])
        result.add(f"load {load:g}: overhead of a turn, in median turns, p99", figures["overhead99"], 0.5)
        result.add(f"load {load:g}: median turn, ms", figures["turn_ms"])
    result.add("bindings created after warm-up", steps["all"]["bindings"], 0)
    gain = ratio(steps["closed"]["branches"], found["one row"]["closed"]["branches"])
    result.add("closed loop: branches per second, relative to one row", gain)
    gain = ratio(found["whole requests"]["0.6"]["ready50"], steps["0.6"]["ready50"])
    result.add("load 0.6: whole requests' time to a picture, relative to steps', p50", gain)
    titles = {
        "branches": "branches per second",
        "pictures": "pictures per second",
        "first50": "first step, ms, p50",
        "first99": "first step, ms, p99",
        "ready50": "answer, ms, p50",
        "ready99": "answer, ms, p99",
        "failed": "answers other than 200",
    }
    table = [
        [f"{'closed loop' if phase == 'closed' else f'load {phase}'}: {title}"]
        + [number(found[name][phase].get(key, math.nan)) for name in found]
        for phase in ("closed", *(f"{load:g}" for load in LOADS))
        for key, title in titles.items()
    ]
    figure = "![seconds until the answer, by load: median and p99](serving.svg)"
    result.extra = f"{rows_table(['', 'step by step', '`--max-rows 1`', 'whole requests'], table)}\n\n{figure}"
    result.data = found
    return result


def partials(setup: Setup) -> Result:
    """How long a client waits for its first partial picture while others run."""
    count = setup.count(200, 5)
    result = Result(
        "partials",
        "First partial picture",
        f"{count} streams of 4 steps with 3 partial pictures, one at a time, beside four clients with requests of 50 "
        "steps. A turn counts if it ended between sending the request and receiving the partial picture.",
    )
    journal = setup.work / "partials" / f"journal-{time.time_ns()}"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with Server(setup, "partials", changes={"journal": str(journal)}) as server:
        spans = asyncio.run(_first_partials(server, count))
    ends = read_journal(journal, TURN)[:, 1]
    turns = [int(np.searchsorted(ends, last) - np.searchsorted(ends, first)) for first, last in spans]
    result.add("turns until it is there, p50", percentile(turns, 50), 2)
    result.add("turns until it is there, p99", percentile(turns, 99), 2)
    times = [1e3 * (last - first) for first, last in spans]
    result.add("ms until it is there, p50", percentile(times, 50))
    result.add("ms until it is there, p99", percentile(times, 99))
    return result


def fidelity(setup: Setup) -> Result:
    """Served pictures beside those that the Scheduler makes of each request alone.

    The bar is one of two: in fp32 no pixel may differ by more than 1; in another precision, where the number of rows of
    a call may change a picture, each must be nearest to the picture of the same request made alone, and the median PSNR
    to that picture must be at least 45 dB.
    """
    count = setup.count(200, 4)
    result = Result(
        "fidelity",
        "Fidelity",
        f"{count} mixed requests of two sizes. Each picture is first made alone, by the Scheduler, and kept; then all "
        "are requested over HTTP, 32 at a time.",
    )
    words = random_words(setup.bundle, [word(index) for index in range(WORDS)])
    chosen = [*itertools.islice(orders(50, SIZES), count)]
    with Engine(setup, words) as engine:
        exact = engine.backend.endswith("fp32")
        result.note += f" The engine is {engine.backend}."
        requests = [single for order in chosen for single in singles(order)]
        alone = kept_pictures(setup, engine, f"fidelity-{engine.backend.rpartition(' ')[2]}", requests)
    with Server(setup, "fidelity", *ADMIT_ALL, words=words) as server:
        answers = asyncio.run(_each_once(server, [call_of(order) for order in chosen], 32))
        rows = server.metrics()
    served = [picture for answer in answers if answer.status == 200 for picture in answer.pictures]
    result.add("pictures", len(served))
    result.add("requests that failed", sum(answer.status != 200 for answer in answers), 0)
    if len(served) == len(alone):
        worst = [int(np.abs(ours.astype(int) - theirs).max()) for ours, theirs in zip(served, alone, strict=True)]
        result.add("pixels' largest difference", max(worst), 1 if exact else None)
        result.add("pictures with any difference", sum(value > 0 for value in worst))
        if not exact:
            near = likeness(served, alone)
            result.add("pictures that are nearer to another request's own", near.mistaken, 0)
            result.add("likeness to its own, dB, median", near.median, 45, least=True)
            result.add("likeness to its own, dB, least", near.least)
    result.add("mean pictures per turn, of both sizes", rows["batch_rows_sum"] / rows["batch_rows_count"])
    return result


@dataclass(frozen=True)
class Likeness:
    """PSNR of served pictures to those of the same requests made alone, in dB.

    `mistaken` counts the pictures that are nearer to that of another request of their size.
    """

    median: float
    least: float
    mistaken: int


def likeness(served: Sequence[Any], alone: Sequence[Any]) -> Likeness:
    """Compares served pictures with those of the same requests made alone. Equal pictures count as 99 dB."""
    decibels, mistaken = [], 0
    for index, picture in enumerate(served):
        errors = {
            other: float(np.mean((picture.astype(float) - theirs) ** 2))
            for other, theirs in enumerate(alone)
            if theirs.shape == picture.shape
        }
        mistaken += errors[index] > min(errors.values())
        decibels.append(10 * math.log10(255**2 / max(errors[index], 255**2 / 10**9.9)))
    return Likeness(statistics.median(decibels), min(decibels), mistaken)


def switching(setup: Setup) -> Result:
    """The interpreter's switch interval that the server sets, beside Python's own."""
    count = setup.count(300, 10)
    result = Result(
        "switching",
        "Switch interval",
        "How long a thread may keep Python's interpreter while another one waits: the server sets 0.5 ms. "
        f"{count} questions to /v1/models, one at a time, while 8 streams of 1,000 steps run.",
    )
    for milliseconds in (0.5, 5.0):
        changes = {"switch_seconds": milliseconds / 1e3}
        with Server(setup, "switching", *ADMIT_ALL, changes=changes) as server:
            times, step = asyncio.run(_questions(server, count))
        result.add(f"{milliseconds:g} ms: an answer, ms, p50", 1e3 * percentile(times, 50))
        result.add(f"{milliseconds:g} ms: an answer, ms, p99", 1e3 * percentile(times, 99))
        result.add(f"{milliseconds:g} ms: a step, ms", 1e3 * step)
    return result


def singles(order: Order) -> list[dict[str, Any]]:
    """Each picture of a request as a request of its own."""
    seed = order.settings["seed"]
    return [{**order.settings, "num_images": 1, "seed": seed + index} for index in range(order.pictures)]


def kept_pictures(setup: Setup, engine: Engine, name: str, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The pictures of requests, each drawn alone. They are stored, and not drawn again."""
    from oneword.runtime.bundle import Bundle

    model = Bundle.open(setup.bundle).manifest.source.digest[-12:]
    path = setup.work / f"{name}-{len(requests)}-{setup.engine}-{model}.npz"
    if path.is_file():
        with np.load(path) as archive:
            return [archive[str(number)] for number in range(len(requests))]
    pictures = []
    for index, request in enumerate(requests):
        if index % 100 == 0:
            setup.log(f"{name}: alone {index} of {len(requests)}")
        pictures.append(engine.draw([request], keep=True).pictures[0, 0])
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **{str(number): picture for number, picture in enumerate(pictures)})
    temporary.replace(path)
    return pictures


def _in_turn(setup: Setup, server: Server, engine: Engine) -> tuple[list[float], list[float], list[float]]:
    """Seconds per picture over HTTP and from the Scheduler, and the pairs' differences."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    served, alone = list[float](), list[float]()
    for seed in range(setup.count(300, 10) + 10):
        settings = {"prompt": PROMPT, "seed": seed, "steps": 10}
        body = json.dumps(settings)
        start = time.perf_counter()
        connection.request("POST", GENERATIONS, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        served.append(time.perf_counter() - start)
        if response.status != 200:
            raise RuntimeError(f"status {response.status}")
        alone.append(engine.draw([settings]).seconds)
    served, alone = served[10:], alone[10:]  # warm-up
    return served, alone, [http_ - alone_seconds for http_, alone_seconds in zip(served, alone, strict=True)]


def _steps_under_load(setup: Setup, server: Server, engine: Engine) -> tuple[float, float]:
    """Mean seconds of a step with load and without, the median of three rounds."""
    steps = setup.count(400, 40)
    requests = [{"prompt": PROMPT, "seed": seed, "steps": steps} for seed in range(8)]
    with_load, without = [], []
    for _ in range(3):
        without.append(engine.draw(requests).step_seconds)
        before = server.metrics()
        asyncio.run(_streams_and_others(server, steps))
        after = server.metrics()
        seconds, turns = (after[f"step_seconds_{name}"] - before[f"step_seconds_{name}"] for name in ("sum", "count"))
        with_load.append(seconds / turns)
    return statistics.median(with_load), statistics.median(without)


async def _streams_and_others(server: Server, steps: int) -> None:
    async with client_of(server.url) as client:

        async def small_requests() -> None:
            for path in itertools.cycle(["/v1/models", "/v1/queue", "/v1/words", "/health/live"]):
                await client.get(path)
                await asyncio.sleep(0.05)

        asking = asyncio.ensure_future(small_requests())
        await asyncio.gather(*(_read_stream(client, seed, steps) for seed in range(8)))
        asking.cancel()


async def _read_stream(client: httpx.AsyncClient, seed: int, steps: int) -> None:
    call = plain_call(PROMPT, seed=seed, steps=steps, stream=True, previews=20)
    async for _ in events(client, call):
        pass


async def _closed(server: Server, calls: Iterator[Call], clients: int, seconds: float) -> Answers:
    async with client_of(server.url) as client:
        return await closed_loop(client, calls, clients, seconds)


async def _each_once(server: Server, calls: Sequence[Call], clients: int) -> list[Answer]:
    async with client_of(server.url) as client:
        return await each_once(client, calls, clients)


def _span(answers: Answers) -> float:
    return max(answer.received for answer in answers.all) - min(answer.sent for answer in answers.all)


async def _phases(
    server: Server, journal: Path, seconds: float, rate: float, slots: int, whole: bool
) -> dict[str, dict[str, float]]:
    """The figures of the closed loop, each load, and all; `rate` is that of the loads, 0 for the closed loop's."""
    phases, begin = {}, time.monotonic()
    async with client_of(server.url) as client:
        batches = WholeRequests(client, slots)

        async def submit(call: Call) -> Answer:
            return await batches.submit(call) if whole else await send(client, call, keep=False)

        calls = map(call_of, orders(10, SIZES[:1]))
        lead = seconds / 4
        start = time.monotonic()
        answers = await _loops(submit, calls, BACKLOG, lead + seconds / 2)
        phases["closed"] = _figures(journal, slots, answers, start + lead, start + lead + seconds / 2)
        rate = rate or phases["closed"]["branches"]
        for load in LOADS:
            chosen = open_loop(orders(20, SIZES[:1]), load * rate * (lead + seconds), lead + seconds, 30)
            start = time.monotonic()
            answers = await at_times(client, [(at, call_of(order)) for at, order in chosen], submit)
            phases[f"{load:g}"] = _figures(journal, slots, answers, start + lead, start + lead + seconds)
    work = read_journal(journal, WORK)
    phases["all"] = {"bindings": float(work[work[:, 0] >= begin, 2].sum())}
    return phases


async def _loops(submit: Any, calls: Iterator[Call], clients: int, seconds: float) -> list[Answer]:
    """As `closed_loop`. A client stands for about one picture, since requests have 1.5 pictures on average."""
    found, end = list[Answer](), time.monotonic() + seconds

    async def loop() -> None:
        while time.monotonic() < end:
            found.append(await submit(next(calls)))

    await asyncio.gather(*(loop() for _ in range(clients)))
    return found


def _figures(journal: Path, slots: int, answers: Sequence[Answer], first: float, last: float) -> dict[str, float]:
    """A phase's figures between two times; waits are those of what arrived in between."""
    turns, work = read_journal(journal, TURN), read_journal(journal, WORK)
    inside = turns[(turns[:, 0] >= first) & (turns[:, 1] <= last)]
    median = float(np.median(inside[:, 1] - inside[:, 0])) if len(inside) else math.nan
    work = work[(work[:, 0] >= first) & (work[:, 0] <= last)]
    waits = waits_of(read_journal(journal, FIRST_STEP), read_journal(journal, LAST_STEP)[:, 0], turns[:, 1])
    waits = waits[(waits[:, 0] >= first) & (waits[:, 0] <= last)]
    free = waits[waits[:, 3] < slots]
    ready = [answer for answer in answers if first <= answer.sent <= last]
    done = [answer for answer in answers if answer.status == 200 and first <= answer.received <= last]
    return {
        "branches": float(inside[:, 2].sum()) / (last - first),
        "pictures": sum(answer.call.pictures for answer in done) / (last - first),
        "turn_ms": 1e3 * median,
        "turns50": percentile(waits[:, 2].tolist(), 50),
        "turns99": percentile(waits[:, 2].tolist(), 99),
        "median_turns99": percentile(waits[:, 1].tolist(), 99) / median,
        "free_turns99": percentile(free[:, 2].tolist(), 99),
        "free_median_turns99": percentile(free[:, 1].tolist(), 99) / median,
        "free_share": ratio(len(free), len(waits)),
        "overhead99": percentile(work[:, 1].tolist(), 99) / median,
        "first50": 1e3 * percentile(waits[:, 1].tolist(), 50),
        "first99": 1e3 * percentile(waits[:, 1].tolist(), 99),
        "ready50": 1e3 * percentile([answer.seconds for answer in ready], 50),
        "ready99": 1e3 * percentile([answer.seconds for answer in ready], 99),
        "failed": sum(answer.status != 200 for answer in ready),
    }


def waits_of(first_steps: Array, last_steps: Array, turn_ends: Array) -> Array:
    """[N, 4]: arrival, wait for the first step in seconds and in turns, pictures ahead, of pictures by arrival.

    `first_steps` is [N, 2 or more]: arrival, end of the first step; the others are sorted times. Turns are those that
    ended after the arrival, up to and including that of the first step. Ahead are pictures that arrived before, or in
    the same request, and are not done at the arrival.
    """
    order = np.lexsort((first_steps[:, 1], first_steps[:, 0].round(6)))
    arrivals, firsts = first_steps[order, 0], first_steps[order, 1]
    turns = np.searchsorted(turn_ends, firsts, "right") - np.searchsorted(turn_ends, arrivals, "right")
    ahead = np.arange(len(arrivals)) - np.searchsorted(last_steps, arrivals, "right")
    return np.stack([arrivals, firsts - arrivals, turns, ahead], axis=1)


async def _first_partials(server: Server, count: int) -> list[tuple[float, float]]:
    """When each stream was sent, and when its first partial picture came."""
    spans = list[tuple[float, float]]()
    async with client_of(server.url) as client, _busy(client, 4):
        for seed in range(count):
            call = plain_call(PROMPT, seed=seed, steps=4, stream=True, partial_images=3)
            start = time.monotonic()
            async for name, _, at in events(client, call):
                if name.endswith("partial_image") and len(spans) == seed:
                    spans.append((start, at))
    return spans


async def _questions(server: Server, count: int) -> tuple[list[float], float]:
    """Seconds per question, and mean seconds per step meanwhile."""
    times = []
    async with client_of(server.url) as client, _busy(client, 8, steps=1000):
        before = server.metrics()
        for _ in range(count):
            start = time.monotonic()
            await client.get("/v1/models")
            times.append(time.monotonic() - start)
            await asyncio.sleep(0.02)
        after = server.metrics()
    seconds, turns = (after[f"step_seconds_{name}"] - before[f"step_seconds_{name}"] for name in ("sum", "count"))
    return times, seconds / max(turns, 1)


@asynccontextmanager
async def _busy(client: httpx.AsyncClient, clients: int, steps: int = 50) -> AsyncIterator[None]:
    """Keeps so many pictures running for the duration of the block."""

    async def loop(seed: int) -> None:
        while True:
            await send(client, plain_call(PROMPT, seed=seed, steps=steps), keep=False)

    tasks = [asyncio.ensure_future(loop(seed)) for seed in range(clients)]
    await asyncio.sleep(0.5)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
