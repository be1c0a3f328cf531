"""Requests with an Idempotency-Key: finished without their client, made once, answered again for ten minutes."""

import base64
import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from oneword.serve import openai
from oneword.serve.errors import Unavailable
from oneword.serve.keys import new_key
from oneword.serve.pictures import as_base64, encode
from tests.serve.conftest import Start
from tests.serve.running import SECONDS, Running, engine_gate, wait_until
from tests.serve.test_openai import png

GENERATIONS = "/v1/images/generations"
BODY: dict[str, Any] = {"prompt": "a cat", "steps": 2, "size": "64x64"}


def post(client: httpx.Client, key: str, path: str = GENERATIONS, **fields: Any) -> httpx.Response:
    return client.post(path, json={**BODY, **fields}, headers={"Idempotency-Key": key})


def done(running: Running, outcome: str = "done") -> int:
    """Pictures that ended like this."""
    return int(running.state.metrics.pictures.labels(outcome)._value.get())


def leave(running: Running, key: str, **fields: Any) -> None:
    """Sends a request, and closes the connection once its picture is being drawn."""
    body = json.dumps({**BODY, **fields}).encode()
    url = httpx.URL(running.url)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {url.netloc.decode()}\r\nContent-Type: application/json\r\n"
    head += f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80)) as connection, running.client() as client:
        connection.sendall(head.encode() + body)
        while not client.get("/v1/queue").json()["data"]:
            pass


def test_a_client_that_left_gets_the_answer_when_it_sends_the_request_again(start_server: Start) -> None:
    running = start_server()
    leave(running, "lost", steps=300)
    with running.client() as client:
        answer = post(client, "lost", steps=300)
        again = post(client, "lost", steps=300)

    assert answer.status_code == 200
    assert base64.b64decode(answer.json()["data"][0]["b64_json"])[:4] == b"\x89PNG"
    assert again.content == answer.content
    assert (done(running), done(running, "cancelled")) == (1, 0)


def test_a_client_that_left_has_no_request_in_progress(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start_server()
    gate = threading.Event()

    def encode_later(*arguments: Any) -> bytes:
        assert gate.wait(SECONDS)
        return encode(*arguments)

    monkeypatch.setattr(openai, "encode", encode_later)
    left = running.state.metrics.requests.labels(GENERATIONS, 499)
    leave(running, "lost", steps=300)
    wait_until(lambda: left._value.get() == 1)
    gate.set()

    with running.client() as client:
        assert post(client, "lost", steps=300).status_code == 200
    assert done(running) == 1


def test_equal_requests_at_the_same_time_are_made_once(start_server: Start) -> None:
    running = start_server()
    with running.client() as client, ThreadPoolExecutor(4) as threads:
        answers = [*threads.map(lambda _: post(client, "one", steps=100), range(4))]

    assert len({answer.content for answer in answers}) == 1
    assert done(running) == 1


def test_an_answer_outlives_the_server_and_is_the_tenants_own(start_server: Start, tmp_path: Path) -> None:
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    (tmp_path / "keys.toml").write_text(first + second)
    settings = {"keys": tmp_path / "keys.toml", "words": str(tmp_path / "words")}

    before = start_server(**settings)
    with Running(before.url, before.state, alice).client() as client:
        answer = post(client, "key")
    after = start_server(**settings)
    with Running(after.url, after.state, alice).client() as client:
        again = post(client, "key")
    with Running(after.url, after.state, bob).client() as client:
        other = post(client, "key")

    assert again.content == answer.content
    assert other.status_code == 200
    assert other.json()["data"][0]["seed"] != answer.json()["data"][0]["seed"]
    assert (done(before), done(after)) == (1, 1)


def test_an_answer_is_that_of_one_bundle(start_server: Start, tmp_path: Path, tiny_bundle: Path) -> None:
    manifest = json.loads((shutil.copytree(tiny_bundle, tmp_path / "bundle") / "bundle.json").read_text())
    manifest["defaults"]["guidance_scale"] += 1
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(manifest))
    servers = [
        start_server(bundle=bundle, words=str(tmp_path / "words")) for bundle in (tiny_bundle, tmp_path / "bundle")
    ]

    for running in servers:
        with running.client() as client:
            assert post(client, "key").status_code == 200

    assert [done(running) for running in servers] == [1, 1]


def test_a_kept_answer_is_there_for_ten_minutes_whatever_else_the_server_does(start_server: Start) -> None:
    running = start_server()
    now = [1000.0]
    running.state.results._clock = lambda: now[0]
    with running.client() as client:
        answer = post(client, "key", response_format="url")
        running.state.pool.draining = True
        now[0] = 1600.0
        again = post(client, "key", response_format="url")
        picture = client.get(again.json()["data"][0]["url"])
        now[0] = 1601.0
        late = post(client, "key", response_format="url")

    assert (answer.status_code, again.content) == (200, answer.content)
    assert picture.headers["content-type"] == "image/png"
    assert late.status_code == 503
    assert running.state.results.collect() == 1  # the picture lasts for an hour


def test_a_key_belongs_to_one_request(start_server: Start) -> None:
    running = start_server()
    with running.client() as client:
        assert post(client, "key", seed=1).status_code == 200
        other = post(client, "key", seed=2)
        streamed = post(client, "stream", stream=True)
        invalid = [post(client, key) for key in ("", "a b", "a" * 256)]

    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert other.json()["error"]["param"] == "Idempotency-Key"
    assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")
    assert [answer.status_code for answer in invalid] == [400, 400, 400]
    assert done(running) == 1


def test_two_requests_with_one_key_at_the_same_time_conflict_at_once(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_server()
    gate = threading.Event()

    def encode_later(*arguments: Any) -> bytes:
        assert gate.wait(SECONDS)
        return encode(*arguments)

    monkeypatch.setattr(openai, "encode", encode_later)
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(post, client, "key", seed=1)
        wait_until(lambda: bool(running.state.pending_answers))
        assert post(client, "key", seed=2).status_code == 409
        gate.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("comments", ['"\\ud800"', "[" * 300 + "]" * 300])
def test_text_that_is_not_utf8_and_deep_nesting_need_a_request_without_a_key(server: Running, comments: str) -> None:
    body = f'{{"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "comments": {{"a": {comments}}}}}'
    headers = {"Content-Type": "application/json"}
    with server.client() as client:
        refused = client.post("/sdapi/v1/txt2img", content=body, headers={**headers, "Idempotency-Key": "key"})
        drawn = client.post("/sdapi/v1/txt2img", content=body, headers=headers)

    assert (refused.status_code, drawn.status_code) == (400, 200)
    assert "send the request without the key" in refused.json()["detail"]


@pytest.mark.parametrize(("limit", "value"), [("MAX_REQUESTS", 2), ("MAX_BYTES", 3000), ("BODIES_LIMIT", 3000)])
def test_requests_with_keys_in_progress_are_limited_even_if_their_clients_have_left(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    running = start_server()
    monkeypatch.setattr(f"oneword.serve.kept.{limit}", value)
    gate, user = engine_gate(monkeypatch), "u" * 800  # each body has about 1,500 bytes
    try:
        for key in ("first", "second"):
            leave(running, key, user=user)
        with running.client() as client:
            refused = post(client, "third", user=user)
            gate.open.set()
            wait_until(lambda: not running.state.pending_answers)
            assert post(client, "third", user=user).status_code == 200
    finally:
        gate.open.set()

    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert "Idempotency-Key" in refused.json()["error"]["message"]
    assert done(running) == 3


def test_an_error_is_not_kept(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start_server()
    failures = [Unavailable("a test")]

    def encode_later(*arguments: Any) -> bytes:
        if failures:
            raise failures.pop()
        return encode(*arguments)

    monkeypatch.setattr(openai, "encode", encode_later)
    with running.client() as client:
        assert [post(client, "key").status_code for _ in range(2)] == [503, 200]


def test_an_answer_that_cannot_be_kept_is_answered(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start_server()

    def fail(*arguments: Any) -> None:
        raise Unavailable("a test")

    monkeypatch.setattr(running.state.results, "put_answer", fail)
    with running.client() as client:
        assert [post(client, "key").status_code for _ in range(2)] == [200, 200]
    assert done(running) == 2


def test_an_interrupted_request_is_not_kept(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running, path, size = start_server(), "/sdapi/v1/txt2img", {"width": 64, "height": 64}
    gate = engine_gate(monkeypatch)
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        interrupted = threads.submit(post, client, "key", path, **size)
        assert gate.entered.wait(SECONDS)
        client.post("/sdapi/v1/interrupt")
        answers = [interrupted.result()]
        gate.open.set()
        answers += [post(client, "key", path, **size) for _ in range(2)]

    assert [len(answer.json()["images"]) for answer in answers] == [0, 1, 1]
    assert done(running) == 1


def test_uploads_and_a1111s_requests_can_be_kept_too(start_server: Start) -> None:
    running = start_server()
    picture = base64.b64encode(png()).decode()
    size = {"width": 64, "height": 64}
    with running.client() as client:

        def edit(colour: str) -> httpx.Response:
            files = {"image": png(colour=colour)}
            return client.post(
                "/v1/images/edits", data={"prompt": "a", "steps": "2"}, files=files, headers={"Idempotency-Key": "edit"}
            )

        edited = [edit("red"), edit("red"), edit("blue")]
        drawn = [post(client, "a", "/sdapi/v1/txt2img", **size) for _ in range(2)]
        redrawn = [post(client, "b", "/sdapi/v1/img2img", init_images=[picture], **size) for _ in range(2)]

    assert [answer.status_code for answer in edited] == [200, 200, 409]
    assert edited[0].content == edited[1].content
    for first, again in (drawn, redrawn):
        assert first.status_code == 200, first.text
        assert first.content == again.content
    assert done(running) == 3


def test_without_room_a_key_gets_a_kept_answer_and_nothing_that_a_request_without_one_would_not(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_server()
    with running.client() as client, ThreadPoolExecutor(1) as threads:
        first, gate = post(client, "kept"), engine_gate(monkeypatch)
        try:
            threads.submit(client.post, GENERATIONS, json={**BODY, "steps": 900})
            assert gate.entered.wait(SECONDS)
            running.state.pool.max_wait = 1.05 * running.state.pool.queued_seconds
            refused = [post(client, "large", steps=900)]  # until there is room for it, a small one has to wait too
            refused += [
                client.post(GENERATIONS, json=BODY),
                post(client, "small"),
                post(client, "small", "/sdapi/v1/txt2img"),
            ]
            again = post(client, "kept")
        finally:
            gate.open.set()

    assert [answer.status_code for answer in refused] == [429] * 4
    assert (again.status_code, again.content) == (200, first.content)
    assert done(running) == 2
    assert running.state.metrics.rejected.labels("rate_limited")._value.get() == 4


def test_a_kept_answer_takes_nothing_from_a_quota_and_another_key_does(start_server: Start, tmp_path: Path) -> None:
    key, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(f"{lines}pixel_steps_per_minute = {2 * 64 * 64 + 1000}\n")
    running = start_server(keys=tmp_path / "keys.toml")
    with Running(running.url, running.state, key).client() as client:
        answers = [post(client, name) for name in ("a", "b", "a", "b", "a")]

    assert [answer.status_code for answer in answers] == [200, 429, 200, 429, 200]
    assert done(running) == 1


def test_a_kept_answer_counts_against_the_keys_limit(start_server: Start, tmp_path: Path) -> None:
    key, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(f"{lines}max_result_bytes = 28000\n")
    running = start_server(keys=tmp_path / "keys.toml", words=str(tmp_path / "words"))
    with Running(running.url, running.state, key).client() as client:
        first, second, again = post(client, "a"), post(client, "b"), post(client, "a")

    # Room for 4 bytes per pixel, in base64, and 8 KiB; and what the first answer has.
    assert (first.status_code, second.status_code, again.status_code) == (200, 429, 200)
    assert second.json()["error"]["message"].startswith(f"{64 + len(first.content)} bytes of your pictures are kept")
    assert done(running) == 1


def test_each_picture_to_fetch_and_each_answer_counts_against_the_number_that_is_kept(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, two = start_server(), {"n": 2, "response_format": "url"}
    with running.client() as client:
        monkeypatch.setattr("oneword.serve.results.MAX_ENTRIES", 2)
        answers = [post(client, "a", **two), client.post(GENERATIONS, json={**BODY, **two})]
        monkeypatch.setattr("oneword.serve.results.MAX_ENTRIES", 5)
        answers += [post(client, "b", **two), post(client, "c")]

    assert [answer.status_code for answer in answers] == [429, 200, 200, 429]
    assert done(running) == 4


def test_all_that_an_a1111_answer_repeats_counts_against_the_keys_limit(start_server: Start, tmp_path: Path) -> None:
    key, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(f"{lines}max_result_bytes = 135000\n")
    running = start_server(keys=tmp_path / "keys.toml", words=str(tmp_path / "words"))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    size = {"width": 64, "height": 64}
    with Running(running.url, running.state, key).client() as client:
        echoed = {"init_images": [as_base64(encode(noise, "png"))], "include_init_images": True}  # 640,000 bytes
        pictures = post(client, "a", "/sdapi/v1/img2img", **echoed, **size)
        # 14 bytes per character where JSON is in JSON, for each of four pictures twice: alone and in its parameters.
        prompts = post(client, "b", "/sdapi/v1/txt2img", prompt="\U0001f408" * 1200, n_iter=4, **size)
        ordinary = post(client, "c", "/sdapi/v1/txt2img", **size)

    assert (pictures.status_code, prompts.status_code, ordinary.status_code) == (403, 403, 200)
    assert done(running) == 1
