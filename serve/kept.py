"""Requests that are finished although their client has left: those with an Idempotency-Key.

Their answer is kept in the store for ten minutes. A client that has lost its connection sends the request again, with
its key, and gets that answer, or waits for it if it is still being made. After a restart, or through another server on
the same store, it gets the answer if it was ready, else the pictures are made again. Errors are not kept. Not covered:
streams, and where answers are kept (`oneword.serve.results`).
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Final, TypeAlias

from fastapi import Header
from pydantic import BaseModel
from starlette.responses import Response

from oneword.serve.errors import Conflict
from oneword.serve.keys import Tenant
from oneword.serve.pool import Generation
from oneword.serve.results import KeptAnswer
from oneword.serve.state import State

IdempotencyKey: TypeAlias = Annotated[
    str | None,
    Header(
        description="Any text that is unique among your requests. The request is then finished even if the connection "
        "is lost, and its answer kept for ten minutes: sent again with the same key, it gets the same answer.",
        max_length=255,
        pattern="^[!-~]+$",
    ),
]
Draw: TypeAlias = Callable[[contextlib.AsyncExitStack], Awaitable[bytes]]
"""Makes an answer. What it enters is left once the answer is kept, such as `room` for it."""

_STORE_SECONDS: Final = 10.0
_METADATA: Final = 4096  # bytes of a file that are neither pixels nor prompts


async def answered(
    state: State,
    tenant: Tenant,
    key: str,
    request: BaseModel,
    files: Sequence[bytes],
    draw: Draw,
) -> Response:
    """The answer to a request with a key: the kept one, or what `draw` makes, whether or not somebody waits for it.

    Raises Conflict if the key was that of another request, and what `draw` does.
    """
    digest = await state.in_thread(_digest, request, files)
    making = state.making.get((tenant.name, key))
    if making is None:
        making = state.making[tenant.name, key] = (
            digest,
            asyncio.ensure_future(_answer(state, tenant, key, digest, draw)),
        )
        making[1].add_done_callback(lambda done: _forget(state, tenant, key, done))
    if making[0] != digest or (answer := await asyncio.shield(making[1])).digest != digest:
        raise Conflict(
            "this Idempotency-Key was sent with another request: choose a new key for each request", "Idempotency-Key"
        )
    return Response(answer.content, media_type="application/json")


async def finish(state: State) -> None:
    """Returns when the answers to all requests with keys are kept, or if the store takes too long. Their pictures are
    ready or dropped by then."""
    if tasks := [task for _, task in state.making.values()]:
        await asyncio.wait(tasks, timeout=_STORE_SECONDS)


@contextlib.asynccontextmanager
async def room(state: State, tenant: Tenant, size: int) -> AsyncIterator[None]:
    """Room for so many bytes in the store. Raises as Results.reserved."""
    with contextlib.ExitStack() as stack:
        await state.in_thread(stack.enter_context, state.results.reserved(tenant, size))
        yield


def most_bytes(generation: Generation, *, pixels: int = 0, in_json: bool = False) -> int:
    """More than the pictures have as files, or as JSON that holds them: 4 bytes per pixel, and the prompts. `pixels` is
    the size of one if it is larger than what is drawn."""
    request, settings = generation.request, generation.settings
    characters = len(request.prompt) + len(request.negative_prompt or "")
    file = 4 * (max(pixels, settings.width * settings.height) + characters) + _METADATA
    return request.num_images * (4 * file // 3 if in_json else file)


async def _answer(state: State, tenant: Tenant, key: str, digest: str, draw: Draw) -> KeptAnswer:
    answer = await state.in_thread(state.results.answer, tenant, key)
    if answer is None:
        async with contextlib.AsyncExitStack() as stack:
            answer = KeptAnswer(digest, await draw(stack))
            await state.in_thread(state.results.put_answer, tenant, key, answer)
    return answer


def _forget(state: State, tenant: Tenant, key: str, done: asyncio.Task[KeptAnswer]) -> None:
    del state.making[tenant.name, key]
    if not done.cancelled():
        done.exception()  # its client may have left


def _digest(request: BaseModel, files: Sequence[bytes]) -> str:
    digest = hashlib.sha256(type(request).__name__.encode())
    for part in (request.model_dump_json().encode(), *files):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
