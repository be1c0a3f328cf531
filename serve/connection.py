"""uvicorn's HTTP connection, with limits on clients that send or read too slowly, or nothing at all.

Not covered: the time that a body may take, and who may send it (`serve.middleware`); signals (`serve.server`).
"""

import asyncio
import json

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from oneword.serve.errors import Invalid, openai_body
from oneword.serve.middleware import SECURITY_HEADERS
from oneword.serve.settings import Settings

_READ_BYTES = 16 << 10
_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Closes a connection whose request head takes too long or is too large; cuts one off whose client stopped reading.

    Reads in small pieces: a request is refused after its head has arrived, before much of its body has. A client that
    offers to speak another protocol (Upgrade: h2c) is answered in HTTP/1.1.
    """

    head_seconds = 60.0
    write_seconds = 30.0

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    """Received since the last piece of a body: of a head, a chunk's extensions, or a trailer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unsent byte counts as a pause
        if hasattr(transport, "max_size"):  # of asyncio's own transports; 256 KiB by default
            transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("the request is not valid")
            return
        if self._head_bytes > _HEAD_BYTES:
            self.send_400_response("the head is too large")
        elif not self._in_head:
            self._stop_head_timer()
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_parse` begins again
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            raise ValueError("HTTP/1.1 asks for one Host header")  # the parser makes it a 400
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head, self._head_bytes = True, 0
        self._stop_head_timer()
        super().on_message_complete()

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
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # an answer in the middle of another one would be part of it
            return
        body = json.dumps(openai_body(Invalid("this is not a valid HTTP/1.1 request: check the client"))).encode()
        headers = {"Content-Type": "application/json", "Connection": "close", "Content-Length": str(len(body))}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | SECURITY_HEADERS).items()]
        self.transport.write(b"".join((STATUS_LINE[400], *lines, b"\r\n", body)))
        self.transport.close()

    def _parse(self, data: bytes) -> None:
        """Feeds the parser. It takes a request with Upgrade for one without a body: another one gets it without that
        header. Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":  # it has no other meaning
                raise httptools.HttpParserInvalidMethodError("CONNECT") from None
            headers = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            head = b"".join((b"%b %b HTTP/%b\r\n" % (method, self.url, version), *headers, b"\r\n"))
            self.parser = httptools.HttpRequestParser(self)
            self._parse(head + data[upgrade.args[0] :])

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
        root_path=settings.root_path,
    )
