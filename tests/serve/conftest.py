"""A real server on a real socket: the tiny model behind uvicorn, in a thread of the test's own process."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from oneword.runtime.concept import Concept, concept_bytes
from oneword.serve.app import build_state, create_app
from oneword.serve.keys import new_key
from oneword.serve.settings import Settings
from oneword.serve.state import State

WIDTH = 32  # of a vector of the tiny model
CLIENTS = os.environ.get("ONEWORD_CLIENTS")
"""The environment with the unmodified clients: a folder with `bin/python` and `node_modules`."""


@dataclass
class Running:
    """A server that listens."""

    url: str
    state: State
    key: str = ""

    def client(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def start_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers with any settings; all are stopped at the end."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**settings: Any) -> Running:
        settings = {"bundle": tiny_bundle, "words": str(tmp_path_factory.mktemp("words")), "port": 0} | settings
        settings = {"engine": "onnxruntime", "threads": 1, "max_rows": 4} | settings
        state = build_state(Settings(**settings))
        server = uvicorn.Server(uvicorn.Config(create_app(state), port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive(), "the server ended before it listened"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        assert state.worker.ready.wait(60), state.worker.failure
        return Running(f"http://127.0.0.1:{port}", state)

    yield start
    for server, _ in servers:
        server.should_exit = True
    for _, thread in servers:
        thread.join(30)


@pytest.fixture(scope="session")
def server(start_server: Start) -> Running:
    """A server without keys."""
    return start_server()


@pytest.fixture(scope="session")
def tenants(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Running, Running]:
    """One server as two tenants see it, alice and bob."""
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(first + second)
    running = start_server(keys=keys)
    return Running(running.url, running.state, alice), Running(running.url, running.state, bob)


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def word_bytes(token: str = "<toy>", seed: int = 0, rows: int = 1, width: int = WIDTH) -> bytes:
    """The file of a random word."""
    vectors = np.random.default_rng(seed).normal(0, 0.1, (rows, width)).astype(np.float32)
    return concept_bytes(Concept(token, {"text_encoder": vectors}))


def run_client(name: str, *arguments: str) -> Any:
    """Runs an unmodified client of tests/serve/clients in its own environment, and returns the JSON it prints."""
    if CLIENTS is None:
        pytest.skip("ONEWORD_CLIENTS is not set: make test-server installs the clients")
    script = Path(__file__).parent / "clients" / name
    command = [f"{CLIENTS}/bin/python", str(script)] if script.suffix == ".py" else ["node", str(script)]
    env = {"PATH": os.environ["PATH"], "ONEWORD_CLIENTS": CLIENTS, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
