"""The listening server: uvicorn with our limits on connections, and a shutdown that finishes what runs.

The first SIGTERM or SIGINT stops new work: readiness says 503 while the socket still answers, and what was accepted is
finished. A second one drops it, with an error for each picture. SIGHUP reads the keys again. Not covered: the watchdog.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from oneword.engines.errors import OnewordError, one_line
from oneword.serve.connection import server_config
from oneword.serve.state import State

_log = logging.getLogger("oneword.serve")


class Server(uvicorn.Server):
    """Serves one app until a signal ends it."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.state_of_app = state
        super().__init__(server_config(app, state.settings))
        self._stopping: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listens, and says where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            _log.info("listening at http://%s:%s", host, port)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled on the event loop, by `stop` and `reload`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        yield

    def stop(self) -> None:
        """Drains and ends the server; a second call ends it at once."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._drain(self.state_of_app.settings.drain_seconds))
        else:
            asyncio.ensure_future(self.state_of_app.pool.drain(0))  # noqa: RUF006 - it ends before this process does

    def reload(self) -> None:
        """Reads the key file again; a broken one changes nothing."""
        keys = self.state_of_app.keys
        if keys is None:
            return
        try:
            keys.reload()
            _log.info("read %d keys", len(keys))
        except OnewordError as error:
            reason = one_line(error, limit=1000).replace(str(keys.path), "the file of --keys")
            _log.error("the keys stay as they were: %s", reason)

    async def _drain(self, seconds: float) -> None:
        _log.info("stopping: what was accepted is finished, for at most %g seconds", seconds)
        await self.state_of_app.pool.drain(seconds)
        await asyncio.sleep(0.2)  # the last pictures are still being written to their clients
        self.should_exit = True
