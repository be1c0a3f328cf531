"""Requests that are finished although their client has left: those with an Idempotency-Key.

Their answer is kept in the store for ten minutes. A client that has lost its connection sends the request again, with
its key, and gets that answer, or waits for it if it is still being made. After a restart, or through another server on
the same store, it gets the answer if it was ready and the bundle is the same, else the pictures are made again. Errors
and interrupted requests are not kept. Not covered: streams, and where answers are kept (`oneword.serve.results`).
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Final, TypeAlias, TypeVar

from fastapi import Header
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from oneword.engines.errors import counted
from oneword.serve.errors import Busy, Conflict, Invalid, Unavailable
from oneword.serve.generate import Disconnected, disconnect
from oneword.serve.keys import Tenant
from oneword.serve.middleware import BODIES_LIMIT, IDEMPOTENCY_KEY
from oneword.serve.pool import Generation
from oneword.serve.results import KeptAnswer
from oneword.serve.state import PendingAnswer, State, caller

T = TypeVar("T")
IdempotencyKey: TypeAlias = Annotated[
    str | None,
    Header(
        description="Any text that is unique among your requests. The request is then finished even if the connection "
        "is lost, and its answer kept for ten minutes: sent again with the same key, it gets the same answer.",
        pattern=f"^{IDEMPOTENCY_KEY}$",
    ),
]
Draw: TypeAlias = Callable[[contextlib.AsyncExitStack], Awaitable[tuple[bytes, bool]]]
"""Makes an answer, and says whether it has all pictures. What it enters is left once the answer is kept, such as `room`
for it."""

MAX_REQUESTS: Final = 1000
"""Requests with keys that one tenant may have in progress, also those whose clients have left."""
MAX_BYTES: Final = 128 << 20
"""Bytes of their bodies, which are in memory. All tenants together may have BODIES_LIMIT."""
_STORE_SECONDS: Final = 10.0
_BUSY_SECONDS: Final = 5.0
_METADATA: Final = 4096  # bytes of a file that are neither pixels nor prompts


async def answered(http: HTTPRequest, key: str, request: BaseModel, files: Sequence[bytes], draw: Draw) -> Response:
    """The answer to a request with a key: the kept one, or what `draw` makes, even if the client leaves.

    Raises Conflict if the key was that of another request, Invalid if it cannot be compared with others, Busy if too
    many requests with keys are in progress, Disconnected, and what `draw` does.
    """
    state, tenant = caller(http)
    digest, size = await state.in_thread(_digest, request, files)
    pending = state.pending_answers.get((tenant.name, key))
    if pending is None:
        _check_room(state, tenant, size)
        task = asyncio.ensure_future(_kept_or_drawn(state, tenant, key, digest, draw))
        pending = state.pending_answers[tenant.name, key] = PendingAnswer(digest, size, task)
        task.add_done_callback(lambda done: _forget(state, tenant, key, done))
    if pending.digest != digest or (answer := await _result(http, pending.task)).digest != digest:
        raise Conflict(
            "this Idempotency-Key was sent with another request: choose a new key for each request", "Idempotency-Key"
        )
    return Response(answer.content, media_type="application/json")


async def drain(state: State) -> None:
    """Returns when the answers to all requests with keys are kept, or if the store takes too long. Their pictures are
    ready or dropped by then."""
    if tasks := [pending.task for pending in state.pending_answers.values()]:
        await asyncio.wait(tasks, timeout=_STORE_SECONDS)


@contextlib.asynccontextmanager
async def room(state: State, tenant: Tenant, size: int, entries: int = 1) -> AsyncIterator[None]:
    """Room in the store for so many pictures and answers, of so many bytes. Raises as Results.reserved."""
    await state.in_thread(state.results.count, tenant)
    with state.results.reserved(tenant, size, entries):
        yield


def most_bytes(generation: Generation, *, pixels: int = 0, in_json: bool = False) -> int:
    """More than the pictures have as files, or as JSON that holds them: 4 bytes per pixel, and the prompts. `pixels` is
    the size of one if it is larger than what is drawn."""
    request, settings = generation.request, generation.settings
    characters = len(request.prompt) + len(request.negative_prompt or "")
    file = 4 * (max(pixels, settings.width * settings.height) + characters) + _METADATA
    return request.num_images * (4 * file // 3 if in_json else file)


async def _result(http: HTTPRequest, task: asyncio.Task[T]) -> T:
    """The result of a task, which continues if the client leaves. Raises Disconnected then."""
    gone = asyncio.ensure_future(disconnect(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not task.done():
        raise Disconnected
    return task.result()


async def _kept_or_drawn(state: State, tenant: Tenant, key: str, digest: str, draw: Draw) -> KeptAnswer:
    name = f"{state.bundle_digest} {key}"  # another bundle makes other pictures
    answer = await state.in_thread(state.results.answer, tenant, name)
    if answer is None:
        state.pool.check(tenant)  # it is no repetition: the same holds for it as for a request without a key
        async with contextlib.AsyncExitStack() as stack:
            content, complete = await draw(stack)
            answer = KeptAnswer(digest, content)
            if complete:
                with contextlib.suppress(Unavailable):  # which the store has logged; the client gets the pictures
                    await state.in_thread(state.results.put_answer, tenant, name, answer)
    return answer


def _check_room(state: State, tenant: Tenant, size: int) -> None:
    """Raises Busy if a tenant, or all together, have too many requests with keys in progress."""
    sizes = [pending.size for (name, _), pending in state.pending_answers.items() if name == tenant.name]
    if len(sizes) >= MAX_REQUESTS or sum(sizes) + size > MAX_BYTES:
        raise Busy(
            f"you have {counted(len(sizes), 'request')} with an Idempotency-Key in progress, of {sum(sizes)} bytes, "
            f"and this one has {size}, but may have at most {MAX_REQUESTS} of {MAX_BYTES} bytes together: send it "
            "again later, or without the key",
            _BUSY_SECONDS,
            code="quota_exceeded",
        )
    if sum(pending.size for pending in state.pending_answers.values()) + size > BODIES_LIMIT:
        raise Busy(
            "too many large requests with an Idempotency-Key are in progress: send it again later, or without the key",
            _BUSY_SECONDS,
        )


def _forget(state: State, tenant: Tenant, key: str, done: asyncio.Task[KeptAnswer]) -> None:
    del state.pending_answers[tenant.name, key]
    if not done.cancelled():
        done.exception()  # its client may have left


def _digest(request: BaseModel, files: Sequence[bytes]) -> tuple[str, int]:
    """A digest of a request with its files, and their bytes."""
    digest = hashlib.sha256(type(request).__name__.encode())
    try:
        fields = request.model_dump_json().encode()
    except PydanticSerializationError:
        raise Invalid(
            "with an Idempotency-Key, text must be UTF-8 and nothing may be nested hundreds of levels deep: send the "
            "request without the key"
        ) from None
    for part in (fields, *files):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest(), len(fields) + sum(map(len, files))
