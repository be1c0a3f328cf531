"""What the server's tests share: a server that listens, a word's file, and the unmodified clients."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from oneword.runtime.concept import Concept, concept_bytes
from oneword.runtime.model import Model
from oneword.runtime.scheduler import Scheduler
from oneword.serve.state import State
from oneword.serve.worker import Worker

WIDTH = 32  # of a vector of the tiny model
CLIENTS = os.environ.get("ONEWORD_CLIENTS")
"""The environment with the unmodified clients: a folder with `bin/python` and `node_modules`."""
SECONDS = 60.0
"""More than anything here takes: a test that waits for so long fails."""


@contextlib.contextmanager
def started_worker(bundle: Path, max_rows: int) -> Iterator[Worker]:
    """An engine thread that is ready; it has to end in time."""
    worker = Worker(lambda: Model.open(bundle, "onnxruntime", threads=1), max_rows=max_rows)
    worker.start()
    worker.wait_ready(SECONDS)
    yield worker
    worker.stop(cancel=True)
    assert worker.join(SECONDS)


class Gate:
    """A function that is held, in the thread that calls it, until the gate is opened."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls = 0
        self.entered, self.open = threading.Event(), threading.Event()
        self._function = function

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self.calls += 1
        self.entered.set()
        assert self.open.wait(SECONDS)
        return self._function(*arguments, **settings)


def engine_gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds engine threads before their next turn."""
    gate = Gate(Scheduler.step)
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: gate(*arguments))
    return gate


def wait_until(condition: Callable[[], object]) -> None:
    """Waits, and fails if it takes longer than anything here does."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass
class Running:
    """A server that listens."""

    url: str
    state: State
    key: str = ""

    def client(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)


def word_bytes(token: str = "<toy>", seed: int = 0, rows: int = 1, width: int = WIDTH) -> bytes:
    """The file of a random word."""
    vectors = np.random.default_rng(seed).normal(0, 0.1, (rows, width)).astype(np.float32)
    return concept_bytes(Concept(token, {"text_encoder": vectors}))


def undecodable_png(side: int = 64) -> bytes:
    """A PNG in order, but for its pixels: only who decodes it finds out."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b"no pixels"), (b"IEND", b"")
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def run_client(name: str, *arguments: str) -> Any:
    """Runs an unmodified client of tests/serve/clients in its own environment, and returns the JSON it prints."""
    if CLIENTS is None:
        pytest.skip("ONEWORD_CLIENTS is not set: make test-server installs the clients")
    script = Path(__file__).parent / "clients" / name
    if script.suffix == ".mjs" and not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("Node or npm is not installed")
    command = [f"{CLIENTS}/bin/python", str(script)] if script.suffix == ".py" else ["node", str(script)]
    env = {"PATH": os.environ["PATH"], "ONEWORD_CLIENTS": CLIENTS, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
