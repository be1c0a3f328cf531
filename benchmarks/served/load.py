"""HTTP requests of the serving benchmark, such as those of `benchmarks.arrivals`, sent and timed."""

import asyncio
import base64
import io
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import numpy as np
import numpy.typing as npt
import PIL.Image

from benchmarks.arrivals import Order

GENERATIONS: Final = "/v1/images/generations"
EDITS: Final = "/v1/images/edits"
PROMPT: Final = "a photo of a red ring in the snow"
LOST: Final = 0
"""The status of a request whose connection broke before the whole answer came."""
REFUSED: Final = -1
"""The status of a request whose connection was not accepted."""

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Call:
    """A request as httpx takes it, and how much work it is."""

    path: str
    arguments: Mapping[str, Any]
    branches: int = 0
    """Branch evaluations of all steps and pictures."""
    method: str = "POST"

    @property
    def pictures(self) -> int:
        """How many it asks for."""
        body = self.arguments.get("json") or self.arguments["data"]
        return int(body.get("n", 1))


@dataclass(eq=False)
class Answer:
    """What came back. Times are monotonic."""

    call: Call
    sent: float
    received: float = math.inf
    status: int = LOST
    body: bytes = b""

    @property
    def seconds(self) -> float:
        """From the first byte sent to the last one received."""
        return self.received - self.sent

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of an answer in JSON."""
        data = json.loads(self.body)["data"]
        return [picture_of(base64.b64decode(item["b64_json"])) for item in data]


@dataclass(eq=False)
class Answers:
    """The answers of a phase, in order of their end."""

    seconds: float
    all: list[Answer] = field(default_factory=list)

    def by_status(self, *statuses: int) -> list[Answer]:
        """Those with one of these statuses."""
        return [answer for answer in self.all if answer.status in statuses]

    @property
    def statuses(self) -> dict[int, int]:
        """How many there are of each status."""
        return {status: len(self.by_status(status)) for status in sorted({answer.status for answer in self.all})}


def plain_call(prompt: str, *, seed: int = 0, **settings: Any) -> Call:
    """A request for pictures from a prompt."""
    steps, guidance = settings.get("steps", 50), settings.get("guidance_scale", 7.5)
    branches = steps * settings.get("n", 1) * (1 if guidance == 1 else 2)
    return Call(GENERATIONS, {"json": {"prompt": prompt, "seed": seed, **settings}}, branches)


def call_of(order: Order) -> Call:
    """A mixed request: a generation, or an edit with a mask."""
    settings = dict(order.settings)
    width, height = settings.pop("size")
    image, mask = settings.pop("image", None), settings.pop("mask", None)
    body = {name: value for name, value in settings.items() if value is not None}
    body |= {"n": body.pop("num_images"), "size": f"{width}x{height}"}
    if image is None:
        return Call(GENERATIONS, {"json": body}, order.work)
    rgba = np.dstack([image, 255 - mask])  # what is transparent is repainted
    files = {"image": ("image.png", png(image), "image/png"), "mask": ("mask.png", png(rgba), "image/png")}
    return Call(EDITS, {"data": {name: str(value) for name, value in body.items()}, "files": files}, order.work)


def png(image: Picture) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def picture_of(data: bytes) -> Picture:
    """A file's picture."""
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with as many connections as it needs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=httpx.Timeout(300)) as client:
        yield client


async def send(client: httpx.AsyncClient, call: Call, keep: bool = True) -> Answer:
    """Sends a request and reads its whole answer; it never raises for a broken connection."""
    answer = Answer(call, time.monotonic())
    try:
        response = await client.request(call.method, call.path, **call.arguments)
        answer.status, answer.body = response.status_code, response.content if keep else b""
    except httpx.ConnectError:
        answer.status = REFUSED
    except httpx.TransportError:
        answer.status = LOST
    answer.received = time.monotonic()
    return answer


async def closed_loop(
    client: httpx.AsyncClient, calls: Iterator[Call], clients: int, seconds: float, keep: bool = False
) -> Answers:
    """So many clients, each with one request at a time, for so long; then all finish theirs."""
    answers, end = Answers(seconds), time.monotonic() + seconds

    async def loop() -> None:
        while time.monotonic() < end:
            answers.all.append(await send(client, next(calls), keep))

    await asyncio.gather(*(loop() for _ in range(clients)))
    return answers


async def each_once(client: httpx.AsyncClient, calls: Sequence[Call], clients: int) -> list[Answer]:
    """Sends every request once, so many at a time. The answers are in the order of the calls."""
    left, found = iter(enumerate(calls)), dict[int, Answer]()

    async def loop() -> None:
        for number, call in left:
            found[number] = await send(client, call)

    await asyncio.gather(*(loop() for _ in range(clients)))
    return [found[number] for number in range(len(calls))]


async def at_times(
    client: httpx.AsyncClient, arrivals: Sequence[tuple[float, Call]], submit: Callable[[Call], Awaitable[Answer]]
) -> list[Answer]:
    """Submits each request at its time from now, whatever became of the earlier ones."""
    start, tasks = time.monotonic(), []
    for at, call in arrivals:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        tasks.append(asyncio.ensure_future(submit(call)))
    return [*await asyncio.gather(*tasks)]


class WholeRequests:
    """Batches whole requests: sends what has arrived, up to so many pictures, only when the server has nothing to do.

    It stands for a server without step-level batching, where a batch's requests start and end together. An answer's
    time counts from the arrival.
    """

    def __init__(self, client: httpx.AsyncClient, max_pictures: int) -> None:
        self._client, self._max_pictures = client, max_pictures
        self._waiting: list[tuple[Call, float, asyncio.Future[Answer]]] = []
        self._running = False

    async def submit(self, call: Call) -> Answer:
        """The answer to a request."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((call, time.monotonic(), future))
        if not self._running:
            self._running = True
            asyncio.ensure_future(self._run())  # noqa: RUF006 - it ends before the last answer is read
        answer: Answer = await future
        return answer

    async def _run(self) -> None:
        while self._waiting:
            batch = list[tuple[Call, float, asyncio.Future[Answer]]]()
            pictures = 0
            while self._waiting and (not batch or pictures + self._waiting[0][0].pictures <= self._max_pictures):
                batch.append(self._waiting.pop(0))
                pictures += batch[-1][0].pictures
            answers = await asyncio.gather(*(send(self._client, call, keep=False) for call, _, _ in batch))
            for answer, (_, arrived, future) in zip(answers, batch, strict=True):
                answer.sent = arrived
                future.set_result(answer)
        self._running = False


async def events(client: httpx.AsyncClient, call: Call) -> AsyncIterator[tuple[str, dict[str, Any], float]]:
    """The events of a stream, each with its time."""
    async with client.stream("POST", call.path, **call.arguments) as response:
        response.raise_for_status()
        name = ""
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:]), time.monotonic()


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many of 100 do not exceed; NaN if there are none."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)] if values else math.nan
