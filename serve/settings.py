"""The server's settings: a frozen dataclass, checked when it is made. Reads no file and opens nothing."""

import ipaddress
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from oneword.engines.errors import UsageError, one_of
from oneword.engines.open import Backend
from oneword.runtime.backends import AUTO

B64_JSON, URL = "b64_json", "url"
MAX_WAITS: Final = 10
"""Times `max_wait` that one request may take, even on a server without other work."""
_HOST: Final = re.compile(r"[A-Za-z0-9_.-]+")
_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9_.-]*|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def data_folder() -> Path:
    """The folder for a user's data on this platform, which need not exist."""
    match sys.platform:
        case "darwin":
            return Path.home() / "Library" / "Application Support" / "oneword"
        case "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "oneword"
        case _:
            return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "oneword"


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Settings:
    """The settings of `ti-serve`. Raises UsageError, one line that says what was given and what is allowed."""

    bundle: Path
    words: str = field(default_factory=lambda: str(data_folder() / "words"))
    """A folder or an fsspec URL."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 means any free one."""
    keys: Path | None = None
    """The file of keys; None means that everybody who reaches the server may use it."""
    max_rows: int = 16
    engine: str = AUTO
    threads: int | None = None
    max_wait: float = 60.0
    """Seconds of work that may be queued; more is refused."""
    deadline: float | None = None
    """Seconds after which a request is dropped if the engine has taken none of its pictures; None means MAX_WAITS times
    `max_wait`."""
    model: str | None = None
    """The checkpoint that words are learned with."""
    jobs: Path | None = None
    """This server's folder for the jobs that it learns; None means a folder of the user's, by port."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks whose X-Forwarded-* headers are trusted."""
    public_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    """More names under which clients reach the server, without a port."""
    allowed_origins: tuple[str, ...] = ()
    """Other sites whose pages may use the server, and desktop programs: `Origin` as they send it."""
    root_path: str = ""
    response_format: str = B64_JSON
    """How OpenAI's routes return pictures, as base64 or as addresses, if neither a request nor its model says."""
    body_seconds: float = 60.0
    """A request must have arrived in this time."""
    write_seconds: float = 30.0
    """A client that reads nothing for this long is cut off."""
    drain_seconds: float | None = None
    """What is not ready so long after the server was asked to stop is dropped; None means no limit."""
    hang_seconds: float = 30.0

    @property
    def jobs_folder(self) -> Path:
        """The folder of this server's own learning jobs, on local disk."""
        return self.jobs or data_folder() / "jobs" / str(self.port)

    @property
    def deadline_seconds(self) -> float:
        """How long an accepted request may wait for the engine."""
        return MAX_WAITS * self.max_wait if self.deadline is None else self.deadline

    def __post_init__(self) -> None:
        if self.keys is None and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} can be reached from other machines: protect it with --keys FILE, "
                "or use --host 127.0.0.1"
            )
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}, but must be 0 to 65535")
        if not self.words:
            raise UsageError("--words is empty: pass a folder or a URL")
        if self.engine not in (choices := (AUTO, *(backend.value for backend in Backend))):
            raise UsageError(f"--engine is {self.engine!r}, but must be {one_of(choices)}")
        if self.max_rows < 1:
            raise UsageError(f"--max-rows is {self.max_rows}, but must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}, but must be at least 1")
        if not 0 < self.max_wait < math.inf:
            raise UsageError(f"--max-wait is {self.max_wait:g} s, but must be more than 0 and finite")
        if self.deadline is not None and not 0 < self.deadline < math.inf:
            raise UsageError(f"--deadline is {self.deadline:g} s, but must be more than 0 and finite")
        for name in ("body_seconds", "write_seconds", "drain_seconds", "hang_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise UsageError(f"{name} is {seconds:g} s, but must be more than 0 and finite")
        if self.response_format not in (B64_JSON, URL):
            raise UsageError(f"--response-format is {self.response_format!r}, but must be {B64_JSON} or {URL}")
        for proxy in self.trusted_proxies:
            _check_network(proxy)
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise UsageError(f"--allow-host is {host!r}, but must be a name without a port, such as oneword")
        for origin in self.allowed_origins:
            _check_origin(origin)
        if self.public_url is not None:
            _check_url(self.public_url)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UsageError(f"--root-path is {self.root_path!r}, but must be a path such as /oneword")


def _check_network(proxy: str) -> None:
    try:
        ipaddress.ip_network(proxy)
    except ValueError:
        raise UsageError(
            f"--trusted-proxy is {proxy!r}, but must be an address such as 10.0.0.5, or a network such as 10.0.0.0/8"
        ) from None


def _check_origin(origin: str) -> None:
    """Refuses also what no browser sends, which would never match."""
    found = _ORIGIN.fullmatch(origin)
    scheme, host, port = found.groups() if found else ("", "", None)
    web = scheme in _DEFAULT_PORTS
    if not found or (web and (not host or port == _DEFAULT_PORTS[scheme])):
        raise UsageError(
            f"--allow-origin is {origin!r}, but must be an origin as browsers send it, in lower case, without a path "
            "or a default port, such as https://chat.example.com or file://"
        )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        plain = not (parts.query or parts.fragment or parts.username or parts.password)
    except ValueError:  # a port that is no number, a broken IPv6 address
        valid = plain = False
    if not (valid and plain):
        raise UsageError(f"--public-url is {url!r}, but must be an address such as https://pictures.example.com")
