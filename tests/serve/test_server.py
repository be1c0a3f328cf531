"""What the listening server does once the model is open, and when it stops, with parts that record it.

Not covered: sockets and signals (test_life.py).
"""

import asyncio
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oneword.serve import server as server_module
from oneword.serve.keys import Keys, Tenant, new_key
from oneword.serve.server import Server
from oneword.serve.settings import Settings
from oneword.serve.worker import State as WorkerState


class Part:
    """A pool or the jobs: it is asked to drain, and does when it may."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.drained = asyncio.Event()

    async def drain(self, *arguments: Any) -> None:
        self.asked.append(arguments)
        await self.drained.wait()


class Cycle:
    """Something that only the garbage collector can free."""

    def __init__(self) -> None:
        self.self = self


def server_with(worker: WorkerState, **settings: Any) -> Any:
    async def app(*_: Any) -> None:
        """Answers nothing."""

    state: Any = SimpleNamespace(
        settings=Settings(Path("bundle"), **settings),
        name="miniature",
        worker=SimpleNamespace(
            state=worker,
            failure="no such engine",
            backend="openvino 2026.2.0 cpu fp32",
            backend_reason="openvino is used; not tensorrt: no plans",
        ),
        pool=Part(),
        jobs=Part(),
        stopping=asyncio.Event(),
        pending_answers={},
    )
    return Server(app, state)


def test_keys_that_change_while_the_server_starts_are_read(tmp_path: Path) -> None:
    """A SIGHUP is ignored until it is handled."""
    (old, old_table), (new, new_table) = new_key("alice"), new_key("alice")
    file = tmp_path / "keys.toml"
    file.write_text(old_table)
    keys = Keys.read(file)
    file.write_text(new_table)

    async def run() -> None:
        server = server_with(WorkerState.STARTING)
        server.state_of_app.keys = keys
        with server.capture_signals():
            assert (keys.tenant(old), keys.tenant(new)) == (None, Tenant("alice"))

    asyncio.run(run())


def test_garbage_of_the_start_is_freed_before_the_rest_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    gc.disable()
    try:
        garbage = Cycle()
        reference = weakref.ref(garbage)
        del garbage
        monkeypatch.setattr(gc, "freeze", lambda: frozen.append(reference() is not None))

        async def run() -> None:
            await server_with(WorkerState.READY)._follow_opening()

        asyncio.run(run())
    finally:
        gc.enable()
    assert frozen == [False]


@pytest.mark.parametrize(
    ("worker", "lines"),
    [
        (
            WorkerState.READY,
            ["ready: miniature, openvino 2026.2.0 cpu fp32 (openvino is used; not tensorrt: no plans)"],
        ),
        (WorkerState.FAILED, []),
    ],
)
def test_a_line_says_when_the_server_takes_requests(
    monkeypatch: pytest.MonkeyPatch, worker: WorkerState, lines: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(server_module._log, "info", lambda text, *values: found.append(text % values))

    async def run() -> None:
        await server_with(worker)._follow_opening()

    asyncio.run(run())
    assert found == lines


def test_nothing_is_frozen_if_the_model_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("it froze"))

    async def run() -> None:
        server = server_with(WorkerState.FAILED)
        await server._follow_opening()
        assert server.should_exit

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_learning_stops_at_once_and_the_server_ends_when_its_pictures_are_finished(seconds: float | None) -> None:
    async def run() -> None:
        server = server_with(WorkerState.READY, drain_seconds=seconds)
        pool, jobs = server.state_of_app.pool, server.state_of_app.jobs
        server.stop()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (pool.asked, jobs.asked) == ([(seconds,)], [()])
        jobs.drained.set()
        await asyncio.sleep(0)
        assert not server.should_exit
        pool.drained.set()
        await server._stopping
        assert server.should_exit

    asyncio.run(run())


@pytest.mark.parametrize("worker", [WorkerState.READY, WorkerState.FAILED])
def test_the_end_does_not_wait_for_the_next_tick(worker: WorkerState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneword.serve.server._TICK_SECONDS", 1000.0)

    async def run() -> None:
        server = server_with(worker)
        looping = asyncio.ensure_future(server.main_loop())
        await asyncio.sleep(0.01)
        assert not looping.done()
        if worker is WorkerState.FAILED:
            await server._follow_opening()
        else:
            server.stop()
            server.state_of_app.pool.drained.set()
            server.state_of_app.jobs.drained.set()
        await asyncio.wait_for(looping, 20)

    asyncio.run(run())
