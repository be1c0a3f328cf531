"""What a request does on the way to its pictures, in every dialect: where its prompts are read, how long it may wait,
and clients that leave."""

import asyncio
import base64
import contextlib
import difflib
import functools
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from oneword.serve.keys import LOCAL
from oneword.serve.pictures import decode, encode
from tests.serve.conftest import Start
from tests.serve.running import SECONDS, Gate, Running, engine_gate, wait_until, word_bytes
from tests.serve.test_openai import png

READERS = (
    "oneword.runtime.request.check_prompt",
    "oneword.runtime.request.prompts_by_step",
    "oneword.runtime.prompt.weighted_parts",
)
"""The functions that take time in proportion to a prompt's length, where they are used."""
LONG = "[a:b:1] " * 20 + "(" * 2500
PICTURE = base64.b64encode(png()).decode()
SMALL = {"width": 64, "height": 64, "steps": 2}


def generations(http: httpx.Client, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "negative_prompt": prompt, "n": 2, "steps": 2, "size": "64x64", **fields}
    return http.post("/v1/images/generations", json=body)


def edits(http: httpx.Client, prompt: str) -> httpx.Response:
    return http.post("/v1/images/edits", data={"prompt": prompt, "steps": "2", "n": "2"}, files={"image": png()})


def txt2img(http: httpx.Client, prompt: str) -> httpx.Response:
    return http.post("/sdapi/v1/txt2img", json={"prompt": f"toy {prompt}", "n_iter": 2, **SMALL})


def img2img(http: httpx.Client, prompt: str) -> httpx.Response:
    return http.post("/sdapi/v1/img2img", json={"prompt": prompt, "init_images": [PICTURE], **SMALL})


def refine(http: httpx.Client, prompt: str) -> httpx.Response:
    return http.post("/v1/words/%3Ctoy%3E/refine", json={"action": "start", "prompt": f"{{}} {prompt}"})


ROUTES = generations, edits, txt2img, img2img, refine


def test_a_request_that_the_engine_does_not_take_by_the_servers_deadline_is_dropped(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_server(max_wait=10_000, deadline=0.1)
    gate = engine_gate(monkeypatch)
    with running.client() as http, ThreadPoolExecutor(1) as pool:
        http.put("/v1/words/%3Ctoy%3E", content=word_bytes()).raise_for_status()
        first = pool.submit(generations, http, "a cat", n=10)  # more than the engine takes
        wait_until(lambda: http.get("/v1/queue").json()["data"])
        answers = [route(http, "a cat") for route in ROUTES]
        stream = generations(http, "a cat", stream=True)
        left = http.get("/v1/queue").json()["data"]
        gate.open.set()

        for answer in answers:
            assert answer.status_code == 503
            assert "the engine did not get to this request within 0.1 seconds: send it again" in answer.text
            assert int(answer.headers["Retry-After"]) >= 1
        assert stream.status_code == 200
        assert stream.text.startswith("event: error\n")
        assert "the engine did not get to this request within 0.1 seconds" in stream.text
        assert len(left) == 1
        assert len(first.result().json()["data"]) == 10  # the engine had some of its pictures in time


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_prompt_is_read_in_threads(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, route: Callable[[httpx.Client, str], httpx.Response]
) -> None:
    http.put("/v1/words/%3Ctoy%3E", content=word_bytes()).raise_for_status()
    on_loop: dict[str, set[bool]] = {}

    def watch(name: str) -> None:
        module, _, function = name.rpartition(".")
        read = getattr(sys.modules[module], function)

        @functools.wraps(read)
        def watched(prompt: str, *arguments: Any) -> Any:
            if len(prompt) > len(LONG) // 2:
                on_loop.setdefault(name, set()).add(asyncio._get_running_loop() is not None)
            return read(prompt, *arguments)

        monkeypatch.setattr(name, watched)

    for name in READERS:
        watch(name)

    answer = route(http, LONG)

    assert answer.status_code == 200, answer.text
    assert on_loop == {name: {False} for name in READERS}


def test_unknown_names_are_compared_with_the_known_ones_in_threads(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.put("/v1/words/%3Ctoy%3E", content=word_bytes()).raise_for_status()
    compare, on_loop = difflib.get_close_matches, list[bool]()

    def watched(*arguments: Any) -> list[str]:
        if sys._getframe(1).f_globals["__name__"].startswith("oneword.serve."):  # a prompt's own words are few
            on_loop.append(asyncio._get_running_loop() is not None)
        return compare(*arguments)

    monkeypatch.setattr(difflib, "get_close_matches", watched)
    word = generations(http, "a <toyy>")
    field = http.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "cfg_scal": 3, **SMALL})

    assert (word.status_code, field.status_code) == (400, 422)
    assert "<toy>" in word.text
    assert "cfg_scale" in field.text
    assert on_loop == [False] * 2


@contextlib.contextmanager
def sent(client: httpx.Client, path: str, **body: Any) -> Iterator[HTTPConnection]:
    """The connection of a request that was sent; it is closed at the end, whatever has come of the answer."""
    request = client.build_request("POST", path, **body)
    content = request.read()
    connection = HTTPConnection(request.url.host, request.url.port, timeout=SECONDS)
    try:
        connection.request("POST", path, content, dict(request.headers))
        yield connection
    finally:
        connection.close()


def is_free(server: Running, client: httpx.Client) -> bool:
    """Whether the server has no generation, and its engine no row."""
    idle = client.get("/v1/queue").json()["data"] == [] == server.state.pool.generations(LOCAL)
    return idle and server.state.pool.running == server.state.worker.figures.rows == 0


def ended(caplog: pytest.LogCaptureFixture, route: str, status: int) -> bool:
    """Whether the server has ended a request to a route with this status, which is 499 if it has sent none."""
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "oneword.access"]
    return any((line["route"], line["status"]) == (route, status) for line in lines)


def draws(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the server draws a picture; nothing more is logged of it afterwards."""
    caplog.clear()
    answer = edits(http, "a cat")
    wait_until(lambda: ended(caplog, "/v1/images/edits", answer.status_code))
    return answer.status_code == 200


LONG_EDITS: dict[str, dict[str, Any]] = {
    "/v1/images/edits": {"data": {"prompt": "a cat", "steps": "200", "n": "6"}, "files": {"image": png()}},
    "/sdapi/v1/img2img": {
        "json": {"prompt": "a cat", "init_images": [PICTURE], "width": 64, "height": 64, "steps": 200, "n_iter": 6}
    },
}


@pytest.mark.parametrize(
    ("path", "module"), [("/v1/images/edits", "openai"), ("/sdapi/v1/img2img", "a1111.routes")], ids=["openai", "a1111"]
)
def test_a_client_that_leaves_while_its_picture_is_decoded_gets_nothing_drawn(
    server: Running,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    module: str,
) -> None:
    caplog.set_level(logging.INFO, "oneword.access")
    decoding, encoding = Gate(decode), Gate(encode)
    encoding.open.set()
    monkeypatch.setattr(f"oneword.serve.{module}.decode", decoding)
    monkeypatch.setattr(f"oneword.serve.{module.replace('routes', 'answers')}.encode", encoding)

    with sent(http, path, **LONG_EDITS[path]):
        assert decoding.entered.wait(SECONDS)
    decoding.open.set()

    wait_until(lambda: ended(caplog, path, 499))
    wait_until(lambda: is_free(server, http))
    assert (decoding.calls, encoding.calls) == (1, 0)
    assert draws(http, caplog)


@pytest.mark.parametrize(
    ("path", "module"),
    [("/v1/images/edits", "openai"), ("/sdapi/v1/img2img", "a1111.answers")],
    ids=["openai", "a1111"],
)
def test_a_client_that_leaves_while_its_answer_is_encoded_holds_no_row(
    server: Running,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    module: str,
) -> None:
    caplog.set_level(logging.INFO, "oneword.access")
    encoding = Gate(encode)
    monkeypatch.setattr(f"oneword.serve.{module}.encode", encoding)

    with sent(http, path, **LONG_EDITS[path]):  # four of its six pictures are drawn together
        assert encoding.entered.wait(SECONDS)
        assert not is_free(server, http)
    wait_until(lambda: is_free(server, http))  # although a picture is still being encoded

    assert 1 <= encoding.calls <= 4
    encoding.open.set()
    wait_until(lambda: ended(caplog, path, 499))
    assert draws(http, caplog)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_the_middle_of_its_answer_holds_no_row(
    server: Running,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    caplog.set_level(logging.INFO, "oneword.access")
    large = b"more than the buffers of a connection hold" * (1 << 19)
    body = {"prompt": "a cat", "steps": 200 if stream else 2, "n": 6 if stream else 1, "stream": stream}

    gate, closed = engine_gate(monkeypatch), threading.Event()
    gate.open.set()

    def encoded(*arguments: object) -> bytes:
        if not closed.is_set():  # later pictures may come after the gate has been opened for good
            closed.set()
            gate.open.clear()  # two of the six pictures are still being drawn when the first is sent
        return large

    monkeypatch.setattr("oneword.serve.openai.encode", encoded)
    try:
        with sent(http, "/v1/images/generations", json={**body, "size": "64x64"}) as connection:
            answer = connection.getresponse()
            assert answer.status == 200
            assert len(answer.read(1 << 10)) == 1 << 10
            assert is_free(server, http) is not stream
    finally:
        gate.open.set()
    wait_until(lambda: is_free(server, http))
    wait_until(lambda: ended(caplog, "/v1/images/generations", 200))
    monkeypatch.undo()
    assert draws(http, caplog)
