"""The listening server: uvicorn with our limits on connections, and a shutdown that finishes what runs.

The first SIGTERM or SIGINT stops new work: readiness says 503 while the socket still answers, requests that were
accepted are finished, and learning pauses, to be resumed later. A second one drops the requests, with an error for each
picture. SIGHUP reads the keys again. Not covered: the watchdog.
"""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from oneword.engines.errors import EngineError, OnewordError, UsageError, one_line
from oneword.serve import kept
from oneword.serve.app import running
from oneword.serve.connection import server_config
from oneword.serve.settings import Settings
from oneword.serve.state import State
from oneword.serve.watchdog import Heartbeat, Pulse
from oneword.serve.worker import State as WorkerState

_LAST_SECONDS: Final = 0.2  # for the last pictures, which are still being written to their clients
_OPEN_SECONDS: Final = 0.05  # between two checks of whether the model is open
_TICK_SECONDS: Final = 1.0  # between two updates of the Date header
_log = logging.getLogger("oneword.serve")


def listening_socket(settings: Settings) -> socket.socket:
    """A socket that listens at the address and port. Raises UsageError if they cannot be used."""
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restarted server need not wait
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host} port {port} ({error.strerror or error}): choose another --port or --host"
        ) from None
    return listener


class Server(uvicorn.Server):
    """Serves one app until a signal ends it, and starts and stops its parts."""

    def __init__(self, app: ASGIApp, state: State, heartbeat: Heartbeat | None = None) -> None:
        """With a heartbeat, its pulse is the server's from now on."""
        config = server_config(app, state.settings)
        config.lifespan = "off"  # `serve` does it, so that errors reach the caller
        config.timeout_graceful_shutdown = math.ceil(state.settings.write_seconds)  # to encode and send the last ones
        super().__init__(config)
        self.state_of_app = state
        self._stopping: asyncio.Task[None] | None = None
        self._opened = False
        self._failure: OnewordError | None = None
        self._leaving = asyncio.Event()
        self._heartbeat = heartbeat
        if heartbeat is not None:
            heartbeat.pulse = self.pulse

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Returns when a signal has ended the server. Raises OnewordError if it cannot start."""
        super().run(sockets)
        if self._failure is not None:
            raise self._failure

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See `run`."""
        async with running(self.state_of_app):
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        _log.info("listening at http://%s:%s", f"[{host}]" if ":" in host else host, port)
        self._opening = asyncio.ensure_future(self._follow_opening())

    async def main_loop(self) -> None:
        """Returns when the server is to end. uvicorn's own looks ten times a second: on a shared core every look stops
        the engine."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), _TICK_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled on the event loop, by `stop` and `reload`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.reload()  # a SIGHUP since the file was read was ignored
        yield

    def stop(self) -> None:
        """Drains and ends the server; a second call drops what it would finish, a third one the connections too."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._drain(self.state_of_app.settings.drain_seconds))
        elif not self.should_exit:
            asyncio.ensure_future(self.state_of_app.pool.drain(0))  # noqa: RUF006 - it ends before this process does
        else:
            self.force_exit = True

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

    def pulse(self) -> Pulse:
        """The state for the watchdog. A model that cannot be opened is not part of it: `run` raises."""
        state = self.state_of_app
        return state.worker.pulse(state.settings.hang_seconds) if self._opened else Pulse.STARTING

    async def _follow_opening(self) -> None:
        """Says when the model is open; ends the server if it cannot be opened."""
        worker = self.state_of_app.worker
        while worker.state is WorkerState.STARTING:
            await asyncio.sleep(_OPEN_SECONDS)
        if worker.state is WorkerState.FAILED:
            self._failure = EngineError(worker.failure)
            self._leave()
        if worker.state is WorkerState.READY:
            gc.collect()
            gc.freeze()  # a full collection of what lasts as long as the process would stop all threads for tens of ms
            self._opened = True
            reason = f" ({worker.backend_reason})" if worker.backend_reason else ""
            _log.info("ready: %s, %s%s", self.state_of_app.name, worker.backend, reason)
        if self._heartbeat is not None:
            with contextlib.suppress(BrokenPipeError):  # the heartbeat's own thread ends this process then
                self._heartbeat.beat()  # from now on, a hang is noticed soon

    async def _drain(self, seconds: float | None) -> None:
        limit = "" if seconds is None else f", for at most {seconds:g} seconds"
        _log.info("stopping: what was accepted is finished%s", limit)
        await asyncio.gather(self.state_of_app.pool.drain(seconds), self.state_of_app.jobs.drain())
        await kept.drain(self.state_of_app)
        await asyncio.sleep(_LAST_SECONDS)
        self.state_of_app.stopping.set()
        self._leave()

    def _leave(self) -> None:
        """Ends `main_loop`."""
        self.should_exit = True
        self._leaving.set()
