"""Pictures that clients fetch by address, kept in the store for an hour, and answers that were asked to be kept.

An address holds a random name, so anyone who has it may read the picture, and the hour after which it is gone. The
files are in the store, so any server that shares it can answer, also after a restart. What a tenant has is counted from
the store too. Not covered: pictures inside JSON, and requests that are in progress (`oneword.serve.kept`).
"""

import contextlib
import hashlib
import heapq
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from oneword.serve.errors import Busy, Forbidden, NotFound
from oneword.serve.files import Files, quoted
from oneword.serve.keys import Tenant
from oneword.serve.openapi import PICTURE_TYPES, file_response
from oneword.serve.pictures import MEDIA_TYPES, Format

SECONDS: Final = 3600
ANSWER_SECONDS: Final = 600
MAX_ENTRIES: Final = 100_000
"""Pictures and answers that are kept for one tenant at a time: the store is listed to find them."""
_DRAWING_SECONDS: Final = 30  # after which a client that waits for reserved room tries again
_PICTURES: Final = "results"
_ENTRIES: Final = "kept"
_NAME: Final = re.compile(r"(\d{1,12})-[0-9a-f]{64}\.(png|jpeg|webp)")
_ENTRY: Final = re.compile(r"(\d{1,12})-(\d{1,15})-([0-9a-f]{32})(\.json)?")
_DIGEST: Final = 64  # characters
_HINT: Final = "leave out the Idempotency-Key and response_format 'url', or ask for fewer pixels"


class KeptAnswer(NamedTuple):
    """An answer, and the digest of the request that it answers."""

    digest: str
    content: bytes


@dataclass(eq=False)
class _Ledger:
    """What the store has of a tenant: the names of its entries, their bytes, and which one expires next."""

    names: set[str] = field(default_factory=set[str])
    queue: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])
    """A heap of expiry, bytes, name."""
    bytes: int = 0

    def add(self, name: str) -> None:
        if name not in self.names and (match := _ENTRY.fullmatch(name)):
            self.names.add(name)
            heapq.heappush(self.queue, (int(match[1]), int(match[2]), name))
            self.bytes += int(match[2])

    def expire(self, now: float) -> None:
        while self.queue and self.queue[0][0] < now:
            _, size, name = heapq.heappop(self.queue)
            self.names.discard(name)
            self.bytes -= size


class Results:
    """Files `results/<expiry>-<random>.<suffix>` of a store, and for each picture and answer of a tenant an entry
    `kept/<tenant>/<expiry>-<bytes>-<id>`: that of an answer is the answer itself, that of a picture is empty.

    All methods but `reserved` may block: call them in a thread.
    """

    def __init__(self, files: Files, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        """Held for a moment only, never while the store is read or written."""
        self._ledgers: dict[str, _Ledger] = {}
        """By tenant, as of the last `count`, and what this server has kept since."""
        self._counted = set[str]()
        """Tenants that were counted since the last `collect`."""
        self._reserved = Counter[str]()
        """Bytes by tenant."""
        self._reserved_entries = Counter[str]()
        """Pictures and answers by tenant."""

    def count(self, tenant: Tenant) -> None:
        """Counts what other servers, or this one before it was restarted, have kept for a tenant, unless it has counted
        since the last `collect`."""
        if tenant.name in self._counted:
            return
        ledger = _Ledger()
        for name in self._files.names(_folder(tenant.name)):
            ledger.add(name)
        with self._lock:
            for name in self._ledgers.get(tenant.name, _Ledger()).names:  # also those kept while the folder was listed
                ledger.add(name)
            self._ledgers[tenant.name] = ledger
            self._counted.add(tenant.name)

    @contextlib.contextmanager
    def reserved(self, tenant: Tenant, size: int, entries: int = 1) -> Iterator[None]:
        """Room for so many pictures and answers, and so many bytes of them all, from before they are drawn until they
        are kept. Of those in the store, it knows what was counted.

        Raises Forbidden if the tenant may never keep as many bytes, Busy if it may not now, or if it would have more
        than MAX_ENTRIES with those that are reserved.
        """
        allowed = tenant.max_result_bytes
        if size > allowed:
            raise Forbidden(
                f"these pictures could have {size} bytes, but at most {allowed} can be kept: {_HINT}",
                code="quota_exceeded",
            )
        with self._lock:
            ledger = self._ledgers.setdefault(tenant.name, _Ledger())
            ledger.expire(self._clock())
            if (used := ledger.bytes + self._reserved[tenant.name]) + size > allowed:
                raise Busy(
                    f"{used} bytes of your pictures are kept for a while or reserved, and these could have {size}, but "
                    f"at most {allowed} can be kept: try again later, or {_HINT}",
                    ledger.queue[0][0] - self._clock() if ledger.queue else _DRAWING_SECONDS,
                    code="quota_exceeded",
                )
            if (count := len(ledger.names) + self._reserved_entries[tenant.name]) + entries > MAX_ENTRIES:
                raise Busy(
                    f"{count} of your pictures and answers are kept for a while or reserved, and this request has "
                    f"{entries}, but at most {MAX_ENTRIES} can be kept: try again later, or {_HINT}",
                    ledger.queue[0][0] - self._clock() if ledger.queue else _DRAWING_SECONDS,
                    code="quota_exceeded",
                )
            self._reserved[tenant.name] += size
            self._reserved_entries[tenant.name] += entries
        try:
            yield
        finally:
            with self._lock:
                self._reserved[tenant.name] -= size
                self._reserved_entries[tenant.name] -= entries

    def put(self, tenant: Tenant, data: bytes, format: Format) -> str:
        """Keeps a picture for an hour and returns its name."""
        expiry = int(self._clock()) + SECONDS
        name = f"{expiry}-{secrets.token_hex(32)}.{format}"
        self._files.write(f"{_PICTURES}/{name}", data)
        self._enter(tenant, f"{expiry}-{len(data)}-{secrets.token_hex(16)}", b"")
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The picture and its media type; None if there is none or it has expired."""
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) < self._clock():
            return None
        data = self._files.read(f"{_PICTURES}/{name}")
        return None if data is None else (data, MEDIA_TYPES[match[2]])

    def put_answer(self, tenant: Tenant, key: str, answer: KeptAnswer) -> None:
        """Keeps an answer for ten minutes under any text of the tenant's."""
        data = answer.digest.encode() + answer.content
        self._enter(tenant, f"{int(self._clock()) + ANSWER_SECONDS}-{len(data)}-{_id(key)}.json", data)

    def answer(self, tenant: Tenant, key: str) -> KeptAnswer | None:
        """The answer under a key; None if there is none or it has expired."""
        folder, ending = _folder(tenant.name), f"-{_id(key)}.json"
        for name in self._files.names(folder):
            match = _ENTRY.fullmatch(name) if name.endswith(ending) else None
            if match is None or int(match[1]) < self._clock():
                continue
            data = self._files.read(f"{folder}/{name}", int(match[2]))
            if data is not None and len(data) == int(match[2]):
                return KeptAnswer(data[:_DIGEST].decode(), data[_DIGEST:])
        return None

    def collect(self) -> int:
        """Deletes the pictures and answers that have expired, and returns their number."""
        now = self._clock()
        names = self._files.names(_PICTURES)
        expired = [f"{_PICTURES}/{name}" for name in names if (match := _NAME.fullmatch(name)) and int(match[1]) < now]
        count = len(expired)
        for tenant in self._files.names(_ENTRIES):
            entries = map(_ENTRY.fullmatch, self._files.names(f"{_ENTRIES}/{tenant}"))
            old = [match for match in entries if match is not None and int(match[1]) < now]
            expired += [f"{_ENTRIES}/{tenant}/{match[0]}" for match in old]
            count += sum(match[4] is not None for match in old)
        for path in expired:
            self._files.delete(path)
        with self._lock:
            self._counted.clear()  # other servers may have kept some
            for ledger in self._ledgers.values():
                ledger.expire(now)
        return count

    def _enter(self, tenant: Tenant, name: str, data: bytes) -> None:
        self._files.write(f"{_folder(tenant.name)}/{name}", data)
        with self._lock:
            self._ledgers.setdefault(tenant.name, _Ledger()).add(name)


def _folder(tenant: str) -> str:
    return f"{_ENTRIES}/{quoted(tenant)}"


def _id(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def address(http: HTTPRequest, name: str) -> str:
    """The absolute address of a picture, as this client reaches the server."""
    base = http.app.state.oneword.settings.public_url or str(http.base_url)
    return f"{base.rstrip('/')}/v1/pictures/{name}"


router = APIRouter(tags=["pictures"])


@router.head("/v1/pictures/{name}", include_in_schema=False)
@router.get(
    "/v1/pictures/{name}",
    response_class=Response,
    responses=file_response("The picture.", *PICTURE_TYPES),
)
async def picture(http: HTTPRequest, name: str) -> Response:
    """A picture whose address was an answer. 404 after an hour."""
    state = http.app.state.oneword
    found = await state.in_thread(state.results.get, name)
    if found is None:
        raise NotFound("there is no such picture: its address is valid for an hour")
    data, media_type = found
    headers = {
        "Cache-Control": "private, max-age=3600, immutable",
        "Cross-Origin-Resource-Policy": "cross-origin",  # chat programs show it in their own pages
    }
    return Response(data, media_type=media_type, headers=headers)
