"""A server under load, in seconds: the short form of `python -m benchmarks.serving`, without its figures.

What is counted here are answers and pictures, never time: the machine may be busy.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.arrivals import WORDS, orders, word
from benchmarks.served.load import call_of, client_of, each_once, plain_call
from benchmarks.served.process import Server, Setup, drawn, quoted, random_words
from benchmarks.served.speed import SIZES, singles
from benchmarks.served.stress import FLAT_MB, cut_off, grown, not_accepted, stopped
from oneword.runtime import Model, Scheduler
from oneword.runtime.concept import concept_bytes
from oneword.serve.worker import Work
from tests.serve.conftest import Start
from tests.serve.running import Running

SECONDS = 60.0
"""More than anything here takes: a test that waits for so long fails."""


def port_of(running: Running) -> int:
    return httpx.URL(running.url).port or 0


def wait_until_free(running: Running) -> None:
    """Returns when neither the queue nor the engine has a picture."""
    end = time.monotonic() + SECONDS
    while running.state.pool.queued_seconds or running.state.worker._open or running.state.worker._tickets:
        assert time.monotonic() < end, "the engine still has pictures that nobody waits for"
        time.sleep(0.01)


def test_beyond_its_limit_it_refuses_with_429_and_makes_every_picture_that_it_accepted(start_server: Start) -> None:
    running = start_server()
    picture = running.state.worker.figures.seconds_for(Work(branch_pixels=50 * 2 * 64 * 64, pixels=64 * 64))
    running.state.pool.max_wait = 3 * picture  # the queue is short, whatever the machine's speed

    async def flood() -> list[tuple[int, bytes]]:
        async with client_of(running.url) as client:
            answers = await each_once(client, [plain_call("a cat", seed=seed) for seed in range(100)], 20)
            return [(answer.status, answer.body) for answer in answers]

    answers = asyncio.run(flood())

    statuses = Counter(status for status, _ in answers)
    assert set(statuses) == {200, 429}
    assert all(body for _, body in answers)
    assert statuses[200] == running.state.metrics.pictures.labels("done")._value.get()
    wait_until_free(running)


def test_clients_that_leave_at_any_time_hold_nothing(start_server: Start) -> None:
    running, rng, errors = start_server(), random.Random(0), Counter[str]()

    async def leave(numbers: "itertools.count[int]", count: int) -> None:
        while (number := next(numbers)) < count:
            await cut_off(port_of(running), rng, number, errors)

    async def leave_all() -> None:
        numbers = itertools.count()
        await asyncio.gather(*(leave(numbers, 200) for _ in range(20)))

    asyncio.run(leave_all())
    wait_until_free(running)

    assert not errors
    cancelled = running.state.metrics.pictures.labels("cancelled")._value.get()
    assert cancelled > 0  # else the clients left too late for this test to mean anything
    with running.client() as client:  # every slot is free
        answer = client.post("/v1/images/generations", json={"prompt": "a cat", "n": 8, "steps": 2})
    assert len(answer.json()["data"]) == 8


def test_every_served_picture_is_the_one_that_is_made_alone(start_server: Start, tiny_bundle: Path) -> None:
    running = start_server(max_wait=3600)
    chosen = [*itertools.islice(orders(50, SIZES), 24)]
    words = random_words(tiny_bundle, [word(index) for index in range(WORDS)])
    with running.client() as client:
        for concept in words:
            client.put(f"/v1/words/{quoted(concept.token)}", content=concept_bytes(concept)).raise_for_status()

    async def send_all() -> list[tuple[int, list[np.ndarray]]]:
        async with client_of(running.url) as client:
            answers = await each_once(client, [call_of(order) for order in chosen], 12)
            return [(answer.status, answer.pictures) for answer in answers]

    answers = asyncio.run(send_all())

    model = Model.open(tiny_bundle, "onnxruntime", threads=1, concepts=words)
    scheduler = Scheduler(model)
    assert [status for status, _ in answers] == [200] * len(chosen)
    for order, (_, served) in zip(chosen, answers, strict=True):
        assert len(served) == order.pictures
        for request, picture in zip(singles(order), served, strict=True):
            alone = drawn(scheduler, [request], True).pictures[0, 0]
            assert np.abs(picture.astype(int) - alone).max() <= 1, request["prompt"]


def test_what_was_accepted_before_a_sigterm_is_finished(tiny_bundle: Path, tmp_path: Path) -> None:
    server = Server(Setup(tiny_bundle, tmp_path), "sigterm")

    answers, asked, _, status = asyncio.run(stopped(server, 0.5, 8))

    accepted = [answer for answer in answers if not not_accepted(answer, asked)]
    assert status == 0
    assert {answer.status for answer in accepted} == {200}
    assert any(answer.received >= asked for answer in accepted)  # else there was no load


@pytest.mark.slow
@pytest.mark.parametrize("leak", [0, 1024], ids=["as it is", "with a leak of 1 KB per request"])
def test_its_memory_does_not_grow_in_half_an_hour_and_a_leak_would_be_noticed(
    tiny_bundle: Path, tmp_path: Path, leak: int
) -> None:
    growth = grown(Setup(tiny_bundle, tmp_path), lead=600, seconds=1200, leak=leak)

    assert growth.requests > 10_000
    assert growth.failed == 0
    assert (growth.mb <= FLAT_MB) == (not leak), growth
