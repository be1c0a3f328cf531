"""The engine thread: its pictures match those drawn alone, and it can be cancelled, stopped and broken at any time."""

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneword.engines.errors import EngineError, UsageError
from oneword.runtime.concept import Concept
from oneword.runtime.denoiser import Arena
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import StepDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.samplers import Sampler
from oneword.runtime.scheduler import Scheduler
from oneword.serve.worker import (
    Done,
    Failed,
    Lost,
    Partial,
    Preview,
    Started,
    State,
    Step,
    Turn,
    Work,
    Worker,
    WorkerEvent,
)
from tests.serve.running import SECONDS, started_worker


@pytest.fixture
def worker(tiny_bundle: Path) -> Iterator[Worker]:
    with started_worker(tiny_bundle, max_rows=4) as worker:
        yield worker


class Events:
    """A listener that collects events, and lets a test wait for one."""

    def __init__(self, hook: Callable[[WorkerEvent], None] = lambda event: None) -> None:
        self.all: list[WorkerEvent] = []
        self._hook = hook
        self._arrived: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()

    def __call__(self, event: WorkerEvent) -> None:
        self.all.append(event)
        self._arrived.put(event)
        self._hook(event)

    def until(self, *kinds: type) -> Any:
        """The next event of one of these kinds."""
        while not isinstance(event := self._arrived.get(timeout=SECONDS), kinds):
            pass
        return event


def near(image: Image, reference: Image) -> bool:
    """Whether no pixel differs by more than 1, the effect of summing in another order in fp32."""
    return bool(np.abs(image.astype(int) - reference).max() <= 1)


def scene() -> Image:
    return np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


def word(seed: int = 0) -> Concept:
    vectors = np.random.default_rng(seed).normal(0, 0.5, (2, 32)).astype(np.float32)
    return Concept("<w>", {"text_encoder": vectors})


def mixed() -> list[Request]:
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    return [
        *(Request("a red cat", seed=i, steps=3 + i, sampler=sampler) for i, sampler in enumerate(Sampler)),
        Request("a photo of <w>", seed=20, steps=4, words={"<w>": word()}),
        Request("a photo of <w>", seed=20, steps=4, words={"<w>": word(1)}),
        Request("a dog", seed=21, steps=4, image=scene(), strength=0.7),
        Request("a dog", seed=22, steps=4, image=scene(), mask=mask),
        Request("a wide dog", seed=23, steps=4, size=(128, 64)),
    ]


def test_a_worker_that_is_ready_binds_nothing_for_pictures_of_its_size(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[int] = []
    bind = Arena._bind
    monkeypatch.setattr(Arena, "_bind", lambda arena, n: bound.append(n) or bind(arena, n))  # type: ignore[func-returns-value]
    listeners = [Events() for _ in range(4)]
    for seed, events in enumerate(listeners):
        guidance = 4.0 if seed else 1.0
        worker.submit(Request("a cat", seed=seed, steps=3 + seed, guidance_scale=guidance), frozenset(), events)

    assert all(isinstance(events.until(Done, Failed), Done) for events in listeners)
    assert bound == []


def test_served_pictures_match_their_pictures_alone(worker: Worker, model: Model) -> None:
    expected = [draw(model, request)[0] for request in mixed()]

    listeners = [Events() for _ in expected]
    for request, events in zip(mixed(), listeners, strict=True):
        worker.submit(request, frozenset(), events)

    for picture, events in zip(expected, listeners, strict=True):
        served = events.until(Done, Failed).picture
        assert near(served.image, picture.image)
        assert served.parameters == picture.parameters


def test_events_come_in_order_and_partial_pictures_are_decoded_estimates(worker: Worker, model: Model) -> None:
    events = Events()
    worker.submit(Request("a cat", seed=1, steps=6, previews=3), frozenset({2, 3}), events)
    done = events.until(Done)

    assert [type(event) for event in events.all] == [
        Started, Step, Step, Partial, Step, Partial, Step, Step, Step, Done,
    ]  # fmt: skip
    steps = [event for event in events.all if isinstance(event, Step)]
    assert [(event.step, event.steps) for event in steps] == [(i, 6) for i in range(1, 7)]
    assert [event.step for event in steps if event.denoised is not None] == [3]
    partials = {event.step: event.image for event in events.all if isinstance(event, Partial)}
    estimate = steps[2].denoised
    assert estimate is not None
    assert near(partials[3], model.decode(estimate[None])[0][0])
    assert near(done.picture.image, draw(model, Request("a cat", seed=1, steps=6))[0].image)


def test_a_small_decoder_decodes_partial_pictures_and_previews(tiny_preview_bundle: Path) -> None:
    model = Model.open(tiny_preview_bundle, "onnxruntime", threads=1)
    request = Request("a cat", seed=1, steps=6, previews=2)
    estimates = {
        event.step: event.denoised
        for event in generate(model, [replace(request, previews=1)])
        if isinstance(event, StepDone) and event.denoised is not None
    }
    events = Events()
    with started_worker(tiny_preview_bundle, max_rows=4) as worker:
        worker.submit(request, frozenset({3, 4}), events)
        done = events.until(Done)

    assert [type(event) for event in events.all] == [
        Started, Step, Step, Preview, Step, Partial, Step, Partial, Preview, Step, Step, Done,
    ]  # fmt: skip
    assert all(event.denoised is None for event in events.all if isinstance(event, Step))
    for kind, steps in ((Preview, [2, 4]), (Partial, [3, 4])):
        shown = [event for event in events.all if isinstance(event, kind)]
        assert [event.step for event in shown] == steps
        for event in shown:
            expected = model.preview(estimates[event.step])
            assert expected is not None
            assert near(event.image, expected)
    assert near(done.picture.image, draw(model, replace(request, previews=0))[0].image)


def test_a_turn_decodes_few_previews_and_partial_pictures_come_first(
    tiny_preview_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[list[bool]] = []
    decode = Worker._decode_estimates

    def counted(self: Worker, model: Model, estimates: Any) -> int:
        together.append([event.step in ticket.partial_steps for ticket, event in estimates])
        return decode(self, model, estimates)

    monkeypatch.setattr(Worker, "_decode_estimates", counted)
    listeners = [Events() for _ in range(4)]
    with started_worker(tiny_preview_bundle, max_rows=4) as worker:
        for seed, events in enumerate(listeners):
            partials = frozenset({5}) if seed % 2 else frozenset[int]()
            worker.submit(Request("a cat", seed=seed, steps=12, previews=1), partials, events)
        for seed, events in enumerate(listeners):
            events.until(Done)
            assert any(isinstance(event, Preview) for event in events.all)
            assert [event.step for event in events.all if isinstance(event, Partial)] == [5] * (seed % 2)
        assert not worker._due
        assert not worker._due_previews
    assert max(map(len, together)) == 2
    assert all(turn == sorted(turn, reverse=True) for turn in together)


def test_a_turn_decodes_few_partial_pictures_and_every_picture_gets_some(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    decode = Worker._decode_estimates

    def counted(self: Worker, model: Model, partials: Any) -> int:
        together.append(len(partials))
        return decode(self, model, partials)

    monkeypatch.setattr(Worker, "_decode_estimates", counted)
    listeners = [Events() for _ in range(4)]

    for seed, events in enumerate(listeners):
        worker.submit(Request("a cat", seed=seed, steps=12), frozenset({3}), events)

    for events in listeners:
        events.until(Done)
        assert [event.step for event in events.all if isinstance(event, Partial)] == [3]
    assert max(together) <= 2
    assert not worker._due


def test_requests_that_cannot_run_fail_alone(worker: Worker) -> None:
    good, unknown, large = Events(), Events(), Events()
    worker.submit(Request("a cat", steps=4), frozenset(), good)
    worker.submit(Request("a <nothing>", steps=4), frozenset(), unknown)
    worker.submit(Request("a cat", size=(63, 64)), frozenset(), large)

    assert "<nothing>" in str(unknown.until(Failed).error)
    assert "63" in str(large.until(Failed).error)
    assert good.until(Done)


def test_several_pictures_at_once_are_refused(worker: Worker) -> None:
    with pytest.raises(UsageError, match="num_images is 2"):
        worker.submit(Request("a cat", num_images=2), frozenset(), Events())


@pytest.mark.parametrize("kind", [Started, Step, Partial])
def test_a_cancelled_picture_has_no_further_events_and_its_slot_is_free(worker: Worker, kind: type) -> None:
    tickets: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def cancel(event: WorkerEvent) -> None:  # on the engine thread, at a known moment
        if isinstance(event, kind):
            worker.cancel(tickets.get(timeout=SECONDS))

    cancelled, other = Events(cancel), Events()
    tickets.put(worker.submit(Request("a cat", steps=900), frozenset({1, 2}), cancelled))
    worker.submit(Request("a dog", seed=1, steps=4), frozenset(), other)
    other.until(Done)

    assert isinstance(cancelled.all[-1], kind)
    assert sum(isinstance(event, kind) for event in cancelled.all) == 1
    idle(worker)
    assert worker.figures.rows == worker.figures.waiting == 0


def test_a_picture_that_waits_for_a_slot_can_be_cancelled(worker: Worker) -> None:
    running = [Events() for _ in range(4)]
    tickets = [
        worker.submit(Request("a cat", seed=i, steps=900), frozenset(), events) for i, events in enumerate(running)
    ]
    for events in running:
        events.until(Step)
    waiting = Events()
    ticket = worker.submit(Request("a dog", steps=4), frozenset(), waiting)
    waiting.until(Started)
    for _ in range(3):
        worker.cancel(ticket)
    for running_ticket in tickets:
        worker.cancel(running_ticket)

    idle(worker)
    assert [type(event) for event in waiting.all] == [Started]
    assert worker.figures.rows == 0


def idle(worker: Worker) -> None:
    """Waits until nothing is in progress: a picture that comes after a cancellation sees its effect."""
    events = Events()
    worker.submit(Request("a", steps=1), frozenset(), events)
    events.until(Done)


def test_a_finished_and_a_cancelled_picture_leave_nothing_behind(worker: Worker) -> None:
    finished, cancelled = Events(), Events()
    requests = [Request("a <w>", steps=3, image=scene(), words={"<w>": word(i)}, previews=1) for i in range(2)]
    tickets = [
        worker.submit(request, frozenset({1}), events)
        for request, events in zip(requests, (finished, cancelled), strict=True)
    ]
    picture = finished.until(Done).picture
    worker.cancel(tickets[1])
    idle(worker)
    assert requests[0].image is not None
    alive = [weakref.ref(thing) for thing in (*requests, *tickets, finished, cancelled, picture, picture.image)]
    words = [weakref.ref(word) for request in requests for word in (request.words or {}).values()]

    del requests, tickets, finished, cancelled, picture
    gc.collect()

    assert [ref() for ref in (*alive, *words)] == [None] * (len(alive) + len(words))


def test_stop_finishes_what_was_accepted_and_takes_no_more(tiny_bundle: Path) -> None:
    worker = started(tiny_bundle)
    events, late = Events(), Events()
    worker.submit(Request("a cat", steps=8), frozenset(), events)
    worker.stop()
    worker.submit(Request("a cat"), frozenset(), late)

    assert isinstance(late.until(object), Lost)
    assert events.until(Done, Lost).picture is not None
    assert worker.join(SECONDS)
    assert worker.state is State.STOPPED


def test_stop_with_cancel_notifies_every_listener_that_the_engine_has_ended(tiny_bundle: Path) -> None:
    worker = started(tiny_bundle)
    events = Events()
    worker.submit(Request("a cat", steps=900), frozenset(), events)
    events.until(Step)
    worker.stop(cancel=True)

    assert isinstance(events.until(Done, Lost), Lost)
    assert worker.join(SECONDS)


def started(bundle: Path) -> Worker:
    worker = Worker(lambda: Model.open(bundle, "onnxruntime", threads=1))
    worker.start()
    worker.wait_ready(SECONDS)
    return worker


def test_a_model_that_cannot_be_opened_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    worker = Worker(lambda: Model.open(tmp_path / "nothing"))
    events = Events()
    worker.submit(Request("a cat"), frozenset(), events)
    worker.start()

    with pytest.raises(EngineError, match="nothing"):
        worker.wait_ready(SECONDS)
    assert worker.state is State.FAILED
    assert isinstance(events.until(Lost), Lost)


def test_an_exception_on_the_engine_thread_is_a_failure_that_every_listener_gets(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = started(tiny_bundle)
    first, second = Events(), Events()
    worker.submit(Request("a cat", steps=900), frozenset(), first)
    first.until(Step)
    worker.submit(Request("a cat", steps=900), frozenset(), second)

    def broken(scheduler: Scheduler) -> None:
        raise ZeroDivisionError("an accident")

    monkeypatch.setattr(Scheduler, "step", broken)

    assert isinstance(first.until(Lost), Lost)
    assert isinstance(second.until(Lost), Lost)
    assert worker.join(SECONDS)
    assert (worker.state, worker.failure) == (State.FAILED, "an accident")
    assert not worker.ready.is_set()


def test_a_turn_is_expected_to_encode_the_chunks_of_its_prompts(worker: Worker) -> None:
    chunks, events = 1_000_000, Events()  # so many that nothing else of the turn counts

    worker.submit(Request("a cat", steps=3), frozenset(), events, chunks=chunks)

    events.until(Done)
    assert worker._expected_seconds == pytest.approx(chunks * worker.figures.seconds_per_chunk, rel=0.01)


def test_an_engine_that_hangs_is_noticed_and_an_idle_one_is_not(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not worker.stalled(0)

    entered, released = threading.Event(), threading.Event()
    step = Scheduler.step

    def hanging(scheduler: Scheduler) -> Any:
        entered.set()
        assert released.wait(SECONDS)
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", hanging)
    events = Events()
    worker.submit(Request("a cat", steps=2), frozenset(), events)
    assert entered.wait(SECONDS)
    end = time.monotonic() + SECONDS
    while not (stalled := worker.stalled(0.01)) and time.monotonic() < end:
        time.sleep(0.01)
    assert stalled
    assert not worker.stalled(2 * SECONDS)

    released.set()
    events.until(Done)
    idle(worker)
    assert not worker.stalled(2 * SECONDS)


def test_a_model_counts_the_chunks_that_it_encodes(model: Model) -> None:
    def chunks(*prompts: str) -> int:
        before, seconds = model.encoded_chunks, model.encoding_seconds
        model.encode([model.tokenize(prompt) for prompt in prompts])
        encoded = model.encoded_chunks - before
        assert (model.encoding_seconds > seconds) == (encoded > 0)
        return encoded

    assert chunks("a red fox", "a red fox", "a green fox") == 2
    assert chunks("a red fox") == 0
    assert chunks("a blue fox BREAK a grey fox", "a red fox") == 2


def test_the_figures_measure_speed_and_stages(tiny_bundle: Path) -> None:
    turns: list[Turn] = []
    worker = Worker(lambda: Model.open(tiny_bundle, "onnxruntime", threads=1), observer=turns.append)
    worker.start()
    worker.wait_ready(SECONDS)
    before = worker.figures
    parts = Work(branch_pixels=64 * 64), Work(pixels=64 * 64), Work(estimates=64 * 64), Work(chunks=1)
    assert all(before.seconds_for(part) > 0 for part in parts)
    assert before.seconds_for(parts[0] * 2 + parts[3]) == pytest.approx(
        2 * before.seconds_for(parts[0]) + before.seconds_for(parts[3])
    )

    events = Events()
    worker.submit(Request("a <w>", steps=5, words={"<w>": word()}), frozenset({2}), events)
    events.until(Done)
    worker.stop()
    assert worker.join(SECONDS)

    assert [turn.rows for turn in turns] == [1] * 5
    assert worker.figures.turns == 5
    assert worker.figures.words == 1
    assert set(worker.figures.seconds) == {"encode", "denoise", "decode", "partial"}
    assert sum(turn.seconds["partial"] > 0 for turn in turns) == 1
    assert worker.figures.seconds["denoise"] == pytest.approx(sum(turn.seconds["denoise"] for turn in turns))
