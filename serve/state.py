"""What the routes of one server share. Built once by `oneword.serve.app`; holds no logic of its own."""

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, ParamSpec, Self, TypeVar

import msgspec
import numpy as np
import PIL.Image
from starlette.requests import HTTPConnection

from oneword.runtime.bundle import Manifest
from oneword.runtime.events import Latents
from oneword.runtime.images import preview_image
from oneword.runtime.request import Image
from oneword.serve.jobs import Jobs
from oneword.serve.keys import Keys, Tenant
from oneword.serve.metrics import Metrics
from oneword.serve.pictures import encode
from oneword.serve.pool import Generation, Pool
from oneword.serve.refinements import Refinements
from oneword.serve.results import KeptAnswer, Results
from oneword.serve.settings import Settings
from oneword.serve.shared import SharedCalls
from oneword.serve.texts import are_long
from oneword.serve.words import Words
from oneword.serve.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")

PREVIEW_SIDE = 256
"""Pixels of the longer side of a preview."""
PREVIEW_QUALITY = 85
_LARGER = 4  # times the area of the bundle's default size
_ALWAYS = 1024 * 1024  # pixels that every server makes, however small its model
_THREADS = 2  # of each kind


class PendingAnswer(NamedTuple):
    """A request whose answer will be kept: its digest and bytes, and what makes the answer."""

    digest: str
    size: int
    task: asyncio.Task[KeptAnswer]


@dataclass(eq=False)
class State:
    """Everything that a route needs: `State.of(request)`."""

    settings: Settings
    manifest: Manifest
    tokens: Callable[[str], int]
    """See `count_tokens`, which takes long texts to a thread."""
    keys: Keys | None
    words: Words
    worker: Worker
    pool: Pool
    results: Results
    refinements: Refinements
    metrics: Metrics
    jobs: Jobs
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once all pictures are done and the server ends: streams that would last end too."""
    pending_answers: dict[tuple[str, str], PendingAnswer] = field(default_factory=dict)
    """By tenant and key."""
    job_pictures: SharedCalls = field(default_factory=SharedCalls)
    """By tenant, job and name."""
    created: int = field(default_factory=lambda: int(time.time()))
    _threads: dict[str, ThreadPoolExecutor] = field(default_factory=dict)

    @classmethod
    def of(cls, http: HTTPConnection) -> Self:
        """The state of the server that a request came to."""
        state: Self = http.app.state.oneword
        return state

    @property
    def name(self) -> str:
        """The model's name: the last part of its weights' id."""
        return Path(self.manifest.source.id).name

    @functools.cached_property
    def bundle_digest(self) -> str:
        """sha256 of the manifest, which has those of the bundle's files."""
        return hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest()

    @property
    def max_pixels(self) -> int:
        """Pixels that one picture may have on this server."""
        defaults = self.manifest.defaults
        return max(_LARGER * defaults.width * defaults.height, _ALWAYS)

    def preview(self, estimate: Latents | Image, pasted: Callable[[Image], Image]) -> bytes:
        """A small JPEG of a decoded picture [H, W, 3], once it is `pasted`, or of latents [C, h, w] by the bundle's
        linear map; grey if it has none."""
        if estimate.dtype == np.uint8:
            pixels, factor = pasted(estimate.astype(np.uint8, copy=False)), 1
        else:
            pixels, factor = self._mapped(estimate.astype(np.float32, copy=False)), self.manifest.vae.factor
        height, width, _ = pixels.shape
        scale = min(factor, PREVIEW_SIDE / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        resized = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
        return encode(np.asarray(resized), "jpeg", PREVIEW_QUALITY)

    def _mapped(self, latents: Latents) -> Image:
        """Latents [C, h, w] as a picture [h, w, 3]."""
        _, height, width = latents.shape
        if self.manifest.preview is None:
            return np.full((height, width, 3), 128, np.uint8)
        return preview_image(self.manifest.preview, latents)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs work on pictures off the event loop, on a few threads, so that the engine keeps its cores.

        Each kind of work, by the function's module and name, has threads of its own: uploads hold up no answer.
        """
        kind = f"{function.__module__}.{function.__qualname__}"
        if (threads := self._threads.get(kind)) is None:
            threads = self._threads[kind] = ThreadPoolExecutor(_THREADS, kind)
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    async def read_text(
        self, texts: Iterable[str | None], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The result of a function that reads these texts: in a thread if they are long, so that nobody else waits."""
        if not are_long(texts):
            return function(*args, **kwargs)
        return await self.in_thread(function, *args, **kwargs)

    async def count_tokens(self, prompt: str) -> int:
        """The number of ids of a prompt in the first encoder, learned words as plain text."""
        return await self.read_text((prompt,), self.tokens, prompt)

    async def price(self, *generations: Generation) -> None:
        """Counts the chunks of the generations' prompts, before they enter the pool. Raises ApiError."""
        texts = [text for generation in generations for text in generation.settings.texts]
        await self.read_text(texts, _price, generations)

    def close(self) -> None:
        """Ends the threads of `in_thread`, without waiting for what they do."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)


def _price(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.price()


def caller(http: HTTPConnection) -> tuple[State, Tenant]:
    """The state of the server that a request came to, and whose request it is."""
    return State.of(http), http.state.tenant
