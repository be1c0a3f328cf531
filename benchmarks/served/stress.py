"""Sections of the serving benchmark about overload, rude clients, faults and memory."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.served.load import (
    GENERATIONS,
    LOST,
    PROMPT,
    REFUSED,
    Answer,
    Call,
    at_times,
    client_of,
    closed_loop,
    percentile,
    plain_call,
    png,
    send,
)
from benchmarks.served.process import Server, Setup, quoted, random_words
from benchmarks.served.results import Result, ratio, rows_table
from oneword.runtime.concept import Concept, concept_bytes

FLAT_MB: Final = 5.0
"""Growth that still counts as none."""
_OVERLOAD: Final = 10
_LEARNING_SECONDS: Final = 300.0
"""The longest that a learning job may take to start, or to end."""
_STEPS: Final = 20


def overload(setup: Setup) -> Result:
    """Ten times as many requests as the server can serve."""
    seconds = setup.seconds(60, 4)
    result = Result(
        "overload",
        "Overload",
        f"Equal requests of {_STEPS} steps with `--max-wait 10`: first 24 clients in a closed loop, which keep every "
        f"slot busy; then a Poisson process of {_OVERLOAD} times the pictures per second of that, for 60 s.",
    )
    with Server(setup, "overload", "--max-wait", "10") as server:
        base, work, answers, memory = asyncio.run(_overloaded(server, seconds))
    refused = [answer for answer in answers if answer.status in (429, 503)]
    accepted = [answer for answer in answers if answer.status == 200]
    result.add("requests", len(answers))
    result.add("pictures made", len(accepted))
    result.add("refused with 429 or 503", len(refused))
    result.add("any other answer, or none", len(answers) - len(refused) - len(accepted), 0)
    result.add("refusal, ms, p50", 1e3 * percentile([answer.seconds for answer in refused], 50))
    result.add("refusal, ms, p99", 1e3 * percentile([answer.seconds for answer in refused], 99), 100)
    result.add("steps of pictures per second without overload", base)
    result.add("under overload, relative to that", ratio(work, base), 0.95, least=True)
    result.add("growth of the memory, MB", memory, FLAT_MB)
    return result


def disconnects(setup: Setup) -> Result:
    """Clients that go away while they connect, send, wait, or read."""
    count = setup.count(10_000, 100)
    result = Result(
        "disconnects",
        "Disconnects",
        f"{count:,} connections, 50 at a time, that are cut off after a random time: in the request's head, in its "
        "body, while the answer is awaited, or in a stream; half of them with a reset.",
    )
    with Server(setup, "disconnects") as server:
        figures = asyncio.run(_disconnected(setup, server, count))
        after = server.metrics()
    result.add("connections", count)
    result.add("seconds until the server has no work left", figures["idle"], 1)
    result.add("turns of the engine that end after that, the running one included", figures["turns"], 1)
    result.add("pictures per step of 16 requests together, before", figures["rows_before"])
    result.add("the same afterwards, relative to it", figures["rows_after"] / figures["rows_before"], 0.95, least=True)
    result.add("open files that were not open before", figures["files"], 0)
    result.add("growth of the memory from the first fifth to the end, MB", figures["memory"], FLAT_MB)
    result.add("answers with 5xx", figures["errors"], 0)
    result.add("connections that were not accepted", figures["refused"], 0)
    phases = ("waiting", "encoding", "denoising", "decoding")
    cells = [after.get(f'cancelled_total{{phase="{phase}"}}', 0) for phase in phases]
    result.extra = rows_table(["cancelled in phase", *phases], [["pictures", *cells]])
    return result


def slow(setup: Setup) -> Result:
    """Clients that never read, and slow uploads, beside four ordinary clients.

    The bar compares the ordinary clients' answers with those beside as many clients that ask for the same and read it,
    since the pictures of the streams keep the engine busy whether they are read or not. Earlier results compared with
    four clients alone, and had no streams: all requested /openapi.json, and the kernel took what nobody read.
    """
    count, seconds = setup.count(500, 10), setup.seconds(90, 6)
    _allow_files(4096)
    result = Result(
        "slow",
        "Slow clients",
        f"Four clients in a closed loop with requests of {_STEPS} steps: first alone; then beside {count} other "
        "connections, half of which request a stream of a small picture with previews and partial pictures, half "
        "/openapi.json, and read what comes; then beside as many that ask for the same and never read, and "
        f"{count} that upload an edit at 50 bytes a second; then beside those that read again. A connection asks again "
        f"every {_again(setup):g} s; the server cuts off what is not read for 30 s, after 60 s at the latest. Packets "
        "are small, so that the kernel holds less than a stream.",
    )
    with Server(setup, "slow") as server:
        beside = asyncio.run(_beside_slow(setup, server, count, seconds))
    reading, slowed = beside.reading, beside.slowed
    result.add("requests beside those that read, and beside slow clients", len(reading) + len(slowed))
    result.add("alone: answer, ms, p50", 1e3 * percentile(beside.alone, 50))
    result.add("alone: answer, ms, p99", 1e3 * percentile(beside.alone, 99))
    result.add("beside clients that read: answer, ms, p50", 1e3 * percentile(reading, 50))
    result.add("beside clients that read: answer, ms, p99", 1e3 * percentile(reading, 99))
    result.add("p50 beside slow clients, relative to that", ratio(percentile(slowed, 50), percentile(reading, 50)))
    result.add("p99 beside slow clients, relative to that", ratio(percentile(slowed, 99), percentile(reading, 99)), 1.1)
    result.add("asked by clients that read", beside.read["asked"])
    result.add("of these, not answered in full", beside.read["else"], 0)
    result.add("asked by clients that never read", beside.unread["asked"])
    result.add("of these, cut off by the server", beside.unread["cut off"])
    result.add("growth of the memory with the slow clients connected, MB", beside.memory)
    return result


def sigterm(setup: Setup) -> Result:
    """A server that gets a SIGTERM under load."""
    rounds = setup.count(10)
    result = Result(
        "sigterm",
        "SIGTERM",
        f"{rounds} times: 32 clients in a closed loop with requests of {_STEPS} steps, and a SIGTERM after three "
        "seconds. A request is accepted unless its answer is 429 or, at once, 503, or its connection was refused.",
    )
    finished, lost, status, times = 0, 0, 0, list[float]()
    for _ in range(rounds):
        server = Server(setup, "sigterm")
        answers, asked, ended, code = asyncio.run(stopped(server, 3.0, 32))
        accepted = [answer for answer in answers if not not_accepted(answer, asked)]
        finished += sum(answer.status == 200 for answer in accepted if answer.received >= asked)
        lost += sum(answer.status != 200 for answer in accepted)
        status += code != 0
        times.append(ended - asked)
    result.add("accepted requests that finished after the SIGTERM", finished)
    result.add("accepted requests that did not finish", lost, 0)
    result.add("servers that ended with another status than 0", status, 0)
    result.add("seconds until the server had ended, median", statistics.median(times))
    return result


def faults(setup: Setup) -> Result:
    """A killed server and a failed or hung engine, under --supervise.

    After each fault, three things are looked for: the words, a kept picture's address and a picture that is made
    again; and the word that was being learned, whose job must go on and succeed. Earlier results had no job, and
    therefore no `--model`, whose weights a server compares with its bundle's before it is ready.
    """
    result = Result(
        "faults",
        "Faults",
        "`ti-serve --supervise --model miniature` with eight busy clients and a word that is being learned: the "
        "serving process is killed; the engine's thread raises an exception; it hangs in native code; it hangs in "
        "native code that holds Python's interpreter. The watchdog's time is 30 s for a hang. A test compares the bits "
        "of words whose learning was killed.",
    )
    order = setup.work / "faults" / "order"
    order.parent.mkdir(parents=True, exist_ok=True)
    order.unlink(missing_ok=True)
    words = random_words(setup.bundle, ["<kept>"])
    bars = {"kill -9": 1.0, "exception": 7.0, "hang": 33.0, "hold": 33.0}
    names = {"hang": "hang", "hold": "hang that holds the interpreter"}
    arguments = ("--supervise", "--model", "miniature")
    with Server(setup, "faults", *arguments, changes={"fault": str(order)}, words=words) as server:
        for kind, limit in bars.items():
            setup.log(f"faults: {kind}")
            fault = asyncio.run(_faulty(server, kind, order))
            name = names.get(kind, kind)
            result.add(f"{name}: seconds until the process is down", fault.down, limit)
            result.add(f"{name}: seconds until another one is ready", fault.ready)
            result.add(f"{name}: words and pictures that are not there, or not the same", fault.missing, 0)
            result.add(f"{name}: step of the learning job before", fault.step)
            result.add(f"{name}: learning jobs that are not there, or do not succeed", fault.lost_jobs, 0)
            setup.log(f"faults: {kind}: the job {fault.job}")
    return result


def soak(setup: Setup) -> Result:
    """Memory over half an hour, and the requests that fail meanwhile. The load is checked every minute."""
    lead, seconds = setup.seconds(600, 10), setup.seconds(1200, 10)
    result = Result(
        "soak",
        "Memory over half an hour",
        "Eight clients with short mixed requests, streams, uploads of words, wrong requests and disconnects. Growth is "
        "that of resident memory between minutes 10 and 30. At first, 16 pictures of different prompts are drawn "
        "together: the engine keeps the memory of its largest calls, which this load makes only now and then. Then the "
        "same with a server that keeps 1 KB per request.",
    )
    plain = grown(setup, lead, seconds)
    result.add("requests", plain.requests)
    result.add("answers with 5xx, or none", plain.failed, 0)
    result.add("growth, MB", plain.mb, FLAT_MB)
    setup.log("soak: with a leak")
    leaking = grown(setup, lead, seconds, leak=1024)
    result.add("with a leak: requests", leaking.requests)
    result.add("with a leak: answers with 5xx, or none", leaking.failed, 0)
    result.add("with a leak: growth, MB", leaking.mb, FLAT_MB, least=True)
    return result


@dataclass(frozen=True)
class Growth:
    """Changes of a server under steady load, between two times."""

    mb: float
    """Growth of its resident memory."""
    requests: int
    failed: int
    """Requests that were answered with 5xx, or not at all; those whose client left are not counted."""


def grown(setup: Setup, lead: float, seconds: float, leak: int = 0) -> Growth:
    """The growth of a server's memory from `lead` seconds of load to so many later.

    Raises RuntimeError if the load stops.
    """
    changes: dict[str, Any] = {"leak": leak} if leak else {}
    words = random_words(setup.bundle, [f"<soak{number}>" for number in range(4)])
    with Server(setup, "soak", changes=changes, words=words) as server:
        return asyncio.run(_soaked(setup, server, words, lead, seconds))


async def _metrics(server: Server) -> dict[str, float]:
    return await asyncio.to_thread(server.metrics)


async def _row_steps(server: Server, seconds: float) -> float:
    """Steps of pictures per second, from now on for so long."""
    before, start = await _metrics(server), time.monotonic()
    await asyncio.sleep(seconds)
    after, end = await _metrics(server), time.monotonic()
    return (after["batch_rows_sum"] - before["batch_rows_sum"]) / (end - start)


def _equal_calls(steps: int = _STEPS) -> Iterator[Call]:
    return (plain_call(PROMPT, seed=seed, steps=steps) for seed in itertools.count())


async def _overloaded(server: Server, seconds: float) -> tuple[float, float, list[Answer], float]:
    """Steps per second without and with overload, the answers under overload, and the growth of the memory in MB."""
    lead = min(3.0, seconds / 4)
    async with client_of(server.url) as client:
        loop = asyncio.ensure_future(closed_loop(client, _equal_calls(), 24, lead + seconds + 1))
        await asyncio.sleep(lead)
        base = await _row_steps(server, seconds)
        await loop
        rate = _OVERLOAD * base / _STEPS
        rng, calls = random.Random(0), _equal_calls()
        times = sorted(rng.uniform(0, lead + seconds + 1) for _ in range(round(rate * (lead + seconds + 1))))
        arrivals = [(at, next(calls)) for at in times]
        running = asyncio.ensure_future(at_times(client, arrivals, lambda call: send(client, call, keep=False)))
        await asyncio.sleep(lead)
        before = server.resident_mb
        work = await _row_steps(server, seconds)
        growth = server.resident_mb - before
        return base, work, await running, growth


async def _disconnected(setup: Setup, server: Server, count: int) -> dict[str, float]:
    async with client_of(server.url) as client:
        rows_before = await _full_batch(server, client)
    await asyncio.sleep(1)  # its connections are closed
    files = server.open_files
    numbers, rng, memory, errors = iter(range(count)), random.Random(1), list[float](), Counter[str]()

    async def loop() -> None:
        for number in numbers:
            await cut_off(server.port, rng, number, errors)
            if number % max(1, count // 5) == 0:
                setup.log(f"disconnects: {number} of {count}")
                memory.append(server.resident_mb)

    await asyncio.gather(*(loop() for _ in range(50)))
    idle = await asyncio.to_thread(server.wait_idle)
    before = await _metrics(server)
    await asyncio.sleep(2)
    after = await _metrics(server)
    memory.append(server.resident_mb)
    open_files = server.open_files
    async with client_of(server.url) as client:
        rows_after = await _full_batch(server, client)
    return {
        "idle": idle,
        "turns": after["step_seconds_count"] - before["step_seconds_count"],
        "rows_before": rows_before,
        "rows_after": rows_after,
        "files": max(0, open_files - files),
        "memory": memory[-1] - memory[1],
        "errors": errors["5xx"],
        "refused": errors["refused"],
    }


async def _full_batch(server: Server, client: httpx.AsyncClient) -> float:
    """Mean pictures per step of 16 requests that are sent together."""
    before = await _metrics(server)
    await _at_once(client, [PROMPT] * 16)
    after = await _metrics(server)
    rows, turns = (after[f"batch_rows_{name}"] - before[f"batch_rows_{name}"] for name in ("sum", "count"))
    return rows / turns


async def _at_once(client: httpx.AsyncClient, prompts: Sequence[str]) -> None:
    """Requests a picture of each prompt, all together. Raises RuntimeError unless all are drawn."""
    calls = [plain_call(prompt, seed=seed, steps=50) for seed, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(send(client, call) for call in calls))
    if any(answer.status != 200 for answer in answers):
        raise RuntimeError(f"{[answer.status for answer in answers]}")


async def cut_off(port: int, rng: random.Random, number: int, errors: Counter[str]) -> None:
    """One connection that ends at a random point. Counts answers with `5xx`, and connections that are `refused`."""
    stream = rng.random() < 0.5
    body = {"prompt": PROMPT, "seed": number, "steps": rng.randint(1, 12), "n": rng.choice([1, 1, 2])}
    body |= {"stream": True, "partial_images": rng.randint(0, 3), "previews": 1} if stream else {}
    data = json.dumps(body).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    phase = rng.random()
    end = len(request) if phase > 0.2 else rng.randrange(len(request))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        errors["refused"] += 1
        return
    try:
        writer.write(request[:end])
        read = asyncio.ensure_future(reader.read(1 << 20))
        await asyncio.wait((read,), timeout=10 ** rng.uniform(-3.5, 0.3))
        if read.done() and read.result().startswith(b"HTTP/1.1 5"):
            errors["5xx"] += 1
        read.cancel()
        if rng.random() < 0.5:  # a reset instead of a proper end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    except OSError:
        pass
    finally:
        writer.transport.abort()


@dataclass(eq=False)
class Beside:
    """Seconds per answer of ordinary clients, and what others got meanwhile."""

    alone: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    """Beside clients that read."""
    slowed: list[float] = field(default_factory=list)
    """Beside clients that never read, and slow uploads."""
    read: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    memory: float = 0.0
    """In MB, that the slow clients take."""


def _again(setup: Setup) -> float:
    """Seconds after which a client that reads or never reads asks again."""
    return setup.seconds(75, 5)


async def _beside_slow(setup: Setup, server: Server, count: int, seconds: float) -> Beside:
    calls, found, again = _equal_calls(), Beside(), _again(setup)
    requests = [request_of(server.port, Call("/openapi.json", {}, method="GET")), request_of(server.port, STREAM)]
    async with client_of(server.url) as client:

        async def measured(length: float) -> list[float]:
            answers = await closed_loop(client, calls, 4, length)
            return [answer.seconds for answer in answers.by_status(200)]

        def asking(counts: Counter[str], reads: bool) -> Iterator[Awaitable[None]]:
            return (ask(server.port, requests[i % 2], again, counts, reads=reads) for i in range(count))

        await measured(2)
        found.alone = await measured(seconds / 2)
        async with _together(asking(found.read, reads=True)):
            await measured(again)  # until all are connected
            found.reading += await measured(seconds / 2)
        memory = server.resident_mb
        uploads = (_upload_slowly(server, again) for _ in range(count))
        async with _together(itertools.chain(asking(found.unread, reads=False), uploads)):
            await measured(again)
            found.memory = server.resident_mb - memory
            found.slowed = await measured(seconds)
        async with _together(asking(found.read, reads=True)):
            await measured(again)
            found.reading += await measured(seconds / 2)
    return found


@asynccontextmanager
async def _together(clients: Iterable[Awaitable[None]]) -> AsyncIterator[None]:
    """Endless clients for the duration of the block. Raises RuntimeError if one of them fails."""
    tasks = [asyncio.ensure_future(client) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
    if failed:
        raise RuntimeError(f"{len(failed)} clients failed, the first with {failed[0]!r}")


def request_of(port: int, call: Call) -> bytes:
    """A call without a body, or with one in JSON, as it is sent."""
    body = json.dumps(call.arguments["json"]).encode() if call.arguments else b""
    head = f"{call.method} {call.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


STREAM: Final = plain_call(PROMPT, steps=3, guidance_scale=1.0, stream=True, previews=1, partial_images=2)
"""About 28 KB."""


def is_whole(answer: bytes) -> bool:
    """Whether an answer as it was received is 200 and complete.

    A body is as long as the head says; a stream, whose head does not say it, ends with an empty chunk.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    complete = len(body) == int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")
    return complete and head.startswith(b"HTTP/1.1 200")


async def ask(port: int, request: bytes, again: float, counts: Counter[str], *, reads: bool) -> None:
    """Asks for much every `again` seconds, and reads it at once, or never.

    Counts how often it `asked`, got something `else` than all of what it reads, and was `cut off` while it did not.
    """
    loop = asyncio.get_running_loop()
    await asyncio.sleep(random.uniform(0, again))
    while True:
        end = loop.time() + again
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 300)  # else the kernel holds 2 MB
            if not reads:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 1)
            await loop.sock_connect(connection, ("127.0.0.1", port))
            await loop.sock_sendall(connection, request)
            counts["asked"] += 1
            if reads:
                counts["else"] += not is_whole(await _received(connection, again))
            else:
                await asyncio.sleep(again)
                counts["cut off"] += await _is_closed(connection)
        await asyncio.sleep(max(0.0, end - loop.time()))


async def _received(connection: socket.socket, seconds: float) -> bytes:
    """What comes until the connection ends, or for so long."""
    loop, data = asyncio.get_running_loop(), bytearray()
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(seconds):
            while part := await loop.sock_recv(connection, 1 << 16):
                data += part
    return bytes(data)


async def _is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection although it has sent less than it wanted: it then resets it."""
    try:
        connection.send(b"x")
        await asyncio.sleep(0.2)
        connection.send(b"x")
    except OSError:
        return True
    return False


async def _upload_slowly(server: Server, again: float) -> None:
    """Uploads for ever; it connects again when it is cut off."""
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 1000000\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    await asyncio.sleep(random.uniform(0, again))
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n{part}".encode())
            while not reader.at_eof():
                await asyncio.sleep(2)
                writer.write(b"0" * 100)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), 0.001)
        except OSError:
            pass  # it was cut off
        finally:
            writer.transport.abort()


async def stopped(server: Server, seconds: float, clients: int) -> tuple[list[Answer], float, float, int]:
    """The answers of a server that is asked to stop after so long, when it was asked and had ended, and its status."""
    answers, calls = list[Answer](), _equal_calls()
    async with client_of(server.url) as client:

        async def loop() -> None:
            status = 200
            while status in (200, 429):
                answers.append(await send(client, next(calls)))
                status = answers[-1].status
                if status == 429:
                    await asyncio.sleep(0.2)

        loops = [asyncio.ensure_future(loop()) for _ in range(clients)]
        await asyncio.sleep(seconds)
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*loops)
        status = await asyncio.to_thread(server.ended)
        return answers, asked, time.monotonic(), status


def not_accepted(answer: Answer, asked: float) -> bool:
    """Whether a request was refused: because of too much work, or after the server was asked to stop."""
    if answer.status in (REFUSED, 429) or (answer.status == LOST and answer.sent >= asked):
        return True
    return answer.status == 503 and b"takes no more requests" in answer.body


@dataclass(frozen=True)
class Fault:
    """What a fault did. Seconds count from it."""

    down: float
    """Until the serving process is gone."""
    ready: float
    """Until another one is."""
    missing: int
    """How much is missing or different then, of words, a kept picture and a picture made again."""
    step: int
    """Of the learning job, before."""
    job: str
    """The learning job's last status; empty if it is not listed."""

    @property
    def lost_jobs(self) -> int:
        """How many did not succeed."""
        return int(self.job != "succeeded")


async def _faulty(server: Server, kind: str, order: Path) -> Fault:
    word = {"prompt": "a photo of a <kept> in the snow", "seed": 3, "steps": 10}
    with server.client() as client:
        first = Answer(Call("", {}), 0, body=client.post(GENERATIONS, json=word).content).pictures[0]
        address = client.post(GENERATIONS, json={**word, "response_format": "url"}).json()["data"][0]["url"]
        stored_picture = client.get(address).raise_for_status().content
        words = client.get("/v1/words").json()["data"]
        job = await asyncio.to_thread(_started_job, client, f"<{kind.split()[0]}>")
    loops = [asyncio.ensure_future(_insist(server, seed)) for seed in range(8)]
    await asyncio.sleep(1)
    child, start = server.child, time.monotonic()
    assert child is not None
    if kind == "kill -9":
        os.kill(child, signal.SIGKILL)
    else:
        order.write_text(kind)
    while _alive(child) and time.monotonic() < start + 120:
        await asyncio.sleep(0.02)
    down = time.monotonic() - start if not _alive(child) else float("inf")
    await asyncio.to_thread(server.wait_ready)
    ready = time.monotonic() - start
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    with server.client() as client:
        restored = {entry["name"]: entry for entry in client.get("/v1/words").json()["data"]}
        missing = sum(restored.get(entry["name"]) != entry for entry in words)
        missing += client.get(address).content != stored_picture
        again = Answer(Call("", {}), 0, body=client.post(GENERATIONS, json=word).content).pictures[0]
        missing += int(np.abs(first.astype(int) - again).max() > 1)
        status = await asyncio.to_thread(_job_status, client, job["id"])
    return Fault(down, ready, missing, job["step"], status)


def _started_job(client: httpx.Client, token: str) -> Any:
    """A job that has learned a word for at least one step. Raises RuntimeError if there is none in time."""
    rng = np.random.default_rng(0)
    pictures = [png(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    files = [("image[]", (f"{number}.png", data, "image/png")) for number, data in enumerate(pictures)]
    fields = {"name": token, "init": "star", "steps": "50"}
    job = client.post("/v1/words/learn", data=fields, files=files).raise_for_status().json()
    end = time.monotonic() + _LEARNING_SECONDS
    while job["step"] == 0:
        if job["error"] or time.monotonic() > end:
            raise RuntimeError(f"no word is being learned: {job}")
        time.sleep(0.1)
        job = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    return job


def _job_status(client: httpx.Client, identifier: str) -> str:
    """The status that a job ends with, or has after a while; empty if it is not listed or its word is not there."""
    if identifier not in [job["id"] for job in client.get("/v1/jobs").json()["data"]]:
        return ""
    end = time.monotonic() + _LEARNING_SECONDS
    while (job := client.get(f"/v1/jobs/{identifier}").json())["status"] in ("queued", "running"):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    found = client.get(f"/v1/words/{quoted(job['name'])}").status_code == 200
    return str(job["status"]) if found or job["status"] != "succeeded" else ""


async def _insist(server: Server, seed: int) -> None:
    """A client that sends its request again whatever happens."""
    while True:
        async with client_of(server.url) as client:
            await send(client, plain_call(PROMPT, seed=seed))
        await asyncio.sleep(0.1)


def _alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Soaking:
    """A steady load of short mixed requests, uploads of words, wrong requests and disconnects."""

    def __init__(self, server: Server, words: Sequence[Concept]) -> None:
        self._server, self._files = server, [concept_bytes(word) for word in words]
        self._loops: list[asyncio.Task[None]] = []
        self._cut_off = Counter[str]()
        self._statuses = Counter[int]()
        self._checked = 0
        self.requests = 0

    @property
    def answered(self) -> int:
        """Requests so far with a whole answer of any status, without those that the client ends at a random point."""
        return sum(count for status, count in self._statuses.items() if status not in (LOST, REFUSED))

    @property
    def failed(self) -> int:
        """Requests so far that were answered with 5xx, or not at all."""
        broken = sum(count for status, count in self._statuses.items() if status in (LOST, REFUSED) or status >= 500)
        return broken + sum(self._cut_off.values())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Eight clients, for the duration of the block."""
        async with client_of(self._server.url) as client:
            self._loops = [asyncio.ensure_future(self._loop(client, number)) for number in range(8)]
            try:
                yield
            finally:
                for task in self._loops:
                    task.cancel()
                await asyncio.gather(*self._loops, return_exceptions=True)

    def check(self) -> None:
        """Raises RuntimeError if a client has stopped, or if no request has been answered since the last check."""
        for task in self._loops:
            if task.done():
                raise RuntimeError("a client of the load stopped") from task.exception()
        if self.answered == self._checked:
            raise RuntimeError(f"no request was answered since the last check, {self._checked} before")
        self._checked = self.answered

    async def _loop(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        while True:
            token = f"<soak{rng.randrange(4)}>"
            settings = {"seed": rng.randrange(1000), "steps": rng.randint(1, 6), "n": rng.choice([1, 1, 2])}
            call = plain_call(f"a photo of a {token} {rng.randrange(2000)}", **settings)
            match rng.randrange(20):
                case 0:
                    call = Call(f"/v1/words/{quoted(token)}", {"content": rng.choice(self._files)}, method="PUT")
                case 1:
                    call = Call(GENERATIONS, {"json": {"prompt": "a <nobody>", "steps": 3}})
                case 2:
                    await cut_off(self._server.port, rng, self.requests, self._cut_off)
                    self.requests += 1
                    continue
                case 3:
                    call = Call(GENERATIONS, {"json": {**call.arguments["json"], "stream": True, "previews": 1}})
            self._statuses[(await send(client, call, keep=False)).status] += 1
            self.requests += 1


async def _soaked(setup: Setup, server: Server, words: Sequence[Concept], lead: float, seconds: float) -> Growth:
    load = Soaking(server, words)
    async with client_of(server.url) as client:
        await _at_once(client, [f"{PROMPT}, {number}" for number in range(16)])

    async def watch(length: float) -> None:
        """Waits for `length` seconds and checks the load every minute."""
        minutes = max(1, round(length / 60))
        for _ in range(minutes):
            await asyncio.sleep(length / minutes)
            load.check()
            setup.log(f"soak: {server.resident_mb:.1f} MB, {load.requests} requests, {load.failed} failed")

    async with load.running():
        await watch(lead)
        before, requests, failed = await _memory(server), load.requests, load.failed
        await watch(seconds)
        growth = await _memory(server) - before
        return Growth(growth, load.requests - requests, load.failed - failed)


async def _memory(server: Server) -> float:
    """Resident memory in MB, the median of two seconds."""
    samples = []
    for _ in range(10):
        samples.append(server.resident_mb)
        await asyncio.sleep(0.2)
    return statistics.median(samples)


def _allow_files(count: int) -> None:
    """Lets this process, and those that it starts, have so many open files. Raises RuntimeError if it may not."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < count:
        raise RuntimeError(f"at most {most} files may be open here, this section needs {count}: ulimit -n")
    if least < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
