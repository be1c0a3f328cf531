"""From a Request to pictures: `prepare` checks it, `enter` resolves its words and queues it, `finish` waits and cancels
on a disconnect.

Both dialects and the page's routes use these. Not covered: admission (`oneword.serve.pool`).
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import numpy as np
import starlette.requests

from oneword.runtime.concept import Concept
from oneword.runtime.edit import edit_mask
from oneword.runtime.events import PictureDone
from oneword.runtime.images import resized
from oneword.runtime.request import Image, Request, ResolvedSettings
from oneword.serve.errors import ApiError, Cancelled, Invalid, from_oneword
from oneword.serve.keys import Tenant
from oneword.serve.pool import Dropped, Generation, PictureEvent, replace_unchecked, resolved
from oneword.serve.state import State
from oneword.serve.worker import Done, Failed

T = TypeVar("T")
_NO_PIXELS: Final = np.zeros((0, 0, 3), np.uint8)


class Disconnected(ApiError):
    """The client has closed its connection, so nobody reads this answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", "client_disconnected")


async def prepare(
    state: State,
    tenant: Tenant,
    request: Request,
    settings: ResolvedSettings | None = None,
    *,
    partials: int = 0,
    label: object = None,
    beside: Sequence[Generation] = (),
) -> Generation:
    """The generation of a request that there is room for now, `beside` others, before its words are looked up and its
    picture is decoded: `enter` queues it. `settings` are those of `resolve`, if they are known. Raises ApiError."""
    _check_size(state, request)
    if settings is None:
        state.pool.check(tenant)  # a full queue refuses a request before it is resolved
        texts = request.prompt, request.negative_prompt
        with state.pool.refusals():
            settings = await state.read_text(texts, resolved, request, state.manifest)
    return state.pool.prepared(tenant, request, settings, partials=partials, label=label, beside=beside)


async def enter(state: State, *generations: Generation, bare_names: bool = False) -> None:
    """Looks up the words of generations, once for equal texts; words that a request brings along take precedence.

    Then counts the chunks of the texts with these words, and queues the pictures, all or none, with the server's
    deadline. Raises ApiError.
    """
    found: dict[tuple[str, ...], dict[str, Concept]] = {}
    for generation in generations:
        tenant, texts = generation.tenant, generation.settings.texts
        if (key := (tenant.name, *texts)) not in found:
            found[key] = await state.words.resolve(tenant, texts, bare_names)
        if words := found[key]:  # the model itself has none
            words = {**words, **(generation.request.words or {})}
            generation.request = replace_unchecked(generation.request, words=words)
    await state.price(*generations)
    state.pool.enter(*generations, deadline=state.settings.deadline_seconds)


def reduced(state: State, image: Image) -> tuple[int, int] | None:
    """The size at which a picture is edited if it is larger than this server makes: smaller in proportion."""
    height, width = image.shape[:2]
    longer, factor, pixels = max(width, height), state.manifest.size_multiple, state.max_pixels
    limit = state.manifest.max_side or longer
    if longer <= limit and width * height <= pixels:
        return None
    width, height = (
        max(factor, side // factor * factor)
        for side in (
            min(math.isqrt(pixels * width // height), width * limit // longer),
            min(math.isqrt(pixels * height // width), height * limit // longer),
        )
    )
    return width, height


def fitted(request: Request, settings: ResolvedSettings) -> Request:
    """The request with its picture and mask no larger than they are used: they wait in memory."""
    if request.image is None:
        return request
    size = settings.width, settings.height
    return replace(request, image=resized(request.image, *size), mask=edit_mask(request, settings), size=size)


async def finish(
    http: starlette.requests.Request | None,
    *generations: Generation,
    use: Callable[[Generation, PictureDone], Awaitable[T]],
    incomplete: bool = False,
) -> list[tuple[PictureDone, T]]:
    """The pictures of the generations, in order, with what `use` made of each one as soon as it was ready.

    The pictures come without their pixels, which nobody needs from then on. All generations are cancelled if a picture
    fails, or if the client of `http` disconnects. Raises ApiError: the first picture's that failed, Disconnected, or
    Cancelled if somebody else cancels one of the generations. With `incomplete`, the pictures that are ready by then
    are returned instead.
    """
    for generation in generations:
        generation.only_ends = True
    gone = None if http is None else asyncio.ensure_future(disconnect(http))
    if gone is not None:
        gone.add_done_callback(lambda _: cancel(generations))
    try:
        pictures = await _used(generations, use, incomplete)
        if gone is not None and gone.done():
            raise Disconnected
        return pictures
    except Cancelled:
        if gone is not None and gone.done():
            raise Disconnected from None
        raise
    finally:
        cancel(generations)
        if gone is not None:
            gone.cancel()


async def events(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, PictureEvent]]:
    """The events of several generations as they happen, with the index of their generation.

    Cancels what is left when the iterator is closed. Raises ApiError for the first picture that fails, Cancelled if a
    generation is cancelled by somebody else. A consumer that falls behind gets only the newest preview of each picture.
    """
    news = asyncio.Event()
    for generation in generations:
        generation.news = news
    try:
        while True:
            news.clear()
            quiet = True
            for number, generation in enumerate(generations):
                event = generation.read()
                if event is None:
                    if generation.cancelled:
                        raise Cancelled
                    continue
                quiet = False
                match event.event:
                    case Failed(error=error):
                        raise from_oneword(error)
                    case Dropped(error=refusal):
                        raise refusal
                    case _:
                        yield number, event
            if quiet:
                if all(generation.done for generation in generations):
                    return
                await news.wait()
    finally:
        cancel(generations)


def cancel(generations: Sequence[Generation]) -> None:
    """Cancels what is not done; the engine is free of it at the end of its current call."""
    for generation in generations:
        generation.cancel()


async def disconnect(http: starlette.requests.Request) -> None:
    """Returns when the client has disconnected. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _used(
    generations: Sequence[Generation], use: Callable[[Generation, PictureDone], Awaitable[T]], incomplete: bool
) -> list[tuple[PictureDone, T]]:
    """See `finish`."""
    found: dict[tuple[int, int], tuple[PictureDone, T]] = {}

    async def take(number: int, index: int) -> None:
        pictures = generations[number].pictures
        picture = pictures[index]
        if picture is not None and (number, index) not in found:
            result = await use(generations[number], picture)
            pictures[index] = without_pixels = replace(picture, image=_NO_PIXELS)
            found[number, index] = without_pixels, result

    try:
        async with contextlib.aclosing(events(generations)) as stream:
            async for number, event in stream:
                if isinstance(event.event, Done):
                    await take(number, event.index)
    except Cancelled:
        if not incomplete:
            raise
        for number, generation in enumerate(generations):
            for index in range(len(generation.pictures)):
                await take(number, index)
    return [found[key] for key in sorted(found)]


def _check_size(state: State, request: Request) -> None:
    """Raises Invalid for more pixels than this server makes."""
    width, height = request.size or (request.image.shape[1::-1] if request.image is not None else (0, 0))
    if width * height > state.max_pixels:
        side = int(state.max_pixels**0.5)
        raise Invalid(
            f"size {width}x{height} has {width * height} pixels, this server allows {state.max_pixels}, "
            f"for example {side}x{side}",
            param="size",
        )
