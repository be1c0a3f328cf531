"""uvicorn's HTTP connection, with limits on clients that send or read too slowly, or nothing at all.

Not covered: the time that a body may take, and who may send it (`serve.middleware`); signals (`serve.server`).
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from oneword.serve.errors import Invalid, openai_body
from oneword.serve.middleware import SECURITY_HEADERS, content_length
from oneword.serve.settings import Settings

_READ_BYTES = 16 << 10
_KEEP_ALIVE = 75
"""Seconds after which an idle connection is closed, as in nginx: longer than clients commonly wait between requests."""


class Connection(H11Protocol):
    """Closes a connection whose request head takes too long; cuts one off whose client stopped reading.

    Reads in small pieces: a request is refused after its head has arrived, before much of its body has. On Linux, a
    slow upload with a Content-Length stays in the kernel until such a piece, or the whole body, is there: an app that
    refuses a body by its beginning waits for that too. Not for TLS, where bytes of a body are not those of the socket.
    """

    head_seconds = 60.0
    write_seconds = 30.0

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _body_left = 0
    """Bytes of the body that have not been read; 0 or less if that is not known."""
    _wanted = 1
    """Bytes that wake this process up."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unsent byte counts as a pause
        if hasattr(transport, "max_size"):  # of asyncio's own transports; 256 KiB by default
            transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        with self._counting_body():
            super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._await_head()

    def on_response_complete(self) -> None:
        if self._wanted > 1 and self.transport.is_closing():
            self._drop_received()
        with self._counting_body():  # of a next request that came before this answer was complete
            super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._await_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The answer to something that is not HTTP, with the headers and the form of all others."""
        self._stop_head_timer()
        body = json.dumps(openai_body(Invalid("this is not a valid HTTP/1.1 request: check the client"))).encode()
        headers = [("Content-Type", "application/json"), ("Connection", "close"), ("Content-Length", str(len(body)))]
        for event in (
            h11.Response(status_code=400, headers=[*headers, *SECURITY_HEADERS.items()], reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @contextlib.contextmanager
    def _counting_body(self) -> Iterator[None]:
        """Counts what the block reads of a body. Then waits for a piece of it, or all of it, in the kernel."""
        cycle, unread = self.cycle, 0 if self.cycle is None else len(self.cycle.body)
        yield
        if self.cycle is not cycle:  # the block has read a head, and maybe the beginning of its body
            unread, self._body_left = 0, content_length(self.headers) or 0
        if self.conn.their_state is h11.SEND_BODY and not self.cycle.response_complete:
            self._body_left -= len(self.cycle.body) - unread
            self._want(min(self._body_left, _READ_BYTES))
        else:
            self._want(1)

    def _drop_received(self) -> None:
        """Drops what the kernel holds of a body. Closing the socket with it would reset the connection, and the client
        might not see its answer."""
        with contextlib.suppress(OSError):
            os.read(self.transport.get_extra_info("socket").fileno(), _READ_BYTES)

    def _want(self, size: int) -> None:
        """Lets the kernel wait for so many bytes, at least 1, or the end of the stream, before it reports that there is
        something to read. Linux checks what has already come when the number changes; elsewhere it stays at 1."""
        size = max(size, 1)
        if size != self._wanted and sys.platform == "linux":
            self._wanted = size
            with contextlib.suppress(OSError):  # the connection is lost
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _await_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.write_seconds, self._check_progress, unsent)

    def _check_progress(self, before: int) -> None:
        """A slow client is tolerated as long as it reads something in each period."""
        if self.transport.get_write_buffer_size() < before:
            self._await_progress()
        else:
            self.transport.abort()


def limited_connection(settings: Settings) -> type[Connection]:
    """The class of connections with the limits of `settings`."""
    limits = {"head_seconds": settings.body_seconds, "write_seconds": settings.write_seconds}
    return type("Connection", (Connection,), limits)


def server_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration. Its logging and its handling of proxies are off: `serve.middleware` does both."""
    return uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        http=limited_connection(settings),
        ws="none",
        loop="asyncio",  # with uvloop, which "auto" prefers where it is installed, reads are not small
        access_log=False,
        log_config=None,
        proxy_headers=False,  # by default, any local process is trusted
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        root_path=settings.root_path,
    )
