"""Calls that several callers share. Not covered: what is called, and in which thread."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class SharedCalls:
    """Shares a call among callers that request it before it begins, so that no result is older than its request."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, asyncio.Task[Any]] = {}
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    async def __call__(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, or of an equal one, which continues for others if this caller is cancelled."""
        task = self._waiting.get(key)
        if task is None:
            task = asyncio.ensure_future(self._take_turn(key, call))
            task.add_done_callback(_retrieve)
            self._waiting[key] = task
        result: T = await asyncio.shield(task)
        return result

    async def _take_turn(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        if (running := self._running.get(key)) is not None:
            await asyncio.wait((running,))
        task = self._running[key] = self._waiting.pop(key)
        try:
            return await call()
        finally:
            if self._running.get(key) is task:
                del self._running[key]


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Keeps asyncio from complaining about an exception if all who waited for it were cancelled."""
    if not task.cancelled():
        task.exception()
