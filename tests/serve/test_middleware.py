"""Every request is checked before its body is read: on a real server and real sockets where those matter."""

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, File, Request, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from oneword.serve import errors, middleware
from oneword.serve.app import build_state, create_app
from oneword.serve.connection import Connection, limited_connection, server_config
from oneword.serve.errors import Busy
from oneword.serve.keys import Keys, Tenant
from oneword.serve.middleware import AccessLog, LimitBody, TrustedProxy, allowed_hosts, content_length
from oneword.serve.settings import Settings

KEY = "ow_the-key-of-alice"
LIMIT = 100_000
PIECE = bytes(1 << 20)


class Prompt(BaseModel):
    prompt: str


def make_app(keys: Keys | None = None, **settings: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    @app.get("/static/page.js")
    @app.get("/health/live")
    async def page() -> str:
        return "page"

    @app.get("/v1/who")
    async def caller(request: Request) -> dict[str, Any]:
        assert request.client is not None
        return {
            "tenant": request.state.tenant.name,
            "client": request.client.host,
            "scheme": request.url.scheme,
            "host": request.headers["host"],
        }

    @app.post("/v1/prompt")
    async def prompt(prompt: Prompt) -> int:
        return len(prompt.prompt)

    @app.post("/v1/file")
    async def file(image: Annotated[UploadFile, File()]) -> int:
        return image.size or 0

    @app.post("/v1/unread")
    async def unread() -> str:
        return "unread"

    @app.post("/v1/swallows")
    async def swallows(request: Request) -> str:
        with contextlib.suppress(Exception):
            await request.body()
        return "swallowed"

    @app.get("/v1/words/{name}")
    async def raises(name: str) -> None:
        raise RuntimeError(f"{name} /secret/path")

    errors.install(app)
    chosen = Settings(Path("bundle"), **settings)
    middleware.install(app, chosen, keys, limits=[("/v1/", LIMIT), ("", 1000)])
    return app


def full_app(keys: Keys | None = None, limits: Sequence[tuple[str, int]] = (("", 1 << 20),)) -> FastAPI:
    """An app whose routes for pictures have no room for anybody."""
    app = FastAPI()

    @app.post("/v1/images/generations")
    @app.get("/v1/images/generations")
    @app.post("/v1/images/other")
    async def prompt(request: Request) -> int:
        return len(await request.body())

    def check(tenant: Tenant) -> None:
        raise Busy(f"{tenant.name} has to wait", 7)

    errors.install(app)
    middleware.install(app, Settings(Path("bundle")), keys, limits=limits, check=check)
    return app


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the whole body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (tmp_path / "keys.toml").write_text(f'[alice]\nsha256 = "{digest}"\n')
    return Keys.read(tmp_path / "keys.toml")


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    received: int = 0
    """Number of messages that were read."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: Any,
    method: str = "GET",
    path: str = "/v1/who",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    chunks: Sequence[bytes] = (b"",),
    client: str = "127.0.0.1",
    root_path: str = "",
) -> Answer:
    """One request, straight into the app."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    if not any(name == "Host" for name, _ in pairs):
        pairs.append(("Host", "localhost:8000"))
    answer = Answer()

    async def receive() -> Any:
        if answer.received == len(chunks):
            return {"type": "http.disconnect"}
        answer.received += 1
        return {
            "type": "http.request",
            "body": chunks[answer.received - 1],
            "more_body": answer.received < len(chunks),
        }

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": [(name.lower().encode(), value.encode("utf-8")) for name, value in pairs],
        "client": (client, 1234),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    asyncio.run(app(scope, receive, send))
    return answer


class Server(uvicorn.Server):
    """A real server on a free port, in a thread; counts the bytes it has read, and how often it has read."""

    def __init__(self, app: Any, keep_alive: int = 5, **settings: Any) -> None:
        server = self
        self.bytes_read = 0
        self.reads = 0
        self.ready = threading.Event()
        self.closed = threading.Event()
        config = server_config(app, Settings(Path("bundle"), port=0, **settings))
        limited = config.http
        assert isinstance(limited, type)
        assert issubclass(limited, Connection)

        class Counting(limited):  # type: ignore[valid-type, misc]
            def data_received(self, data: bytes) -> None:
                server.bytes_read += len(data)
                server.reads += 1
                super().data_received(data)

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                server.closed.set()

        config.http = Counting
        config.timeout_keep_alive = keep_alive
        config.timeout_graceful_shutdown = 1
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return host, port

    def connect(self) -> socket.socket:
        """A connection that sends every piece at once."""
        connection = socket.create_connection(self.address, timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


@contextlib.contextmanager
def serving(app: Any, **settings: Any) -> Iterator[Server]:
    """A running server; `settings` are those of `Server`."""
    server = Server(app, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.ready.wait(20)
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, however it ends."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data


def read_until(connection: socket.socket, text: bytes) -> bytes:
    """Everything up to this text, and what came with it."""
    data = b""
    while text not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


def send_all(connection: socket.socket, piece: bytes, times: int) -> int:
    """Sends a piece again and again until the server has had enough. Returns the bytes that were sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            connection.sendall(piece)
            sent += len(piece)
    return sent


@pytest.mark.parametrize("framing", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_a_wrong_key_is_refused_after_64_kib_of_a_body_of_1_gib(keys: Keys, framing: str) -> None:
    piece = bytes(1 << 20) if "Length" in framing else b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with serving(make_app(keys)) as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/prompt", framing, "Authorization: Bearer wrong") + piece[:200_000])
        sent = send_all(connection, piece, 1024)
        answer = read_all(connection)

        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in answer.lower()
        assert sent < 1 << 30
        assert server.bytes_read <= 64 << 10


def test_a_request_for_pictures_is_refused_without_room_after_its_key_and_its_address_are_checked(keys: Keys) -> None:
    app, key = full_app(keys), {"Authorization": f"Bearer {KEY}"}
    path = "/v1/images/generations"

    refused = ask(app, "POST", path, key, [b"{ no", b" JSON"])
    statuses = [
        *(
            ask(app, "POST", path, {**key, "Idempotency-Key": name}).status
            for name in ("a" * 255, "a" * 256, "a b", "")
        ),
        ask(app, "POST", path).status,
        ask(app, "POST", "/v1/images/other", key, [b"a"]).status,
        ask(app, "POST", "/v1/images/none", key).status,
        ask(app, "GET", path, key).status,
        ask(app, "POST", path, {**key, "Content-Length": str(2 << 20)}).status,
    ]

    assert (refused.status, refused.json["error"]["message"]) == (429, "alice has to wait")
    assert refused.headers["retry-after"] == "7"
    assert refused.received == 2
    assert statuses == [200, 429, 429, 429, 401, 200, 404, 200, 413]


def test_a_client_that_sends_a_large_body_sees_that_there_is_no_room_and_may_send_again() -> None:
    with serving(full_app()) as server, contextlib.closing(HTTPConnection(*server.address)) as connection:
        connection.connect()
        opened = connection.sock
        for _ in range(2):
            connection.request("POST", "/v1/images/generations", bytes(1 << 20))
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Retry-After")) == (429, "7")
            assert b"has to wait" in answer.read()
        assert connection.sock is opened


class LateBody(Sequence[bytes]):
    """60 MiB, and a last byte that comes once all of the others wait for theirs."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self._barrier = barrier

    def __len__(self) -> int:
        return 61

    def __getitem__(self, index: Any) -> Any:
        if index < 60:
            return PIECE
        self._barrier.wait(20)
        return b"x"


def test_bodies_that_are_dropped_take_no_room() -> None:
    app, barrier = full_app(limits=middleware.BODY_LIMITS), threading.Barrier(9)

    with ThreadPoolExecutor(9) as threads:  # 540 MiB
        requests = [threads.submit(ask, app, "POST", "/v1/images/edits", {}, LateBody(barrier)) for _ in range(9)]

    assert [request.result().status for request in requests] == [429] * 9


def test_a_client_that_asks_before_it_sends_its_body_is_refused_at_once() -> None:
    with serving(full_app()) as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/images/generations", "Content-Length: 1000", "Expect: 100-continue"))
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b"connection: close" in answer.lower()


def test_the_routes_for_pictures_are_those_of_the_server(tmp_path: Path, tiny_bundle: Path) -> None:
    settings = Settings(tiny_bundle, words=str(tmp_path))
    paths = create_app(build_state(settings)).openapi()["paths"]

    drawing = {path for path, methods in paths.items() if "post" in methods and path.startswith("/v1/images/")}
    assert {*middleware.PICTURE_ROUTES} == drawing | {"/sdapi/v1/txt2img", "/sdapi/v1/img2img"}
    assert {*middleware.PICTURE_ROUTES} <= paths.keys()


def test_a_request_without_a_body_keeps_its_connection_open() -> None:
    with serving(make_app()) as server, contextlib.closing(HTTPConnection(*server.address)) as connection:
        connection.connect()
        opened = connection.sock
        for _ in range(2):
            connection.request("GET", "/v1/who")
            answer = connection.getresponse()
            answer.read()
            assert (answer.status, answer.getheader("connection")) == (200, None)
        assert connection.sock is opened


def test_a_body_that_is_too_large_is_refused_before_any_of_it_is_read() -> None:
    for path, limit in (("/v1/prompt", LIMIT), ("/other", 1000)):
        answer = ask(make_app(), "POST", path, {"Content-Length": str(limit + 1)}, [b"x"] * 10)
        assert (answer.status, answer.received) == (413, 0)
        assert answer.headers["connection"] == "close"
        assert answer.json["error"]["message"] == (
            f"the body has more than the allowed {limit} bytes: send less, or smaller pictures"
        )


@pytest.mark.parametrize("path", ["/v1/prompt", "/v1/file", "/v1/swallows"])
def test_a_chunked_body_is_cut_off_at_the_limit_whatever_the_route_makes_of_it(path: str) -> None:
    boundary = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' if path == "/v1/file" else b""
    )
    piece = b"1000\r\n" + bytes(4096) + b"\r\n"
    with serving(make_app()) as server, server.connect() as connection:
        kind = "Content-Type: multipart/form-data; boundary=x" if boundary else "Content-Type: application/json"
        connection.sendall(head("POST", path, "Transfer-Encoding: chunked", kind))
        if boundary:
            connection.sendall(f"{len(boundary):x}\r\n".encode() + boundary + b"\r\n")
        send_all(connection, piece, 100_000)
        answer = read_all(connection)

        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"more than the allowed 100000 bytes" in answer
        assert server.bytes_read <= LIMIT + (256 << 10)


@pytest.mark.parametrize(
    ("path", "mebibytes"),
    [
        ("/sdapi/v1/txt2img", 1),
        ("/sdapi/v1/options", 1),
        ("/sdapi/v1/img2img", 64),
        ("/sdapi/v1/png-info", 32),
        ("/v1/images/edits", 64),
        ("/v1/images/generations", 1),
    ],
)
def test_only_routes_that_take_pictures_have_a_large_limit(path: str, mebibytes: int) -> None:
    app = errors.CatchErrors(LimitBody(reading))
    sizes = {"Content-Length": str(mebibytes << 20)}, {"Content-Length": str((mebibytes << 20) + 1)}

    assert [ask(app, "POST", path, headers).status for headers in sizes] == [200, 413]


@pytest.mark.parametrize("piece", [b"[" * 1000, b"0," * 1000, b'{"":' * 1000])
def test_a_large_json_body_may_not_have_many_parts(piece: bytes) -> None:
    app = errors.CatchErrors(LimitBody(reading))

    for path in ("/sdapi/v1/img2img", "/v1/words/%3Ctoy%3E/refine"):
        for kind in ("application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"):
            for pieces, status in ((201, 413), (199, 200)):
                assert ask(app, "POST", path, {"Content-Type": kind}, [piece] * pieces).status == status
        for kind in ("multipart/form-data; boundary=json", "application/octet-stream"):
            assert ask(app, "POST", path, {"Content-Type": kind}, [piece] * 201).status == 200


def test_all_bodies_together_are_limited_and_small_ones_pass() -> None:
    statuses: list[int] = []

    async def nested(scope: Any, receive: Any, send: Any) -> None:
        """While it has its body, another request comes."""
        await receive()
        for size, headers in ((600, {}), (600, {"Content-Length": "600"}), (300, {})):
            answer = await asyncio.to_thread(ask, other, "POST", "/v1/who", headers, [b"x" * size])
            statuses.append(answer.status)
        await reading(scope, receive, send)

    limit = LimitBody(reading, total=1000)
    other = errors.CatchErrors(limit)
    outer = LimitBody(nested, total=1000)
    outer._room = limit._room

    assert ask(errors.CatchErrors(outer), "POST", chunks=[b"x" * 600]).status == 200
    assert statuses == [503, 200, 200]
    assert ask(other, "POST", chunks=[b"x" * 1000]).status == 200  # all of it is free again


def test_a_chunked_body_within_the_limit_is_accepted() -> None:
    with serving(make_app()) as server, server.connect() as connection:
        body = json.dumps({"prompt": "x" * 90_000}).encode()
        connection.sendall(
            head(
                "POST",
                "/v1/prompt",
                "Transfer-Encoding: chunked",
                "Content-Type: application/json",
                "Connection: close",
            )
        )
        for i in range(0, len(body), 1000):
            piece = body[i : i + 1000]
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"90000")


@pytest.mark.parametrize("path", ["/v1/prompt", "/v1/swallows"])
@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_arrive_in_time_is_a_408(path: str, framing: str) -> None:
    with serving(make_app(body_seconds=0.2)) as server, server.connect() as connection:
        connection.sendall(head("POST", path, framing, "Content-Type: application/json") + b"1\r\n{\r\n")
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.2 seconds: send less, or over a faster connection" in answer


def test_a_client_that_trickles_its_body_is_refused_as_well() -> None:
    async def trickle() -> int:
        status = 0

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        app = FastAPI()

        @app.post("/")
        async def body(request: Request) -> int:
            return len(await request.body())

        await errors.CatchErrors(LimitBody(app, seconds=0.2))(scope, receive, send)
        return status

    assert asyncio.run(trickle()) == 408


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every piece is read as it comes")
def test_a_slow_upload_is_read_in_few_pieces_and_its_connection_is_used_again() -> None:
    body = json.dumps({"prompt": "a" * 40_000}).encode()
    request = head("POST", "/v1/prompt", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    with serving(make_app()) as server, server.connect() as connection:
        for _ in range(2):
            before = server.reads
            for start in range(0, len(request), 200):
                connection.sendall(request[start : start + 200])
                time.sleep(0.001)
            read_until(connection, b"40000")
            assert server.reads - before <= 10  # of 200 pieces: the head, and at least 16 KiB at a time


@pytest.mark.parametrize("path", ["/v1/unread", "/v1/swallows"])
def test_a_body_in_pieces_does_not_hold_up_the_next_request_whether_it_is_used_or_not(path: str) -> None:
    with serving(make_app()) as server, server.connect() as connection:
        for length in (10, 30_000):
            body = b"x" * length
            connection.sendall(head("POST", path, f"Content-Length: {length}") + body[:5])
            time.sleep(0.05)
            connection.sendall(body[5:-1])
            time.sleep(0.05)
            connection.sendall(body[-1:] + head("GET", "/v1/who"))
            assert read_until(connection, b'"tenant"').count(b"HTTP/1.1 200 ") == 2


def test_the_body_of_a_request_that_came_with_the_one_before_may_be_late() -> None:
    first, second = (json.dumps({"prompt": "a" * length}).encode() for length in (3000, 70))
    lines = "Content-Type: application/json", "Content-Length: "
    requests = [head("POST", "/v1/prompt", lines[0], f"{lines[1]}{len(body)}") + body for body in (first, second)]
    with serving(make_app()) as server, server.connect() as connection:
        connection.sendall(requests[0] + requests[1][:-60])
        read_until(connection, b"3000")
        for start in (-60, -59):
            connection.sendall(requests[1][start : start + 1 if start < -59 else None])
            time.sleep(0.05)
        assert read_until(connection, b"\r\n\r\n70").startswith(b"HTTP/1.1 200 ")


def test_a_body_in_chunks_ends_with_its_last_chunk_whatever_its_length_is_said_to_be() -> None:
    body = json.dumps({"prompt": "a" * 70}).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    lines = "Content-Type: application/json", "Content-Length: 50000", "Transfer-Encoding: chunked"
    with serving(make_app()) as server, server.connect() as connection:
        for piece in (head("POST", "/v1/prompt", *lines), chunks[:20], chunks[20:]):
            connection.sendall(piece)
            time.sleep(0.05)
        assert read_until(connection, b"\r\n\r\n70").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([], None),
        ([(b"content-length", b"12")], 12),
        ([(b"content-length", b"+1")], None),
        ([(b"transfer-encoding", b"chunked")], None),
        ([(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], None),
    ],
)
def test_a_body_in_chunks_has_no_length(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    assert content_length(headers) == length


def test_a_connection_with_half_a_body_is_closed_and_not_reset() -> None:
    with serving(make_app(body_seconds=0.3)) as server:
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head("POST", "/v1/swallows", "Content-Length: 9000"))
                time.sleep(0.05)
                connection.sendall(b"x" * 1000)
                answer = b""
                while piece := connection.recv(65536):  # raises ConnectionResetError after a reset
                    answer += piece
            assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_sends_on_after_its_answer_keeps_the_connection_open() -> None:
    with serving(make_app(), keep_alive=1) as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/unread", "Content-Length: 30000"))
        assert read_until(connection, b"unread").startswith(b"HTTP/1.1 200 ")
        for _ in range(30):  # longer than an idle connection is kept
            connection.sendall(b"x" * 100)
            time.sleep(0.05)
        connection.sendall(b"x" * 27_000 + head("GET", "/v1/who"))
        assert read_until(connection, b'"tenant"').startswith(b"HTTP/1.1 200 ")


def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed() -> None:
    with serving(make_app()) as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/swallows", "Content-Length: 90000") + b"x" * 100)
        time.sleep(0.05)
        connection.close()

        assert server.closed.wait(5)


def test_a_request_head_that_does_not_arrive_in_time_ends_the_connection() -> None:
    with serving(make_app(), body_seconds=0.2) as server:
        for data in (b"", b"GET / HT", head("GET", "/")[:-2]):
            server.closed.clear()
            with server.connect() as connection:
                connection.sendall(data)
                assert read_all(connection) == b""
        with server.connect() as connection:  # a second request on the same connection
            connection.sendall(head("GET", "/") + b"GET / HT")
            assert read_all(connection).count(b"HTTP/1.1") == 1


class Watched(StreamingResponse):
    """Sets an event when it is over, however it ends."""

    def __init__(self, pieces: AsyncIterator[bytes], over: threading.Event) -> None:
        super().__init__(pieces)
        self._over = over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over.set()


def streaming_app(over: threading.Event) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/endless")
    async def endless() -> Watched:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield bytes(1 << 16)
                await asyncio.sleep(0)

        return Watched(pieces(), over)

    @app.get("/v1/large")
    async def large() -> Watched:
        async def pieces() -> AsyncIterator[bytes]:
            yield bytes(24 << 20)

        return Watched(pieces(), over)

    errors.install(app)
    middleware.install(app, Settings(Path("bundle"), write_seconds=0.2))
    return app


@pytest.mark.parametrize("path", ["/v1/endless", "/v1/large"])
def test_a_client_that_does_not_read_is_cut_off(path: str, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    with serving(streaming_app(over), write_seconds=0.2) as server, server.connect() as connection:
        connection.sendall(head("GET", path))

        assert over.wait(20)
        assert server.closed.wait(20)
        assert len(read_all(connection)) < 24 << 20
    assert "Traceback" not in caplog.text


def test_a_client_that_reads_slowly_is_not_cut_off_however_long_one_message_takes() -> None:
    with serving(streaming_app(threading.Event()), write_seconds=1.0) as server, server.connect() as connection:
        connection.sendall(head("GET", "/v1/large", "Connection: close"))
        size = 0
        pause = threading.Event()
        while piece := connection.recv(1 << 19):
            size += len(piece)
            pause.wait(0.02)

    assert size > 24 << 20


def test_what_is_not_http_is_answered_with_the_headers_of_all_answers() -> None:
    with serving(make_app()) as server:
        for data in (b"\x16\x03\x01 TLS\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", head("GET", "/", "X: " + "x" * 100_000)):
            with server.connect() as connection:
                connection.sendall(data)
                answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
            assert b"content-security-policy: default-src 'none'" in answer.lower()


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", None),
        ("localhost", None),
        ("127.0.0.1:8000", None),
        ("127.0.0.1:9000", None),  # a forwarded port
        ("[::1]:8000", None),
        ("LOCALHOST:8000", "http://localhost:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("pictures.example.com", "https://pictures.example.com"),
        ("127.0.0.1:8000", "https://pictures.example.com"),  # a proxy that does not pass the Host
    ],
)
def test_this_servers_own_page_and_clients_without_an_origin_pass(host: str, origin: str | None) -> None:
    app = make_app(public_url="https://pictures.example.com/oneword")
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}

    assert ask(app, headers=headers).status == 200
    assert ask(app, "POST", "/v1/unread", headers=headers).status == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),  # DNS that points at this machine
        ("evil.example:8000", "http://evil.example:8000"),
        ("localhost.evil.example", None),
        ("localhost:8000@evil.example", None),
        ("127.0.0.1.evil.example", None),
        ("192.168.1.5:8000", None),
        ("", None),
        ("localhost:8000, evil.example", None),
        ("localhost:8000/evil", None),
        ("löcalhost", None),
        ("[::1", None),
        ("localhost:8000", "null"),
        ("localhost:8000", "https://evil.example"),
        ("localhost:8000", "http://localhost:3000"),  # another server on this machine
        ("localhost:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000.evil.example"),
        ("localhost:8000", "localhost:8000"),
        ("localhost:8000", "file://localhost:8000"),
        ("localhost:8000", "chrome-extension://localhost:8000"),
        ("localhost:8000", ""),
    ],
)
def test_attacked_browsers_are_refused(host: str, origin: str | None) -> None:
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    for method, path in (("GET", "/"), ("POST", "/v1/unread"), ("OPTIONS", "/v1/unread")):
        answer = ask(make_app(), method, path, headers, [b"x"])

        assert (answer.status, answer.received) == (403, 0)
        assert answer.json["error"]["code"] in ("host_not_allowed", "origin_not_allowed")
        assert "evil" not in answer.body.decode()
        assert "access-control-allow-origin" not in answer.headers


def test_two_hosts_or_a_second_origin_do_not_get_past_the_check() -> None:
    assert ask(make_app(), headers=[("Host", "localhost"), ("Host", "evil.example")]).status == 403
    origins = [("Host", "localhost"), ("Origin", "http://localhost"), ("Origin", "http://evil.example")]
    assert ask(make_app(), headers=origins).status == 403


def test_a_server_on_all_addresses_answers_to_digits_and_to_its_public_name_only() -> None:
    settings = Settings(Path("b"), host="0.0.0.0", keys=Path("k"), public_url="https://Pictures.example.com:8443")
    app = middleware.CheckOrigin(make_app(), allowed_hosts(settings), settings.public_url)
    hosts = allowed_hosts(settings)

    containers = {"host.docker.internal", "gateway.docker.internal", "host.containers.internal"}
    assert hosts == {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "*", "pictures.example.com"} | containers
    app._check(["192.168.1.5:8000"], [])
    app._check(["[fe80::1]:8000"], ["http://[fe80::1]:8000"])
    app._check(["pictures.example.com:8443"], ["https://pictures.example.com:8443"])
    for host in ("evil.example", "*", "1.2.3.4.evil.example"):
        with pytest.raises(errors.Forbidden):
            app._check([host], [])
    assert "[fe80::1]" in allowed_hosts(Settings(Path("b"), host="fe80::1", keys=Path("k")))


def test_containers_reach_the_server_by_their_names_for_the_machine_and_by_allowed_names() -> None:
    app = make_app(allowed_hosts=("oneword", "Studio.local"))
    for host in ("host.docker.internal:8000", "oneword:8000", "studio.local", "localhost"):
        assert ask(app, headers={"Host": host}).status == 200
    assert ask(app, headers={"Host": "another:8000"}).status == 403
    assert ask(make_app(), headers={"Host": "oneword:8000"}).status == 403


@pytest.mark.parametrize("origin", ["https://chat.example.com", "http://localhost:3000", "file://"])
def test_pages_of_allowed_sites_may_use_the_server_and_read_its_answers(keys: Keys, origin: str) -> None:
    app = make_app(keys, allowed_origins=("https://chat.example.com", "http://localhost:3000", "file://"))
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
        "Access-Control-Request-Private-Network": "true",  # from a page on the internet to this machine
    }

    preflight = ask(app, "OPTIONS", "/v1/unread", {"Host": "localhost", "Origin": origin, **wanted})
    answer = ask(
        app, "POST", "/v1/unread", {"Host": "localhost", "Origin": origin, "Authorization": f"Bearer {KEY}"}, [b""]
    )
    without_key = ask(app, "POST", "/v1/unread", {"Host": "localhost", "Origin": origin})

    assert (preflight.status, answer.status, without_key.status) == (200, 200, 401)
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    for response in (preflight, answer, without_key):
        assert response.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["https://evil.example", "https://chat.example.com.evil.example", "null", "app://"])
def test_pages_of_all_other_sites_are_still_refused(origin: str) -> None:
    app = make_app(allowed_origins=("https://chat.example.com", "file://"))
    preflight = {"Access-Control-Request-Method": "POST"}
    for method, more in (("GET", {}), ("POST", {}), ("OPTIONS", {}), ("OPTIONS", preflight)):
        answer = ask(app, method, "/v1/unread", {"Host": "localhost", "Origin": origin, **more}, [b"x"])

        assert (answer.status, answer.received) == (403, 0)
        assert answer.json["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}", f"bearer {KEY}", f"  Bearer   {KEY}  ", basic("", KEY), basic("alice", KEY)]
)
def test_a_key_is_accepted_as_bearer_and_as_basic(keys: Keys, header: str) -> None:
    assert ask(make_app(keys), headers={"Authorization": header}).json["tenant"] == "alice"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "   ",
        "Bearer",
        "Bearer ",
        KEY,
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Token {KEY}",
        "Bearer schlüssel",
        "Bearer " + "x" * 50_000,
        basic("bob", KEY),
        basic("alice", ""),
        basic(KEY, ""),
        "Basic",
        "Basic %%%",
        "Basic /w==",
        "Basic " + base64.b64encode(KEY.encode()).decode(),
    ],
)
def test_anything_else_is_a_401_that_does_not_repeat_it(keys: Keys, header: str) -> None:
    answer = ask(make_app(keys), "POST", "/v1/unread", {"Authorization": header}, [b"x"])

    assert (answer.status, answer.received) == (401, 0)
    assert answer.headers["www-authenticate"] == 'Bearer realm="oneword"'
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    sent = "the key is unknown" if header.strip() else "a key is needed: send it as 'Authorization: Bearer KEY'"
    assert error["message"].startswith(sent)
    assert KEY[:-1] not in answer.body.decode()


def test_a_missing_header_and_two_headers_are_a_401(keys: Keys) -> None:
    assert ask(make_app(keys)).status == 401
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")]
    assert ask(make_app(keys), headers=twice).status == 401
    assert ask(make_app(keys), headers=[("Authorization", f"Bearer {KEY}"), ("Authorization", "")]).status == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic %%%", "Basic eDp5", "nonsense"])
def test_without_keys_no_header_is_ever_a_401(header: str | None) -> None:
    answer = ask(make_app(), headers={} if header is None else {"Authorization": header})

    assert answer.status == 200
    assert answer.json["tenant"] == "local"


def test_the_page_and_health_checks_need_no_key_and_everything_else_does(keys: Keys) -> None:
    app = make_app(keys)
    for path in ("/", "/static/page.js", "/health/live"):
        assert ask(app, path=path).status == 200
        assert ask(app, path=path, headers={"Authorization": "Bearer wrong"}).status == 200
    for path in (
        "/v1/who",
        "/absent",
        "/static",
        "//",
        "/openapi.json",
        "/metrics",
        "/health/livex",
        "/STATIC/page.js",
    ):
        assert ask(app, path=path).status == 401
    assert ask(app, path="/pictures/static/page.js", root_path="/pictures").status == 200
    assert ask(app, path="/pictures/v1/who", root_path="/pictures").status == 401
    assert ask(app, path="/static/page.js/../../v1/who").status in (401, 404)


def test_keys_that_are_reloaded_count_from_the_next_request_on(keys: Keys) -> None:
    app = make_app(keys)
    keys.path.write_text(f'[bob]\nsha256 = "{hashlib.sha256(b"new").hexdigest()}"\n')
    keys.reload()

    assert ask(app, headers={"Authorization": f"Bearer {KEY}"}).status == 401
    assert ask(app, headers={"Authorization": "Bearer new"}).json["tenant"] == "bob"


def test_every_answer_has_the_security_headers_and_an_identity(keys: Keys) -> None:
    app = make_app(keys)
    key = {"Authorization": f"Bearer {KEY}"}
    answers = [
        ask(app, path="/"),
        ask(app),
        ask(app, headers={"Host": "evil.example"}),
        ask(app, path="/absent", headers=key),
        ask(app, "DELETE", headers=key),
        ask(app, "POST", "/v1/prompt", {**key, "Content-Length": "1000000"}),
        ask(app, "POST", "/v1/prompt", {**key, "Content-Type": "application/json"}, [b"{}"]),
        ask(app, path="/v1/words/toy", headers=key),
    ]

    assert [answer.status for answer in answers] == [200, 401, 403, 404, 405, 413, 400, 500]
    for answer in answers:
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_the_access_log_is_one_line_per_request_and_holds_nothing_secret(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(keys)
    key = {"Authorization": f"Bearer {KEY}"}
    with caplog.at_level(logging.DEBUG):
        ask(app, path="/v1/words/secret-word?token=secret-query", headers=key, client="203.0.113.7")
        body = json.dumps({"prompt": "secret-prompt"}).encode()
        ask(app, "POST", "/v1/prompt", {**key, "Content-Type": "application/json"}, [body])
        ask(app, "SECRET", "/secret-path", {"Authorization": "Bearer secret-key"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "oneword.access"]

    assert [(line["method"], line["route"], line["status"], line["tenant"]) for line in lines] == [
        ("GET", "/v1/words/{name}", 500, "alice"),
        ("POST", "/v1/prompt", 200, "alice"),
        ("other", None, 401, None),
    ]
    assert all(line["seconds"] >= 0 and len(line["id"]) == 32 for line in lines)
    assert lines[1]["bytes"] == len(b"13")
    for secret in ("secret", "SECRET", KEY, "203.0.113.7", "Traceback", str(Path(__file__).parent)):
        assert secret not in caplog.text


def test_forwarded_headers_are_believed_from_trusted_proxies_only() -> None:
    app = make_app(trusted_proxies=("10.0.0.0/8",), public_url="https://pictures.example.com")
    headers = {
        "Host": "127.0.0.1:8000",
        "X-Forwarded-For": "6.6.6.6, 203.0.113.7, 10.0.0.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "pictures.example.com",
        "Origin": "https://pictures.example.com",
    }

    answer = ask(app, headers=headers, client="10.0.0.5")
    assert answer.json == {
        "tenant": "local",
        "client": "203.0.113.7",
        "scheme": "https",
        "host": "pictures.example.com",
    }
    answer = ask(app, headers=headers, client="203.0.113.99")
    assert answer.json == {"tenant": "local", "client": "203.0.113.99", "scheme": "http", "host": "127.0.0.1:8000"}


def test_a_forwarded_host_must_be_allowed_too_and_never_comes_from_a_stranger() -> None:
    app = make_app(trusted_proxies=("10.0.0.5",))
    headers = {"Host": "localhost", "X-Forwarded-Host": "evil.example"}

    assert ask(app, headers=headers, client="10.0.0.5").status == 403
    assert ask(app, headers=headers, client="10.0.0.6").json["host"] == "localhost"
    assert ask(app, headers={"Host": "evil.example", "X-Forwarded-Host": "localhost"}, client="10.0.0.6").status == 403


@pytest.mark.parametrize("addresses", ["", "nonsense", "6.6.6.6, <script>", ",,,", "10.0.0.5"])
def test_a_broken_forwarded_address_leaves_the_proxys(addresses: str) -> None:
    app = make_app(trusted_proxies=("10.0.0.5",))

    assert ask(app, headers={"X-Forwarded-For": addresses}, client="10.0.0.5").json["client"] == "10.0.0.5"


def test_nothing_behind_the_check_sees_a_strangers_forwarded_headers() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    ask(TrustedProxy(app, ["10.0.0.5"]), headers={"X-Forwarded-Prefix": "/x", "X-Forwarded-For": "1.2.3.4"})

    assert [name for name, _ in seen] == [b"host"]


def test_an_answer_to_a_body_that_was_not_read_ends_the_connection() -> None:
    for headers, expected in (
        ({"Transfer-Encoding": "chunked"}, "close"),
        ({"Content-Length": "90000"}, "close"),
        ({"Content-Length": "100"}, None),
    ):
        answer = ask(make_app(), "POST", "/v1/unread", headers, [b"x", b"y"])
        assert answer.status == 200
        assert answer.headers.get("connection") == expected


def test_a_websocket_is_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/who", "headers": [(b"host", b"localhost")], "client": None}
    asyncio.run(make_app()(scope, receive, send))

    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_client_that_leaves_early_is_logged_as_such(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        ask(AccessLog(app))

    assert json.loads(caplog.records[-1].message)["status"] == 499


def test_uvicorn_itself_believes_no_proxy_and_logs_no_request() -> None:
    config = server_config(make_app(), Settings(Path("b"), host="[::1]", port=81, root_path="/x"))

    assert (config.host, config.port, config.root_path) == ("::1", 81, "/x")
    assert (config.proxy_headers, config.access_log, config.server_header) == (False, False, False)


def test_the_connection_has_the_limits_of_the_settings() -> None:
    kind = limited_connection(Settings(Path("b"), body_seconds=5, write_seconds=7))

    assert (kind.head_seconds, kind.write_seconds) == (5, 7)
    assert (Connection.head_seconds, Connection.write_seconds) == (60, 30)
