"""The serving benchmark: its cores, its page, and the journal that it adds to a server's process."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import serving
from benchmarks.pages import machine
from benchmarks.served.changes import FIRST_STEP, LAST_STEP, PROMPT, TURN, WORK, read_journal
from benchmarks.served.plot import CONTENDERS, PHASES
from benchmarks.served.process import CORES, LOAD_CORE, SERVER_CORE, Server, on_core
from benchmarks.served.results import Result
from benchmarks.served.speed import likeness, waits_of
from benchmarks.served.stress import Soaking, cut_off, is_whole
from oneword.runtime.concept import Concept

NEW_FIELDS = ("data", "engine", "machine")
"""Of a result; files written before do not have them."""


@pytest.mark.skipif(not {SERVER_CORE, LOAD_CORE} <= CORES, reason="needs cores 0 and 1")
def test_a_process_on_the_load_core_starts_others_on_the_server_core() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {LOAD_CORE})
        with on_core(SERVER_CORE):
            assert os.sched_getaffinity(0) == {SERVER_CORE}
        assert os.sched_getaffinity(0) == {LOAD_CORE}
    finally:
        os.sched_setaffinity(0, before)


def journal_of(program: str, bundle: Path, journal: Path) -> None:
    """Runs a program with the bundle's folder and a journal."""
    subprocess.run([sys.executable, "-c", program, bundle, journal], check=True)


def test_the_journal_records_turns_branches_and_prompts(tiny_bundle: Path, tmp_path: Path) -> None:
    """Twice two pictures of three steps, one of them guided, together; their three prompts are new at first."""
    program = """
import sys
from benchmarks.served.changes import apply
from oneword.runtime import Model, Request
from oneword.runtime.request import resolve
from oneword.runtime.scheduler import Scheduler

apply({"journal": sys.argv[2]})
scheduler = Scheduler(Model.open(sys.argv[1], "onnxruntime", threads=1))
for requests in ((Request("a red star", steps=3), Request("a blue cat", steps=3, guidance_scale=1)),) * 2:
    for request in requests:
        scheduler.add(request, resolve(request, scheduler.model.manifest))
    while scheduler:
        scheduler.step()
"""
    journal = tmp_path / "journal"
    journal_of(program, tiny_bundle, journal)

    turns, prompts, work = (read_journal(journal, kind) for kind in (TURN, PROMPT, WORK))
    assert [tuple(turn) for turn in turns[:, 2:] if turn[1]] == [(3, 2)] * 6
    assert (turns[:, 0] <= turns[:, 1]).all()
    assert [tuple(prompt) for prompt in prompts[:, 1:3]] == [(0, 0)] * 3 + [(1, 0)] * 3
    stepped = turns[turns[:, 3] > 0, 1]
    assert read_journal(journal, LAST_STEP)[:, 0].tolist() == [stepped[2]] * 2 + [stepped[5]] * 2
    assert work[:, 0].tolist() == turns[:, 1].tolist()
    assert ((work[:, 1] > 0) & (work[:, 1] <= turns[:, 1] - turns[:, 0])).all()
    assert work[0, 2] > 0  # without a warm-up
    assert not work[1:, 2].any()


def test_the_journal_records_when_a_first_step_ended_and_not_when_the_server_noticed(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """A picture alone makes its first step in the first turn, and the server notices at the end of its last."""
    program = """
import asyncio, sys
from pathlib import Path
from benchmarks.served.changes import apply
from oneword.runtime import Request
from oneword.serve.app import build_state
from oneword.serve.keys import LOCAL
from oneword.serve.settings import Settings

async def main():
    state = build_state(Settings(Path(sys.argv[1]), words="memory://journal", engine="onnxruntime", threads=1))
    state.worker.start()
    await asyncio.to_thread(state.worker.wait_ready)
    apply({"journal": sys.argv[2]})
    await state.pool.submit(LOCAL, Request("a red star", steps=9)).wait()
    state.worker.stop()

asyncio.run(main())
"""
    journal = tmp_path / "journal"
    journal_of(program, tiny_bundle, journal)

    turns = read_journal(journal, TURN)
    [(arrived, first, *_)] = read_journal(journal, FIRST_STEP)
    assert arrived < turns[0, 0]
    assert turns[0, 1] <= first < turns[1, 1]
    assert len(turns) >= 9


def test_a_wait_counts_turns_and_the_pictures_ahead() -> None:
    """Turns end at 1, 2, 3 ...; the third and the fourth picture are of one request, which finds two others there."""
    first_steps = np.array([[2.5, 5], [0.5, 2], [0.6, 2], [2.5, 6], [5.5, 6]])  # in any order
    last_steps = np.array([3.0, 5, 6, 7, 8])

    waits = waits_of(first_steps, last_steps, np.arange(1.0, 10))

    arrivals = [0.5, 0.6, 2.5, 2.5, 5.5]
    seconds, turns = [1.5, 1.4, 2.5, 3.5, 0.5], [2, 2, 3, 4, 1]
    assert waits.tolist() == np.transpose([arrivals, seconds, turns, [0, 1, 2, 3, 2]]).tolist()


def test_pictures_are_compared_to_all_of_their_size() -> None:
    """One equal, one 2.55 off everywhere (40 dB), one that is another's; the fourth is alone in its size."""
    grey, white, black = (np.full((2, 2, 3), value, np.float64) for value in (100.0, 255.0, 0.0))
    wide = np.zeros((2, 4, 3))

    found = likeness([grey, white - 2.55, white, wide], [grey, white, black, wide])

    assert found.mistaken == 1
    assert found.least == pytest.approx(0)
    assert found.median == pytest.approx((99 + 40) / 2)


def result(name: str, **settings: Any) -> Result:
    """A section with one figure."""
    made = Result(name, name.capitalize(), "How it was measured.", date="2026-01-02", **settings)
    made.add("answers", 7, 5)
    return made


def test_sections_measured_on_several_machines_each_name_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PAGE", tmp_path / "serving.md")
    results = [result("fast", machine="a Fast CPU"), result("slow", machine="a Slow CPU")]

    serving.write_page(results)
    several = serving.PAGE.read_text()
    serving.write_page([result("fast", machine="a Fast CPU"), result("slow", machine="a Fast CPU")])
    single = serving.PAGE.read_text()

    assert "## Slow\n\nHow it was measured. Measured on 2026-01-02 on a Slow CPU, `--engine onnxruntime`." in several
    assert several.count("a Fast CPU") == several.count("a Slow CPU") == 1
    assert single.count("a Fast CPU") == 1
    assert "## Slow\n\nHow it was measured. Measured on 2026-01-02.\n" in single
    assert "| answers | at most 5 | **7** |" in single
    assert "    python -m benchmarks.serving --write\n" in single
    assert "**Not measured yet**: overhead, batching" in single
    assert "swaps, store, disconnects, sigterm" in single  # without slow


def test_the_figure_of_the_mixed_traffic_is_written_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PAGE", tmp_path / "serving.md")
    phase = {"ready50": 2700.0, "ready99": 9000.0}
    found = {name: dict.fromkeys(PHASES, phase) for name in CONTENDERS}

    serving.write_page([result("traffic", data=found)])
    figure = (tmp_path / "serving.svg").read_text()

    assert figure.startswith("<svg")
    assert figure.count(">2.7<") == len(PHASES) * len(CONTENDERS)  # seconds, beside each dot
    assert all(f">{title}<" in figure for title in (*PHASES.values(), *CONTENDERS.values()))


def test_a_section_of_the_page_without_a_result_is_never_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PAGE", tmp_path / "serving.md")
    serving.write_page([result("fast"), result("slow")])
    before = serving.PAGE.read_text()

    with pytest.raises(SystemExit, match=r"has sections without a file in --work: Slow\. Measure them"):
        serving.write_page([result("fast")])
    with pytest.raises(SystemExit, match="fast measured with --scale"):
        serving.write_page([result("fast", scale=0.02), result("slow")])

    assert serving.PAGE.read_text() == before


def test_a_result_keeps_its_machine_and_one_without_is_of_this_machine(tmp_path: Path) -> None:
    result("old", machine="another CPU").save(tmp_path)
    result_of_another = Result.read(tmp_path, "old")
    assert result_of_another
    file = tmp_path / "old.json"
    fields = {name: value for name, value in json.loads(file.read_text()).items() if name not in NEW_FIELDS}
    file.write_text(json.dumps(fields))
    old = Result.read(tmp_path, "old")
    assert old

    assert (result_of_another.machine, result_of_another.date) == ("another CPU", "2026-01-02")
    assert (old.machine, old.date) == (machine(), "2026-01-02")
    assert old.rows == result_of_another.rows


def load_on(port: int, words: Sequence[Concept]) -> Soaking:
    return Soaking(cast(Server, SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port)), words)


@asynccontextmanager
async def soaking(
    words: Sequence[Concept], answer: bytes | None
) -> AsyncIterator[tuple[Soaking, list[asyncio.StreamWriter]]]:
    """The steady load on a server that gives everybody the same answer, or none; and the server's connections."""
    connections: list[asyncio.StreamWriter] = []

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.read(1 << 20)
        if answer is not None:
            writer.write(answer)
            writer.close()

    server = await asyncio.start_server(answered, "127.0.0.1")
    load = load_on(server.sockets[0].getsockname()[1], words)
    try:
        async with load.running():
            yield load, connections
    finally:
        server.close()
        for writer in connections:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in connections), return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
WORD = Concept("<a>", {"text_encoder": np.ones((1, 4), np.float32)})


@pytest.mark.parametrize(
    ("answer", "fails"),
    [
        (EMPTY, False),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", True),
    ],
    ids=["200", "400", "500", "cut off"],
)
def test_the_steady_load_counts_answers_with_5xx_and_broken_ones(answer: bytes, fails: bool) -> None:
    async def failures() -> int:
        async with soaking([WORD], answer) as (load, _):
            await until(lambda: load.requests >= 100)
            return load.failed

    assert (asyncio.run(failures()) > 0) == fails


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (EMPTY, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", "no request was answered"),
        (None, "no request was answered"),
    ],
    ids=["answered", "cut off", "silent"],
)
def test_a_load_without_whole_answers_is_an_error(answer: bytes | None, error: str | None) -> None:
    async def checked() -> None:
        async with soaking([WORD], answer) as (load, connections):
            await until(lambda: len(connections) >= (50 if answer else 8))
            load.check()

    with pytest.raises(RuntimeError, match=error) if error else nullcontext():
        asyncio.run(checked())


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n{"a":{}}', True),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n{"a":{}', False),
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}", False),
        (STREAM, True),
        (STREAM.removesuffix(b"0\r\n\r\n"), False),
        (b"HTTP/1.1 200 OK\r\nContent-Le", False),
        (b"", False),
    ],
    ids=["JSON", "JSON cut off after a brace", "refused", "stream", "stream cut off", "head cut off", "silent"],
)
def test_only_an_answer_with_its_whole_body_is_whole(answer: bytes, whole: bool) -> None:
    assert is_whole(answer) == whole


def test_a_client_of_the_load_that_stops_is_an_error() -> None:
    async def checked() -> None:
        async with soaking([], EMPTY) as (load, _):  # it has no word to upload
            await until(lambda: any(task.done() for task in load._loops))
            load.check()

    with pytest.raises(RuntimeError, match="a client of the load stopped"):
        asyncio.run(checked())


def test_refused_connections_are_failures_and_no_answers() -> None:
    async def checked(port: int) -> None:
        load = load_on(port, [WORD])
        async with load.running():
            await until(lambda: load.requests >= 100)
            assert load.failed == load.requests
            load.check()

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError, match="no request was answered since the last check, 0 before"):
            asyncio.run(checked(unused.getsockname()[1]))


def test_refused_connections_are_not_counted_as_answers_with_5xx() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        errors = Counter[str]()
        asyncio.run(cut_off(unused.getsockname()[1], random.Random(0), 0, errors))

    assert errors == {"refused": 1}
