"""A real server on a real socket: the tiny model behind uvicorn, in a thread of the test's own process."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import httpx
import pytest
import uvicorn
from moto.server import ThreadedMotoServer

from oneword.runtime.model import Model
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


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """The tiny model in the test's own hands."""
    return Model.open(tiny_bundle, "onnxruntime", threads=1)


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A local S3 server: one for all tests, as fsspec keeps its connections."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store of every kind."""
    name = f"store-{random.randrange(1 << 60)}"
    match request.param:
        case "folder":
            yield str(tmp_path / name)
        case "file":
            yield f"file://{tmp_path / name}"
        case "memory":
            yield f"memory://{name}/words"
            with contextlib.suppress(FileNotFoundError):  # a test may have deleted its last file, and so all of it
                fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
        case _:
            boto3.client("s3", endpoint_url=request.getfixturevalue("s3_endpoint")).create_bucket(Bucket=name)
            yield f"s3://{name}/words"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a test of the server, run by `make test-server`, unless it is for another target."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not {"browser", "ray", "slow"} & {
            m.name for m in item.iter_markers()
        }:
            item.add_marker("server")
