"""Pictures that clients fetch by address instead of in the answer, kept in the store for an hour.

An address holds a random name, so anyone who has it may read the picture, and the hour after which it is gone. The
files are in the store, so any server that shares it can answer. Each server counts what it has kept of a tenant since
it was started. Not covered: pictures inside JSON.
"""

import contextlib
import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from oneword.serve.errors import Busy, Forbidden, NotFound
from oneword.serve.files import Files
from oneword.serve.keys import Tenant
from oneword.serve.openapi import PICTURE_TYPES, file_response
from oneword.serve.pictures import MEDIA_TYPES, Format

SECONDS: Final = 3600
_DRAWING_SECONDS: Final = 30  # after which a client that waits for reserved room asks again
_FOLDER: Final = "results"
_NAME: Final = re.compile(r"(\d{1,12})-[0-9a-f]{64}\.(png|jpeg|webp)")


class Results:
    """Files `results/<expiry>-<random>.<suffix>` of a store. All but `reserved` may block: call it in a thread."""

    def __init__(self, files: Files, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._pictures: dict[str, deque[tuple[int, int]]] = {}
        """By tenant, when each of its pictures expires, the oldest first, and its bytes."""
        self._bytes = Counter[str]()
        """Of these pictures together, and those that are reserved, by tenant."""

    @contextlib.contextmanager
    def reserved(self, tenant: Tenant, size: int) -> Iterator[None]:
        """Room for so many bytes of pictures, from before they are drawn until they are kept.

        Raises Forbidden if the tenant may never keep as many, Busy if it may not now.
        """
        allowed = tenant.max_result_bytes
        if size > allowed:
            raise Forbidden(
                f"these pictures may have {size} bytes, allowed are {allowed}: ask for b64_json, or for fewer pixels",
                "response_format",
                "quota_exceeded",
            )
        with self._lock:
            pictures = self._pictures.get(tenant.name, deque())
            while pictures and pictures[0][0] < self._clock():
                self._bytes[tenant.name] -= pictures.popleft()[1]
            if (used := self._bytes[tenant.name]) + size > allowed:
                raise Busy(
                    f"{used} bytes of your pictures are kept for an hour or reserved, these may have {size}, allowed "
                    f"are {allowed}: ask for b64_json, or try again later",
                    pictures[0][0] - self._clock() if pictures else _DRAWING_SECONDS,
                    "response_format",
                    "quota_exceeded",
                )
            self._bytes[tenant.name] += size
        try:
            yield
        finally:
            with self._lock:
                self._bytes[tenant.name] -= size

    def put(self, tenant: Tenant, data: bytes, format: Format) -> str:
        """Keeps a picture for an hour and returns its name."""
        expiry = int(self._clock()) + SECONDS
        name = f"{expiry}-{secrets.token_hex(32)}.{format}"
        self._files.write(f"{_FOLDER}/{name}", data)
        with self._lock:
            self._pictures.setdefault(tenant.name, deque()).append((expiry, len(data)))
            self._bytes[tenant.name] += len(data)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The picture and its media type; None if there is none or it has expired."""
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) < self._clock():
            return None
        data = self._files.read(f"{_FOLDER}/{name}")
        return None if data is None else (data, MEDIA_TYPES[match[2]])

    def collect(self) -> int:
        """Deletes the pictures that have expired, and returns their number."""
        names = self._files.names(_FOLDER)
        expired = [name for name in names if (match := _NAME.fullmatch(name)) and int(match[1]) < self._clock()]
        for name in expired:
            self._files.delete(f"{_FOLDER}/{name}")
        return len(expired)


def address(http: HTTPRequest, name: str) -> str:
    """The absolute address of a picture, as this client reaches the server."""
    base = http.app.state.oneword.settings.public_url or str(http.base_url)
    return f"{base.rstrip('/')}/v1/pictures/{name}"


router = APIRouter(tags=["pictures"])


@router.get(
    "/v1/pictures/{name}",
    response_class=Response,
    responses=file_response("The picture.", *PICTURE_TYPES),
)
async def picture(http: HTTPRequest, name: str) -> Response:
    """A picture that was asked for with response_format "url". 404 after an hour."""
    state = http.app.state.oneword
    found = await state.in_thread(state.results.get, name)
    if found is None:
        raise NotFound("there is no such picture: its address is valid for an hour")
    data, media_type = found
    return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=3600, immutable"})
