"""A real server on a real socket: the tiny model behind uvicorn, in a thread of the test's own process."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from oneword.serve.app import build_state, create_app
from oneword.serve.connection import server_config
from oneword.serve.keys import new_key
from oneword.serve.settings import Settings
from tests.serve.running import Running

Start = Callable[..., Running]


@pytest.fixture(scope="session")
def start_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers with any settings; all are stopped at the end."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**settings: Any) -> Running:
        settings = {"bundle": tiny_bundle, "words": str(tmp_path_factory.mktemp("words")), "port": 0} | settings
        settings = {"engine": "onnxruntime", "threads": 1, "max_rows": 4} | settings
        state = build_state(Settings(**settings))
        server = uvicorn.Server(server_config(create_app(state), state.settings))
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a test of the server, run by `make test-server`, unless it is for another target."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not {"browser", "ray", "slow"} & {
            m.name for m in item.iter_markers()
        }:
            item.add_marker("server")
