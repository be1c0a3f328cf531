"""The queue in front of the engine: fair, bounded in seconds of work, and free of whatever has left it."""

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request as HTTPRequest
from starlette.types import Message

from oneword.runtime import edit
from oneword.runtime.bundle import Bundle, Manifest
from oneword.runtime.concept import Concept
from oneword.runtime.drawing import draw
from oneword.runtime.events import PictureDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.scheduler import Scheduler
from oneword.serve.errors import ApiError, Busy, Forbidden, Invalid, Unavailable
from oneword.serve.generate import events, finish
from oneword.serve.keys import LOCAL, Tenant
from oneword.serve.pool import Dropped, Generation, GenerationEvent, Outcome, Phase, PictureEvent, Pool, spread
from oneword.serve.settings import Settings
from oneword.serve.worker import Done, Failed, Partial, Step, Worker, WorkerFigures
from tests.serve.running import SECONDS, Running, engine_gate, started_worker

ALICE, BOB, CAROL = Tenant("alice"), Tenant("bob"), Tenant("carol")


@pytest.fixture
def worker(tiny_bundle: Path) -> Iterator[Worker]:
    with started_worker(tiny_bundle, max_rows=2) as worker:
        yield worker


@pytest.fixture
def pool(worker: Worker, model: Model) -> Pool:
    return Pool(worker, model.manifest, max_wait=1e6)


class Record:
    """An observer that records its notifications."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.ends: list[tuple[str, str]] = []
        self.waits: list[float] = []
        self.first_steps: list[float] = []

    def refused(self, code: str) -> None:
        self.refusals.append(code)

    def taken_up(self, seconds: float) -> None:
        self.waits.append(seconds)

    def first_step(self, seconds: float) -> None:
        self.first_steps.append(seconds)

    def ended(self, outcome: Outcome, phase: Phase) -> None:
        self.ends.append((outcome.value, phase.value))


def with_seconds_per_step(worker: Worker, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes the worker say that a guided step takes so long, and nothing else any time."""
    monkeypatch.setattr(worker, "figures", WorkerFigures(seconds_per_branch_pixel=seconds / (2 * 64 * 64)))


def with_figures(worker: Worker, monkeypatch: pytest.MonkeyPatch, figures: WorkerFigures) -> None:
    """Makes the worker say this, whatever it measures."""
    monkeypatch.setattr(worker, "_publish", lambda scheduler: None)
    monkeypatch.setattr(worker, "figures", figures)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scenario(), SECONDS)

    asyncio.run(limited())


def near(image: Image, reference: Image) -> bool:
    """Whether no pixel differs by more than 1, the effect of summing in another order in fp32."""
    return bool(np.abs(image.astype(int) - reference).max() <= 1)


async def events_of(generation: Generation) -> list[tuple[int, GenerationEvent]]:
    """The index and event of all events that are left."""
    return [(event.index, event.event) async for event in generation]


async def until(generation: Generation, *kinds: type) -> PictureEvent:
    async for event in generation:
        if isinstance(event.event, kinds):
            return event
    raise AssertionError(f"the generation ended without any of {kinds}")


def test_pictures_of_a_request_have_consecutive_seeds_and_match_those_drawn_alone(pool: Pool, model: Model) -> None:
    request = Request("a cat", seed=5, num_images=5, steps=4)
    expected = draw(model, request)

    async def scenario() -> None:
        generation = pool.submit(ALICE, replace(request, previews=1))
        events = await events_of(generation)
        assert generation.done
        assert [picture and picture.seed for picture in generation.pictures] == [5, 6, 7, 8, 9]
        for picture, reference in zip(generation.pictures, expected, strict=True):
            assert picture is not None
            assert near(picture.image, reference.image)
        assert [type(event) for index, event in events if index == 3] == [Step, Step, Step, Done]

    run(scenario)
    assert pool.queued_seconds == 0
    assert pool.running == pool.waiting == 0


def test_partial_pictures_are_evenly_spread_and_come_before_the_picture(pool: Pool) -> None:
    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("a cat", steps=8), partials=3)
        kinds = [(type(event), event.step) for _, event in await events_of(generation) if isinstance(event, Partial)]
        assert kinds == [(Partial, 2), (Partial, 4), (Partial, 6)]

    run(scenario)


@pytest.mark.parametrize(
    ("partials", "steps", "expected"),
    [
        (0, 20, set()),
        (1, 20, {10}),
        (2, 30, {10, 20}),
        (3, 20, {5, 10, 15}),
        (3, 4, {1, 2, 3}),
        (3, 2, {1}),
        (3, 1, set()),
    ],
)
def test_partial_steps_are_spread_over_the_steps_before_the_last(partials: int, steps: int, expected: set[int]) -> None:
    assert spread(partials, steps) == expected


def test_tenants_take_turns_picture_by_picture(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    gate = engine_gate(monkeypatch)
    submit = pool.worker.submit

    def recorded(request: Request, *arguments: Any) -> Any:
        order.append(request.prompt)
        return submit(request, *arguments)

    monkeypatch.setattr(pool.worker, "submit", recorded)

    async def scenario() -> None:
        greedy = [pool.submit(ALICE, Request("a cat", seed=i, num_images=4, steps=2)) for i in range(3)]
        modest = pool.submit(BOB, Request("a dog", num_images=2, steps=2))
        late = pool.submit(CAROL, Request("a star", num_images=2, steps=2))
        assert order == ["a cat"] * 6  # two slots and four ahead
        assert [greedy[0].position, greedy[1].position, greedy[2].position] == [0, 0, 6]
        assert (modest.position, late.position) == (1, 2)
        gate.open.set()
        for generation in (*greedy, modest, late):
            await generation.wait()

    run(scenario)
    assert order[6:] == ["a cat", "a dog", "a star", "a cat", "a dog", "a star", *["a cat"] * 4]


def test_work_beyond_the_limit_is_refused_at_once_and_without_the_engine(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=1e6)
        request = Request("a cat", num_images=4, steps=50)
        first = pool.submit(ALICE, request)
        pool.max_wait = 2.5 * pool.queued_seconds
        second = pool.submit(ALICE, request)
        assert gate.entered.wait(SECONDS)
        turns = worker.figures.turns

        with pytest.raises(Busy) as refusal:
            pool.submit(ALICE, request)

        assert int(refusal.value.headers["Retry-After"]) >= 1
        assert worker.figures.turns == turns
        assert pool.generations(ALICE) == [first, second]
        modest = pool.submit(BOB, request)  # its turn comes earlier
        for generation in (first, second, modest):
            generation.cancel()
        gate.open.set()
        assert pool.queued_seconds == 0

    run(scenario)


def test_an_idle_server_accepts_ten_times_what_may_be_queued(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=2)
        with pytest.raises(Invalid, match="would take 21 seconds, but may take at most 20: ask for fewer") as refusal:
            pool.submit(ALICE, Request("a cat", steps=21))
        assert refusal.value.code == "too_much_work"
        with pool.submit(ALICE, Request("a cat", steps=20)), pytest.raises(Busy):
            pool.submit(BOB, Request("a cat", steps=20))
        gate.open.set()

    run(scenario)


def test_a_picture_to_start_from_is_priced_once(worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_gate(monkeypatch)
    with_figures(worker, monkeypatch, WorkerFigures(seconds_per_pixel=1.0))
    pool = Pool(worker, model.manifest, max_wait=100_000)

    async def scenario() -> None:
        request = Request("a cat", num_images=3, steps=2, image=np.zeros((64, 64, 3), np.uint8))
        with pool.submit(ALICE, request):
            assert pool.queued_seconds == 64 * 64 * (3 + 1)

    run(scenario)


def test_texts_are_priced_by_their_chunks_until_they_are_encoded(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_figures(worker, monkeypatch, WorkerFigures(seconds_per_chunk=1.0))
    pool = Pool(worker, model.manifest, max_wait=100, chunks=lambda text, words: len(text))

    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("[a|bc|def]", "xyzv", num_images=3, steps=6))
        assert pool.queued_seconds == 1 + 2 + 3 + 4
        with pool.submit(BOB, Request("[a|b]", steps=2)):
            assert pool.queued_seconds == 10 + 2
        assert pool.queued_seconds == 10
        assert generation.seconds_left == 10
        with pytest.raises(Busy):
            pool.submit(ALICE, Request("x" * 91, steps=1))
        gate.open.set()
        while generation.progress == 0:
            await asyncio.sleep(0.001)
            pool.generations(ALICE)
        assert pool.queued_seconds == 0
        await generation.wait()

    run(scenario)


def test_a_text_is_priced_with_the_words_that_its_request_has_when_it_is_priced(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_figures(worker, monkeypatch, WorkerFigures(seconds_per_chunk=1.0))
    pool = Pool(worker, model.manifest, max_wait=100, chunks=lambda text, words: len(text) + 10 * len(words))
    word = Concept("<toy>", {"text_encoder": np.full((1, 32), 0.1, np.float32)})

    async def scenario() -> None:
        generation = pool.prepared(ALICE, Request("[a|<toy>]", "no", num_images=2, steps=6))
        generation.request = replace(generation.request, words={"<toy>": word})  # as when its words are looked up
        generation.price()
        with generation:
            pool.enter(generation)
            assert pool.queued_seconds == (1 + 10) + (5 + 10) + (2 + 10)
        gate.open.set()

    run(scenario)


def test_the_server_counts_the_chunks_that_the_parser_finds(server: Running) -> None:
    rows, vectors = np.full((4, 1, 32), 0.1, np.float32), {"text_encoder": np.full((1, 32), 0.1, np.float32)}
    chunks, room = server.state.pool.chunks, server.state.manifest.encoders[0].length - 2
    plain, layered = (Concept("cat", vectors, layer_rows=layers) for layers in ({}, {"text_encoder": rows}))

    assert chunks("", {}) == chunks("a photo of a cat", {}) == 1
    assert chunks("a BREAK a BREAK a", {}) == 3
    assert chunks("a photo of a cat", {"cat": plain}) == 1
    assert chunks("a photo of a cat", {"cat": layered}) == chunks("(<cat>:1.2)", {"<cat>": layered}) == 1 + 4
    assert chunks("a cat BREAK a", {"cat": layered}) == 2 * (1 + 4)
    assert chunks("a category, to concatenate", {"cat": layered}) == chunks("a category, to concatenate", {})
    assert chunks("a cat", {"<cat>": layered}) == 1  # only <> finds it
    assert chunks("<toy> " * (room + 1), {"<toy>": replace(plain, token="<toy>")}) == 2


def test_pictures_shown_on_the_way_are_priced_by_how_many_are_decoded(
    worker: Worker, model: Model, tiny_preview_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_figures(worker, monkeypatch, WorkerFigures(seconds_per_estimate=1 / (64 * 64)))
    with_decoder = Bundle.open(tiny_preview_bundle).manifest

    async def seconds(manifest: Manifest, partials: int, **fields: Any) -> float:
        pool = Pool(worker, manifest, max_wait=100)
        with pool.submit(ALICE, Request("a cat", **fields), partials=partials):
            return pool.queued_seconds

    async def scenario() -> None:
        assert await seconds(model.manifest, 0, steps=6, previews=2) == 0  # made by a linear map, from latents
        assert await seconds(model.manifest, 2, steps=6, previews=1) == 2
        assert await seconds(with_decoder, 0, steps=6, previews=2) == 2  # after steps 2 and 4
        assert await seconds(with_decoder, 1, steps=6, previews=2, num_images=2) == 6  # 2, 3 and 4, twice
        assert await seconds(with_decoder, 2, steps=6, previews=2) == 2  # the same steps
        gate.open.set()

    run(scenario)


def test_the_wait_for_a_slot_counts_where_others_have_all_of_them(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=60)
        short = pool.submit(ALICE, Request("a cat", steps=10))
        long = pool.submit(ALICE, Request("a cat", steps=40))
        modest = pool.submit(BOB, Request("a dog", steps=1))
        assert modest.seconds_left == pytest.approx(22)  # two rows for 10 steps, and its own in turn
        modest.cancel()
        pool.max_wait = 21
        with pytest.raises(Busy, match="ready in 22 seconds"):
            pool.submit(BOB, Request("a dog", steps=1))
        short.cancel()
        long.cancel()
        gate.open.set()

    run(scenario)


def test_drain_without_a_limit_finishes_all_that_was_accepted_for_any_number_of_tenants(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)
    monkeypatch.setattr(worker, "slots", 16)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=60)
        accepted = [pool.submit(ALICE, Request("a cat", steps=600))]  # all that an idle server takes
        for tenant in (Tenant(f"tenant{number}") for number in range(20)):
            with contextlib.suppress(Busy):
                while len(accepted) < 1_000:
                    accepted.append(pool.submit(tenant, Request("a dog", steps=1)))
        assert len(accepted) < 1_000
        assert pool.queued_seconds > 700  # far more than --max-wait
        gate.open.set()
        await pool.drain(Settings(Path("bundle")).drain_seconds)
        assert all(generation.pictures[0] is not None for generation in accepted)

    run(scenario)


def test_a_tenant_leaves_a_slot_to_the_others(tiny_bundle: Path, model: Model) -> None:
    worker = Worker(lambda: Model.open(tiny_bundle, "onnxruntime", threads=1), max_rows=4)
    worker.start()
    worker.wait_ready(SECONDS)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=1e6)
        greedy = pool.submit(ALICE, Request("a cat", num_images=60, steps=900, previews=1))
        assert (pool.running, greedy.waiting) == (3, 57)
        await until(greedy, Step)
        await pool.submit(BOB, Request("a dog", steps=1)).wait()
        assert greedy.pictures == [None] * 60
        alone = pool.submit(LOCAL, Request("a cat", num_images=8, steps=900))
        assert (pool.running, alone.waiting) == (8, 3)  # up to all slots and four ahead
        greedy.cancel()
        alone.cancel()
        assert pool.running == 0

    run(scenario)
    worker.stop(cancel=True)
    assert worker.join(SECONDS)


def test_retry_after_is_how_long_until_there_is_room(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=100)
        first = pool.submit(ALICE, Request("a cat", steps=80))
        with pytest.raises(Busy) as refusal:
            pool.submit(ALICE, Request("a cat", steps=50))
        assert refusal.value.headers["Retry-After"] == "30"
        with pytest.raises(Busy) as refusal:
            pool.submit(ALICE, Request("a cat", steps=500))
        assert refusal.value.headers["Retry-After"] == "80"  # then the server is idle
        assert first.seconds_left == pytest.approx(80)
        first.cancel()
        gate.open.set()

    run(scenario)


def test_after_a_refusal_requests_are_refused_unseen_until_there_is_room_for_as_much(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=100)
        first = pool.submit(ALICE, Request("a cat", steps=90))
        second = pool.submit(ALICE, Request("a cat", steps=5))
        pool.check(ALICE)  # 5 seconds are left, but nobody was refused
        with pytest.raises(Busy):
            pool.submit(ALICE, Request("a cat", steps=8))
        with pytest.raises(Busy) as refusal:
            pool.check(ALICE)
        assert refusal.value.headers["Retry-After"] == "3"  # 95 + 8 - 100
        with pytest.raises(Busy):
            pool.check(ALICE)
        pool.check(BOB)  # whose turn comes earlier
        second.cancel()
        pool.check(ALICE)
        with pytest.raises(Busy):
            pool.submit(ALICE, Request("a cat", steps=80))
        pool.check(ALICE)  # a tenth of max_wait is enough
        pool.draining = True
        with pytest.raises(Unavailable):
            pool.check(ALICE)
        first.cancel()
        gate.open.set()

    run(scenario)


def test_a_full_queue_refuses_requests_unseen_though_nobody_was_refused(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=100)
        large = pool.submit(ALICE, Request("a cat", steps=500))
        with pytest.raises(Busy, match="ready in 500 seconds, but at most 100 are allowed"):
            pool.check(ALICE)
        pool.check(BOB)  # whose turn comes earlier
        large.cancel()
        pool.check(ALICE)
        gate.open.set()

    run(scenario)


def test_requests_that_enter_together_need_room_together(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=100)
        pair = [pool.prepared(ALICE, Request("a cat", steps=90)) for _ in range(2)]
        pool.enter(*pair)  # an idle server takes ten times as many seconds
        assert pool.queued_seconds == 180
        for generation in pair:
            generation.cancel()
        first = pool.submit(ALICE, Request("a cat", steps=30))
        prepared = pool.prepared(ALICE, Request("a cat", steps=40))
        with pytest.raises(Busy, match="ready in 110 seconds"):
            pool.prepared(ALICE, Request("a cat", steps=40), beside=[prepared])
        with pytest.raises(Busy, match="ready in 110 seconds"):
            pool.enter(prepared, pool.prepared(ALICE, Request("a cat", steps=40)))
        assert pool.generations(ALICE) == [first]
        first.cancel()
        gate.open.set()

    run(scenario)


def test_a_prepared_request_is_queued_as_it_is_when_it_enters(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_seconds_per_step(worker, monkeypatch, 1.0)

    async def scenario() -> None:
        pool = Pool(worker, model.manifest, max_wait=100)
        prepared, late = (pool.prepared(ALICE, Request("a cat", seed=3, steps=90)) for _ in range(2))
        assert pool.queued_seconds == 0
        assert pool.generations(ALICE) == []
        prepared.request = replace(prepared.request, seed=4)
        pool.enter(prepared)
        with pytest.raises(Busy):  # there was room when it was prepared
            pool.enter(late)
        assert [picture.seed for picture in await prepared.wait()] == [4]

    run(scenario)


def test_invalid_requests_are_refused_before_anything_is_queued(pool: Pool) -> None:
    async def scenario() -> None:
        with pytest.raises(Invalid, match="multiple of 8"):
            pool.submit(ALICE, Request("a cat", size=(63, 64)))
        with pytest.raises(Invalid, match="seed"):
            pool.submit(ALICE, Request("a cat", seed=2**63 - 1, num_images=2))
        with pytest.raises(Invalid, match="partials is 4"):
            pool.submit(ALICE, Request("a cat"), partials=4)
        assert pool.queued_seconds == 0
        assert pool.generations(ALICE) == []

    run(scenario)


def test_a_picture_that_fails_leaves_the_other_pictures_of_its_request_alone(pool: Pool) -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError, match="<nothing>"):
            await pool.submit(ALICE, Request("a <nothing>", steps=2)).wait()
        generation = pool.submit(ALICE, Request("a <nothing>", num_images=2, steps=2))
        events = await events_of(generation)
        assert [(index, type(event)) for index, event in events] == [(0, Failed), (1, Failed)]

    run(scenario)
    assert pool.queued_seconds == 0


@pytest.mark.parametrize("kind", [None, Step, Partial, Done])
def test_a_generation_can_be_cancelled_in_any_phase(pool: Pool, kind: type | None) -> None:
    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("a cat", num_images=20, steps=100, previews=1), partials=1)
        if kind is not None:
            await until(generation, kind)
        generation.cancel()
        generation.cancel()

        assert [event async for event in generation] == []
        assert generation.done
        assert pool.queued_seconds == 0
        assert pool.running == pool.waiting == 0
        await pool.submit(BOB, Request("a dog", steps=2)).wait()
        assert pool.worker.figures.rows == 0

    run(scenario)


def test_leaving_its_context_cancels_a_generation(pool: Pool) -> None:
    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError), pool.submit(ALICE, Request("a cat", steps=900)) as generation:
            raise ZeroDivisionError
        assert generation.cancelled

    run(scenario)


def test_a_request_that_the_engine_does_not_take_by_its_deadline_is_dropped_and_another_is_finished(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)

    async def scenario() -> None:
        begun, beside = (pool.prepared(ALICE, Request("a cat", num_images=count, steps=2)) for count in (8, 1))
        pool.enter(begun, beside, deadline=0.01)  # the engine takes six pictures of the first
        dave = Tenant("dave", pixel_steps_per_minute=3 * 2 * 64 * 64)
        late = [pool.prepared(dave, Request("a dog", num_images=count, steps=2)) for count in (2, 1)]
        pool.enter(*late, deadline=0.02)
        for generation, count in zip(late, (2, 1), strict=True):
            found = [event for _, event in await events_of(generation)]
            assert len(found) == count
            for event in found:
                assert isinstance(event, Dropped)
                assert isinstance(event.error, Unavailable)
                assert event.error.code == "deadline_exceeded"
        assert (pool.waiting, begun.waiting, beside.waiting) == (3, 2, 1)
        gone, left = (pool.prepared(BOB, Request("a dog", steps=2)) for _ in range(2))
        pool.enter(gone, left, deadline=0.02)
        gone.cancel()  # which leaves the other one its deadline
        assert [type(event) for _, event in await events_of(left)] == [Dropped]
        gate.open.set()
        for generation, count in ((begun, 8), (beside, 1)):
            assert sum(isinstance(event, Done) for _, event in await events_of(generation)) == count
        again = pool.submit(dave, Request("a dog", num_images=3, steps=2), deadline=SECONDS)
        assert len(await again.wait()) == 3

    run(scenario)
    assert pool.queued_seconds == 0


def test_drain_finishes_what_was_accepted_and_refuses_what_comes_later(pool: Pool) -> None:
    async def scenario() -> None:
        generations = [pool.submit(ALICE, Request("a cat", seed=i, num_images=3, steps=5)) for i in range(4)]
        draining = asyncio.create_task(pool.drain(SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stops"):
            pool.submit(BOB, Request("a dog"))
        for generation in generations:
            assert len(await generation.wait()) == 3
        await draining

    run(scenario)


@pytest.mark.parametrize("second_call", [False, True])
def test_drain_drops_what_is_left_in_the_end_or_at_a_second_call(pool: Pool, second_call: bool) -> None:
    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("a cat", num_images=8, steps=900, previews=1))
        await until(generation, Step)
        draining = asyncio.create_task(pool.drain(SECONDS if second_call else 0.01))
        await asyncio.sleep(0)
        if second_call:
            await pool.drain(SECONDS)
        await draining
        events = [event for _, event in await events_of(generation) if isinstance(event, Dropped | Done)]
        assert len(events) == 8
        assert all(isinstance(event, Dropped) and isinstance(event.error, Unavailable) for event in events)
        assert pool.running == 0

    run(scenario)


def test_when_the_engine_ends_every_picture_gets_an_error_and_nothing_more_is_accepted(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        generations = [pool.submit(ALICE, Request("a cat", num_images=8, steps=900, previews=1)) for _ in range(2)]
        await until(generations[0], Step)

        def broken(scheduler: Scheduler) -> None:
            raise ZeroDivisionError("an accident")

        monkeypatch.setattr(Scheduler, "step", broken)
        for generation in generations:
            with pytest.raises(Unavailable, match="engine stopped"):
                await generation.wait()
        with pytest.raises(Unavailable):
            pool.submit(BOB, Request("a dog"))

    run(scenario)
    assert pool.queued_seconds == 0


def test_a_server_that_still_opens_its_model_accepts_nothing(model: Model) -> None:
    async def scenario() -> None:
        pool = Pool(Worker(lambda: model), model.manifest)
        with pytest.raises(Unavailable, match="still loading the model: try again in a few seconds"):
            pool.submit(ALICE, Request("a cat"))

    run(scenario)


def test_a_tenant_has_a_budget_of_pixel_steps_that_refills(worker: Worker, model: Model) -> None:
    now = 100.0
    pool = Pool(worker, model.manifest, max_wait=1e6, clock=lambda: now)
    limited = Tenant("limited", pixel_steps_per_minute=10 * 64 * 64)

    async def scenario() -> None:
        nonlocal now
        await pool.submit(limited, Request("a cat", steps=8)).wait()
        with pytest.raises(Busy) as refusal:
            pool.submit(limited, Request("a cat", steps=8))
        assert refusal.value.code == "quota_exceeded"
        assert refusal.value.headers["Retry-After"] == "36"  # 6 of 10 steps a minute are missing
        await pool.submit(BOB, Request("a cat", steps=8)).wait()
        now += 36
        await pool.submit(limited, Request("a cat", steps=8)).wait()
        now += 60
        large = pool.submit(limited, Request("a cat", num_images=20, steps=8))  # more than a minute's: on credit
        large.cancel()  # the pictures that waited are not charged: 6 of 20 had been handed over
        now += 60 * 4.81
        assert len(await pool.submit(limited, Request("a cat", steps=10)).wait()) == 1

    run(scenario)


def test_a_tenant_without_any_pixel_steps_is_refused(pool: Pool) -> None:
    async def scenario() -> None:
        with pytest.raises(Forbidden, match="may not generate pictures") as refusal:
            pool.submit(Tenant("words only", pixel_steps_per_minute=0), Request("a cat", steps=1))
        assert refusal.value.code == "quota_exceeded"

    run(scenario)
    assert pool.queued_seconds == 0


def test_a_consumer_that_does_not_read_costs_the_engine_nothing_and_later_gets_the_newest_state(pool: Pool) -> None:
    async def scenario() -> None:
        lazy = pool.submit(ALICE, Request("a cat", num_images=2, steps=200, previews=1), partials=2)
        while not lazy.done:
            await pool.submit(BOB, Request("a dog", steps=20)).wait()
        events = await events_of(lazy)
        for i in range(2):
            kinds = [type(event) for index, event in events if index == i]
            assert kinds == [Partial, Partial, Step, Done]
        assert {event.step for _, event in events if isinstance(event, Step)} == {199}

    run(scenario)


def test_a_consumer_of_ends_is_not_woken_for_steps_and_the_progress_counts_them_all_the_same(pool: Pool) -> None:
    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("a cat", num_images=2, steps=4, previews=1), partials=1)
        generation.only_ends = True

        assert [type(event) for _, event in await events_of(generation)] == [Done, Done]
        assert generation.progress == 1
        assert generation.estimate is not None

    run(scenario)


def test_a_step_without_a_preview_does_not_wake_the_loop_and_is_counted_on_request(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes = 0
    wake_up = Pool._wake_up

    def counted(self: Pool) -> None:
        nonlocal wakes
        wakes += 1
        wake_up(self)

    monkeypatch.setattr(Pool, "_wake_up", counted)

    async def scenario() -> None:
        await pool.submit(ALICE, Request("a cat", steps=200)).wait()
        assert wakes == 1  # for the picture
        running = pool.submit(ALICE, Request("a cat", steps=900))
        while running.steps[0] < 2:
            await asyncio.sleep(0.001)
            assert pool.generations(ALICE) == [running]
        assert 0 < running.progress < 1
        assert wakes == 1
        running.cancel()

    run(scenario)


def test_a_slot_that_becomes_free_while_a_request_enters_is_used_at_once(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, enter = engine_gate(monkeypatch), pool._enter

    async def scenario() -> None:
        limit = pool.worker.slots + 4  # that the engine has
        running = pool.submit(LOCAL, Request("a cat", num_images=limit, steps=20))
        assert (pool.running, pool.waiting) == (limit, 0)

        def entered(generation: Generation) -> None:
            """Enters after the engine's thread has reported a last step and, as nothing waits, not woken the loop."""
            pool._hear(running._running[0], Step(20, 20))
            enter(generation)

        monkeypatch.setattr(pool, "_enter", entered)
        late = pool.submit(LOCAL, Request("a dog", steps=20))

        assert late.waiting == 0
        late.cancel()
        running.cancel()
        gate.open.set()

    run(scenario)


def test_a_slow_consumer_of_several_generations_gets_only_their_newest_state(pool: Pool) -> None:
    async def scenario() -> None:
        generations = [pool.submit(ALICE, Request("a cat", seed=i, steps=200, previews=1)) for i in range(2)]
        found: list[tuple[int, type]] = []
        async with contextlib.aclosing(events(generations)) as stream:
            async for number, event in stream:
                found.append((number, type(event.event)))
                while not all(generation.done for generation in generations):
                    await asyncio.sleep(0.01)
        for i in range(2):
            kinds = [kind for number, kind in found if number == i]
            assert kinds[-2:] == [Step, Done]
            assert kinds.count(Step) <= 2

    run(scenario)


def test_a_picture_is_used_when_it_is_ready_and_its_pixels_are_let_go(pool: Pool) -> None:
    async def connected() -> Message:
        return await asyncio.Future()

    async def scenario() -> None:
        generation = pool.submit(ALICE, Request("a cat", seed=5, num_images=6, steps=20))
        images: list[weakref.ref[Image]] = []
        ready: list[int] = []

        async def use(of: Generation, picture: PictureDone) -> int:
            assert of is generation
            images.append(weakref.ref(picture.image))
            ready.append(sum(picture is not None for picture in generation.pictures))
            return picture.image.size

        found = await finish(HTTPRequest({"type": "http"}, connected), generation, use=use)

        assert [picture.seed for picture, _ in found] == [5, 6, 7, 8, 9, 10]
        assert [size for _, size in found] == [64 * 64 * 3] * 6
        assert ready[0] < 6
        for _ in range(200):  # the worker's thread may hold the last picture for a moment
            gc.collect()
            if all(image() is None for image in images):
                break
            await asyncio.sleep(0.01)
        assert [image() is None for image in images] == [True] * 6

    run(scenario)


def test_the_engines_thread_neither_pastes_nor_blurs_and_the_result_is_the_same(
    pool: Pool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.bool_)
    mask[8:40, 16:48] = True
    request = Request("a cat", seed=3, num_images=2, steps=4, image=image, mask=mask, mask_blur=2)
    expected = draw(model, request)
    weights, threads = edit.paste_weights, list[str]()

    def noted(mask: Any, blur: float) -> Any:
        threads.append(threading.current_thread().name)
        return weights(mask, blur)

    monkeypatch.setattr(edit, "paste_weights", noted)

    async def scenario() -> None:
        generation = pool.submit(ALICE, request, partials=1)
        found = await events_of(generation)
        assert threads == []
        [first, second] = [generation.pasted(picture.image) for picture in generation.pictures if picture is not None]
        partial = next(event.image for _, event in found if isinstance(event, Partial))
        assert near(first, expected[0].image)
        assert near(second, expected[1].image)
        far = np.s_[46:, :]  # more than 5 pixels from the mask
        for shown in (first, generation.pasted(partial)):
            assert np.array_equal(shown[far], image[far])
        assert threads == [threading.current_thread().name]  # once
        plain = pool.submit(ALICE, replace(request, mask=None, mask_blur=0))
        [picture] = [*await plain.wait()][:1]
        assert plain.pasted(picture.image) is picture.image

    run(scenario)


def test_an_observer_is_notified_of_refusals_waits_and_how_pictures_end(worker: Worker, model: Model) -> None:
    record = Record()
    pool = Pool(worker, model.manifest, max_wait=1e6, observer=record)

    async def scenario() -> None:
        await pool.submit(ALICE, Request("a cat", steps=2)).wait()
        with pytest.raises(ApiError):
            await pool.submit(ALICE, Request("a <nothing>", steps=2)).wait()
        generation = pool.submit(ALICE, Request("a cat", num_images=7, steps=900, previews=1))
        await until(generation, Step)
        generation.cancel()
        with pytest.raises(Invalid):
            pool.submit(ALICE, Request("a cat", size=(63, 64)))

    run(scenario)
    assert record.refusals == ["invalid_request"]
    assert record.ends[:2] == [("done", "decoding"), ("failed", "encoding")]
    assert {outcome for outcome, _ in record.ends[2:]} == {"cancelled"}
    assert {"waiting", "denoising"} <= {phase for _, phase in record.ends[2:]}
    assert len(record.ends) == 9
    assert len(record.first_steps) >= 2
    assert all(seconds >= 0 for seconds in record.waits + record.first_steps)


def test_a_generation_leaves_nothing_behind(pool: Pool) -> None:
    async def scenario() -> None:
        image = np.zeros((64, 64, 3), np.uint8)
        finished = pool.submit(ALICE, Request("a cat", num_images=2, steps=3, image=image, previews=1), partials=1)
        cancelled = pool.submit(BOB, Request("a dog", num_images=9, steps=300, image=image), deadline=SECONDS)
        await finished.wait()
        cancelled.cancel()
        await pool.submit(CAROL, Request("a", steps=1)).wait()
        things = [finished, cancelled, finished.request, cancelled.request, image, *finished.pictures]
        alive = [weakref.ref(thing) for thing in things if thing is not None]
        del finished, cancelled, image, things
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)

    run(scenario)
    assert not pool._accounts
    assert not pool._turns


def test_the_cost_of_an_event_does_not_depend_on_how_many_requests_wait(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = engine_gate(monkeypatch)

    async def scenario() -> None:
        generations: list[Generation] = []
        lines: list[int] = []
        for count in (20, 2000):
            while len(generations) < count:
                tenant = Tenant(f"tenant {len(generations) % 50}")
                generations.append(pool.submit(tenant, Request("a cat", steps=1)))
            with counted_lines() as counter:
                pool.submit(ALICE, Request("a cat", steps=1)).cancel()
            lines.append(counter[0])
        assert lines[0] == lines[1]
        remaining = generations[::100]
        for generation in {*generations}.difference(remaining):
            generation.cancel()
        gate.open.set()
        for generation in remaining:
            assert len(await generation.wait()) == 1

    run(scenario)
    assert pool.queued_seconds == 0


@contextmanager
def counted_lines() -> Iterator[list[int]]:
    """Counts the lines of the pool's code that run."""
    counter = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_globals["__name__"] != "oneword.serve.pool":
            return None
        counter[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield counter
    finally:
        sys.settrace(before)
