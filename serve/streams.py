"""Responses of server-sent events that stay open while nothing happens. Not covered: the events themselves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final

from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING_SECONDS: Final = 10.0
"""Below the idle time-outs of proxies: nginx closes a silent connection after 60 s."""
_PING: Final = b": ping\n\n"


def sse(event: str, body: Mapping[str, object]) -> bytes:
    """One event on the wire."""
    return format_sse_event(event=event, data_str=json.dumps(body))


class EventStream(StreamingResponse):
    """A stream of events that no proxy buffers. `close` runs when the response ends, in whatever way."""

    def __init__(self, chunks: AsyncGenerator[bytes], close: Callable[[], None] = lambda: None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pinged(chunks), media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream. A client that leaves before the first event also ends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def pinged(chunks: AsyncGenerator[bytes], seconds: float = PING_SECONDS) -> AsyncGenerator[bytes]:
    """The chunks, and a comment whenever nothing has come for `seconds`. Closes `chunks` when it is closed."""
    following: asyncio.Task[bytes] | None = None

    async def take() -> bytes:
        return await anext(chunks)

    try:
        while True:
            following = following or asyncio.create_task(take())
            await asyncio.wait((following,), timeout=seconds)
            if not following.done():
                yield _PING
                continue
            try:
                chunk = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield chunk
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await chunks.aclose()
