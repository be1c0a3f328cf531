"""`ti-serve` processes on ports of their own, and nginx in front of them with the configuration that ships."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
SHIPPED = Path(__file__).parents[2] / "serve" / "deploy" / "nginx.conf"
PUBLIC = "http://pictures.example.com"
_AROUND = """
{user}
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/oneword.conf;
}}
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Process:
    """A `ti-serve`, its child included; it can be killed and started again at the same address."""

    bundle: Path
    folder: Path
    options: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """With a key, for its metrics."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables beside this process's own."""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text()

    @property
    def server(self) -> int | None:
        """The id of the watchdog's child; None while there is none."""
        assert self.process is not None
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pids[0]) if pids else None

    def start(self) -> None:
        """Starts it, without waiting."""
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "oneword.serve.cli", str(self.bundle), "--port", str(self.port)]
        command += ["--engine", "onnxruntime", "--threads", "1", "--jobs", str(self.folder / "jobs"), *self.options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **self.environment}
            )

    def wait_ready(self) -> None:
        while not _ready(self.url):
            assert self.process is not None
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 of everything: the watchdog, the server, and whatever learns."""
        if self.process is None:
            return
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def requests(self) -> list[dict[str, object]]:
        """The lines of its access log."""
        lines = self.log.splitlines()
        return [json.loads(line.partition(" INFO ")[2]) for line in lines if " oneword.access INFO " in line]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=60).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


@dataclass
class Proxy:
    """nginx with the shipped configuration; only the addresses are replaced."""

    folder: Path
    servers: Sequence[Process]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self) -> Path:
        """Writes the configuration and returns the main file."""
        self.folder.mkdir(exist_ok=True)
        text = SHIPPED.read_text("utf-8")
        ports = {"127.0.0.1:8001": self.servers[0].port, "127.0.0.1:8002": self.servers[1].port}
        for address, port in ports.items():
            assert address in text
            text = text.replace(address, f"127.0.0.1:{port}")
        assert "listen 80;" in text
        (self.folder / "oneword.conf").write_text(text.replace("listen 80;", f"listen 127.0.0.1:{self.port};"))
        user = "user root;" if os.geteuid() == 0 else ""  # else its processes could not read a test's folder
        (self.folder / "nginx.conf").write_text(_AROUND.format(folder=self.folder, user=user))
        return self.folder / "nginx.conf"

    def check(self) -> subprocess.CompletedProcess[str]:
        """`nginx -t`."""
        return subprocess.run([*self._command(), "-t"], capture_output=True, text=True, check=False, timeout=60)

    def start(self) -> None:
        self.process = subprocess.Popen(self._command(), stderr=subprocess.DEVNULL)
        while not _accepts(self.port):
            assert self.process.poll() is None, (self.folder / "error.log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def _command(self) -> list[str]:
        assert NGINX is not None
        return [NGINX, "-e", f"{self.folder}/error.log", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> set[int]:
    """The ids of a process's descendants."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    left = [pid]
    while left:
        children = parents.get(left.pop(), [])
        found.update(children)
        left += children
    return found
