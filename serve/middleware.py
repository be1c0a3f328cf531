"""What every request passes before a route sees it: ASGI middleware that acts before the body is read.

From the outside in: `AccessLog`, `SecurityHeaders`, `errors.CatchErrors`, `TrustedProxy`, `CheckOrigin`,
`Authenticate`, `Admit`, `LimitBody`; after `CheckOrigin`, if other sites are allowed, Starlette's `CORSMiddleware`.
They raise `ApiError`, and `CatchErrors` answers. Not covered: limits of a connection itself, such as clients that do
not read their answer (`serve.connection`), and quotas (`serve.pool`, `serve.words`).
"""

import asyncio
import base64
import binascii
import ipaddress
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oneword.serve.errors import ApiError, CatchErrors, Forbidden, TooLarge, Unauthorized, Unavailable, route_path
from oneword.serve.keys import LOCAL, Keys, Tenant
from oneword.serve.settings import Settings

MIB = 1 << 20
BODY_LIMITS = (
    ("/v1/words/learn", 101 * MIB),  # five pictures of 20 MiB
    ("/v1/words", 16 * MIB),
    ("/v1/images/generations", MIB),
    ("/v1/images/", 64 * MIB),
    ("/sdapi/v1/img2img", 64 * MIB),  # a picture and a mask in base64
    ("/sdapi/v1/png-info", 32 * MIB),
    ("", MIB),
)
"""The largest body by the beginning of the path; the first that matches counts."""
BODIES_LIMIT = 512 * MIB
"""Bytes of all bodies at a time: a body is in memory until its request is answered."""
CONTAINER_HOSTS = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
"""What containers call the machine they run on. No public DNS has names that end in .internal."""
MAX_PARTS = 200_000
"""Items of a JSON body. Pictures in base64 have none, and each other one costs time to parse, on the event loop."""
PICTURE_ROUTES = frozenset(
    {
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/images/variations",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
    }
)
"""The paths of requests for pictures, with POST."""
IDEMPOTENCY_KEY = "[!-~]{1,255}"
"""An Idempotency-Key that a route takes."""

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_log = logging.getLogger("oneword.access")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_KEY = re.compile(IDEMPOTENCY_KEY)
_JSON = re.compile(r"\s*application/[^;]*json", re.IGNORECASE)  # whatever FastAPI parses, and a little more
_SMALL = 64 << 10


def install(
    app: FastAPI,
    settings: Settings,
    keys: Keys | None = None,
    observer: Callable[[str, int], None] | None = None,
    limits: Sequence[tuple[str, int]] = BODY_LIMITS,
    check: Callable[[Tenant], None] = lambda tenant: None,
) -> None:
    """Adds all of the middleware to an app, in its order. The last that is added is the outermost. `check` raises
    ApiError while a tenant's requests for pictures are refused, whatever they are."""
    app.add_middleware(LimitBody, limits=limits, seconds=settings.body_seconds)
    app.add_middleware(Admit, check=check, limits=limits, seconds=settings.body_seconds)
    app.add_middleware(Authenticate, keys=keys, public=is_public)
    if settings.allowed_origins:
        app.add_middleware(CatchErrors)  # so that their pages can read errors too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After", "X-Request-Id", "X-Should-Retry"],
        )
    app.add_middleware(
        CheckOrigin,
        hosts=allowed_hosts(settings),
        public_url=settings.public_url,
        origins=settings.allowed_origins,
    )
    app.add_middleware(TrustedProxy, proxies=settings.trusted_proxies)
    app.add_middleware(CatchErrors)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(AccessLog, observer=observer)


def is_public(path: str) -> bool:
    """Whether a path needs no key: the page, its static files, health checks, and pictures, whose names are secret."""
    return path in ("/", "/favicon.ico", "/health", "/health/live", "/health/ready") or path.startswith(
        ("/static/", "/v1/pictures/")
    )


class AccessLog:
    """One line of JSON per request; never its prompt, key, query string, path or address."""

    def __init__(self, app: ASGIApp, observer: Callable[[str, int], None] | None = None) -> None:
        """`observer` gets the route, such as /v1/words/{name}, and the status of every answer."""
        self.app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, size = time.monotonic(), 499, 0  # 499: the client left before there was an answer
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def counted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            tenant = scope["state"].get("tenant")
            line = {
                "method": scope["method"] if scope["method"] in _METHODS else "other",
                "route": getattr(scope.get("route"), "path", None),
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
                "bytes": size,
                "tenant": tenant.name if isinstance(tenant, Tenant) else None,
                "id": request_id,
            }
            _log.info("%s", json.dumps(line))
            if self._observer is not None:
                self._observer(str(line["route"] or "none"), status)


class SecurityHeaders:
    """Adds the headers that restrict what a browser does with an answer, unless the answer has its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in self._headers if name not in names]
                if b"cache-control" not in names:  # with an ETag, a browser would guess how long it may keep the answer
                    headers.append((b"cache-control", b"no-cache" if b"etag" in names else b"no-store"))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class TrustedProxy:
    """Uses X-Forwarded-For, -Proto and -Host from trusted proxies, and removes them from all other requests."""

    def __init__(self, app: ASGIApp, proxies: Iterable[str] = ()) -> None:
        self.app = app
        self._networks = [ipaddress.ip_network(proxy) for proxy in proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            forwarded = {name: value for name, value in scope["headers"] if name.startswith(b"x-forwarded-")}
            # Changed in place: the middleware outside of this one reads the route from the same scope.
            scope["headers"] = [item for item in scope["headers"] if not item[0].startswith(b"x-forwarded-")]
            if forwarded and scope.get("client") and self._trusts(scope["client"][0]):
                self._apply(scope, {name[12:].decode(): _last(value) for name, value in forwarded.items()}, forwarded)
        await self.app(scope, receive, send)

    def _apply(self, scope: Scope, last: dict[str, str], forwarded: dict[bytes, bytes]) -> None:
        addresses = forwarded.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
        for address in (address.strip() for address in reversed(addresses)):
            if _address(address) is None:
                break  # whatever is further left may be the client's invention
            scope["client"] = (address, 0)
            if not self._trusts(address):
                break
        if last.get("proto") in ("http", "https"):
            scope["scheme"] = last["proto"]
        if host := last.get("host"):
            scope["headers"] = [item for item in scope["headers"] if item[0] != b"host"]
            scope["headers"].append((b"host", host.encode("latin-1")))

    def _trusts(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """The names under which browsers may know this server; "*" stands for any address in digits.

    A name that an attacker's DNS points at this machine is never one of them. Digits are not resolved, so they are safe
    where the server is bound to all of the machine's addresses.
    """
    hosts = {"localhost", "127.0.0.1", "[::1]", *CONTAINER_HOSTS, *map(str.lower, settings.allowed_hosts)}
    address = _address(settings.host)
    if address is not None and address.is_unspecified:
        hosts.add("*")
    hosts.add(f"[{address}]" if address is not None and address.version == 6 else settings.host.lower())
    if settings.public_url is not None:
        hosts.add(_host_name(urlsplit(settings.public_url).netloc.lower()) or "")
    return frozenset(hosts - {""})


class CheckOrigin:
    """Refuses what only an attacked browser sends: a Host that is not this server's, or another site's Origin.

    Clients other than browsers send no Origin. WebSockets are refused, as there are none.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], public_url: str | None = None, origins: Collection[str] = ()
    ) -> None:
        """`origins` are those of other sites that are allowed."""
        self.app = app
        self._hosts = hosts
        self._origins = origins
        self._public = None if public_url is None else urlsplit(public_url).netloc.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            self._check(_values(scope, b"host"), _values(scope, b"origin"))
        await self.app(scope, receive, send)

    def _check(self, hosts: list[str], origins: list[str]) -> None:
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = _host_name(host)
        digits = name is not None and "*" in self._hosts and _address(name.strip("[]")) is not None
        if name is None or not (name in self._hosts or digits):
            raise _refused(
                "this server does not answer to the name in the Host header: use the address it is bound to, "
                "or start it with --public-url or --allow-host",
                "host_not_allowed",
            )
        for origin in origins:
            if origin in self._origins:
                continue
            scheme, _, site = origin.lower().partition("://")
            if scheme not in ("http", "https") or site not in (host, self._public):
                raise _refused(
                    "requests from pages of other sites are not allowed: use this server's own page, "
                    "or start it with --public-url or --allow-origin",
                    "origin_not_allowed",
                )


class Authenticate:
    """Sets the tenant of each request, by its key; without keys it is always LOCAL, whatever header there is.

    Accepts `Authorization: Bearer KEY`, and Basic with the key as password and no user name or the tenant's.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, public: Callable[[str], bool] = is_public) -> None:
        self.app = app
        self._keys = keys
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = LOCAL if self._keys is None else self._tenant(self._keys, _values(scope, b"authorization"))
            if tenant is not None:
                scope.setdefault("state", {})["tenant"] = tenant
            elif not self._public(route_path(scope)):
                if any(value.strip() for value in _values(scope, b"authorization")):
                    raise Unauthorized(
                        "the key is unknown: check it (in Basic it is the password, with no user name), or ask this "
                        "server's operator for another"
                    )
                raise Unauthorized(
                    "a key is needed: send it as 'Authorization: Bearer KEY', or as the password of Basic"
                )
        await self.app(scope, receive, send)

    @staticmethod
    def _tenant(keys: Keys, values: list[str]) -> Tenant | None:
        headers = [value for value in values if value.strip()]
        if len(headers) != 1:
            return None
        scheme, _, credentials = headers[0].strip().partition(" ")
        match scheme.lower():
            case "bearer":
                return keys.tenant(_utf8(credentials.strip()))
            case "basic":
                user, key = _basic(credentials.strip())
                tenant = keys.tenant(key)
                return tenant if tenant is not None and user in ("", tenant.name) else None
            case _:
                return None


class LimitBody:
    """Limits a body's size, by Content-Length before a byte is read and while it comes in, and the time it takes.

    Limits the bodies of all requests together as well; small ones always fit. Whatever the app makes of a body that
    was cut off, the answer is 413, 408 or 503, if none has begun.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Sequence[tuple[str, int]] = BODY_LIMITS,
        seconds: float = 60.0,
        total: int = BODIES_LIMIT,
    ) -> None:
        self.app = app
        self._limits = limits
        self._seconds = seconds
        self._room = _Room(total)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        limit = next((size for prefix, size in self._limits if path.startswith(prefix)), MIB)
        length = content_length(scope["headers"])
        if length is not None and length > limit:
            raise _too_large(limit)
        small = length is not None and length <= _SMALL
        empty = length is None and not _values(scope, b"transfer-encoding")
        is_json = any(_JSON.match(value) for value in _values(scope, b"content-type"))
        max_parts = MAX_PARTS if is_json else None
        body = _Body(receive, send, limit, self._seconds, small, empty, self._room, max_parts)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if body.failure is None or body.started:
                raise
        finally:
            body.release()
        if body.failure is not None and not body.started:
            raise body.failure


@dataclass
class _Room:
    """Bytes that bodies may still take, of all requests together."""

    left: int


class _Body:
    """The body of one request as it comes in, and the answer to it."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        limit: int,
        seconds: float,
        small: bool,
        empty: bool,
        room: _Room,
        max_parts: int | None,
    ) -> None:
        self.failure: ApiError | None = None
        self.started = False
        self._receive, self._send = receive, send
        self._limit, self._seconds, self._small, self._empty = limit, seconds, small, empty
        self._room, self._max_parts = room, max_parts
        self._size = self._taken = self._parts = 0
        self._deadline: float | None = None
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # only a disconnect can come
        if self.failure is not None:
            raise self.failure
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.failure = _too_slow(self._seconds)
            raise self.failure from None
        if message["type"] == "http.request":
            self._count(message.get("body", b""))
            if self.failure is not None:
                raise self.failure
            self._complete = not message.get("more_body", False)
        return message

    def _count(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            self.failure = _too_large(self._limit)
        if not self._small:
            self._room.left -= len(piece)
            self._taken += len(piece)
            if self._room.left < 0:
                self.failure = Unavailable("the server reads too many large requests: send it again later", 5)
        if self._max_parts is not None:
            self._parts += sum(piece.count(mark) for mark in (b",", b"[", b"{"))
            if self._parts > self._max_parts:
                self.failure = TooLarge(f"the body has more than the allowed {self._max_parts} parts: send less")

    def release(self) -> None:
        """Gives the room of the body back."""
        self._room.left += self._taken
        self._taken = 0

    async def send(self, message: Message) -> None:
        if self.failure is not None and not self.started:
            return  # the app's own idea of what went wrong
        if message["type"] == "http.response.start":
            self.started = True
            if not (self._complete or self._small or self._empty):  # else uvicorn would read the rest, only to drop it
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await self._send(message)


class Admit:
    """Refuses a request for pictures without reading its body while there is no room for any.

    The body is received and dropped: a client that is still sending would not see the answer if the connection closed.
    One that asks first (Expect: 100-continue) sends none, and the connection is closed. A request with a
    valid Idempotency-Key passes, as its answer may be there already: `serve.kept` checks it if there is none.
    """

    def __init__(
        self, app: ASGIApp, check: Callable[[Tenant], None], limits: Sequence[tuple[str, int]], seconds: float
    ) -> None:
        """See `install`, and `LimitBody`."""
        self.app = app
        self._check = check
        self._drop = LimitBody(_drop, limits, seconds, total=sys.maxsize)  # it keeps no body, so it needs no room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and (path := route_path(scope)) in PICTURE_ROUTES
            and not any(map(_KEY.fullmatch, _values(scope, b"idempotency-key")[:1]))
        ):
            try:
                self._check(scope["state"]["tenant"])
            except ApiError as error:
                scope["route"] = SimpleNamespace(path=path)  # for the log
                if any(value.lower() == "100-continue" for value in _values(scope, b"expect")):
                    error.headers = {**error.headers, "Connection": "close"}
                else:
                    await self._drop(scope, receive, send)
                raise
        await self.app(scope, receive, send)


async def _drop(scope: Scope, receive: Receive, send: Send) -> None:
    """Receives a body without keeping it."""
    while (await receive()).get("more_body"):
        pass


def _refused(message: str, code: str) -> Forbidden:
    """403, and the end of the connection: the body is not read."""
    error = Forbidden(message, code=code)
    error.headers = {"Connection": "close"}
    return error


def _too_large(limit: int) -> TooLarge:
    size = f"{limit // MIB} MiB" if limit >= MIB and limit % MIB == 0 else f"{limit} bytes"
    return TooLarge(f"the body has more than the allowed {size}: send less, or smaller pictures")


def _too_slow(seconds: float) -> ApiError:
    message = f"the body did not arrive within {seconds:g} seconds: send less, or over a faster connection"
    return ApiError(408, message, headers={"Connection": "close", "x-should-retry": "false"})


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """None for no body, and for one in chunks, whatever else its head says; the names are in lower case."""
    values = dict(headers)
    length = values.get(b"content-length", b"")
    return int(length) if length.isdigit() and b"transfer-encoding" not in values else None


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for header, value in scope["headers"] if header.lower() == name]


def _last(value: bytes) -> str:
    """The value that the nearest proxy has added to a list."""
    return value.decode("latin-1").rpartition(",")[2].strip()


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _host_name(host: str) -> str | None:
    """The name in a Host header without its port, None if it is malformed."""
    match = _HOST.fullmatch(host)
    return None if match is None else match[1]


def _basic(credentials: str) -> tuple[str, str]:
    """User and password, empty if they are malformed."""
    try:
        user, _, password = base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return user, password


def _utf8(text: str) -> str:
    """A header's text, whose bytes are UTF-8 where they are not ASCII."""
    return text.encode("latin-1").decode("utf-8", "surrogateescape")
