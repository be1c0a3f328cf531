"""Pictures generated in a device's memory, on a simulated CUDA: one step is queued ahead, and all results equal the
host's. Tests that run on a real GPU are marked `gpu`, in tests/engines.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from oneword.engines import onnxruntime_cuda
from oneword.engines.cuda import CudaStream, Device
from oneword.engines.errors import EngineError, FeedError, NotFinite
from oneword.engines.onnxruntime import open_session
from oneword.engines.open import Backend, gpu_stream
from oneword.runtime.concept import Concept
from oneword.runtime.denoiser import Arena, Stats
from oneword.runtime.drawing import scheduler_for
from oneword.runtime.events import Event, Failed, PictureDone, StepDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.row import NoiseStream
from oneword.runtime.samplers import Sampler
from oneword.runtime.scheduler import Scheduler
from tests.simulated_cuda import Runtime, Session

ort = pytest.importorskip("onnxruntime")

WORD = Concept("<w>", {"text_encoder": np.random.default_rng(0).normal(0, 0.5, (2, 32)).astype(np.float32)})
PRECISE = Concept(
    "<precise>",
    {"text_encoder": np.random.default_rng(2).normal(0, 0.5, (1, 32)).astype(np.float32)},
    out={"text_encoder": np.random.default_rng(3).normal(0, 1, (3, 4, 1, 32)).astype(np.float32)},
    values_only=True,
)
MIXED = [
    Request("a <w>", seed=1, steps=5, sampler=Sampler.EULER_A),
    Request("a cat", seed=2, steps=3, guidance_scale=1.0, num_images=2),
    Request("a <w> and a dog", seed=4, steps=20, sampler=Sampler.LCM),
    Request("a <w>", seed=5, steps=6, guidance_interval=(0.5, 5.0)),
    Request("a boat", seed=6, steps=3, size=(64, 32)),
]
PAINTED = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.tri(64, dtype=np.bool_)
POOL = [
    *MIXED,
    Request("a <w>", seed=7, steps=7, sampler=Sampler.DPMPP_2M),
    Request("a ring", seed=8, steps=6, sampler=Sampler.DPMPP_2M_SDE, negative_prompt="a <w>"),
    Request("a star", seed=9, steps=4, image=PAINTED, mask=MASK, sampler=Sampler.EULER_A),
    Request("a cat", seed=10, steps=1),
    Request("a <precise>", seed=11, steps=7, sampler=Sampler.HEUN),
    Request("a [<w>:<precise>:0.4]", seed=12, steps=5, negative_prompt="<precise>"),
]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()

    def on_the_cpu(name: str, path: Path, providers: Any) -> Session:
        return Session(open_session(name, path, ["CPUExecutionProvider"], threads=1), runtime)

    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    monkeypatch.setattr(onnxruntime_cuda, "open_session", on_the_cpu)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnxruntime_cuda.PROVIDER])
    gpu_stream.cache_clear()
    yield runtime
    gpu_stream.cache_clear()
    assert runtime.violations == []


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs capturable, as with TensorRT."""
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", True)


@pytest.fixture
def captures_fail(cuda: Runtime, captured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs capturable by their engine's word, but each has a kernel that waits, which a capture cannot record."""
    enqueue = Session.run_with_iobinding

    def waiting(session: Session, binding: Any, options: Any) -> None:
        if cuda.wait():
            raise RuntimeError("a kernel wanted to wait")
        enqueue(session, binding, options)

    monkeypatch.setattr(Session, "run_with_iobinding", waiting)


@pytest.fixture
def model(tiny_bundle: Path, cuda: Runtime) -> Model:
    model = Model.open(tiny_bundle, Backend.CUDA)
    model.load(WORD)
    model.load(PRECISE)
    return model


@pytest.fixture(scope="module")
def on_host(tiny_bundle: Path) -> Model:
    model = Model.open(tiny_bundle, Backend.ONNXRUNTIME, threads=1)
    model.load(WORD)
    model.load(PRECISE)
    return model


@pytest.fixture(scope="module")
def alone(on_host: Model) -> Callable[[Request], dict[int, Image]]:
    """The pictures of a request that is alone on the host, by seed."""
    cache: dict[Request, dict[int, Image]] = {}

    def pictures_alone(request: Request) -> dict[int, Image]:
        if request not in cache:
            cache[request] = pictures(run(scheduler_for(on_host, [request], 1)))
        return cache[request]

    return pictures_alone


def run(scheduler: Scheduler, max_steps: int | None = 1) -> list[Event]:
    events: list[Event] = []
    while scheduler:
        events += scheduler.step(max_steps)
    return events


def pictures(events: Sequence[Event]) -> dict[int, Image]:
    assert [event.error for event in events if isinstance(event, Failed)] == []
    return {event.seed: event.image for event in events if isinstance(event, PictureDone)}


def generated(model: Model, *requests: Request, max_steps: int | None = 1) -> tuple[dict[int, Image], Stats]:
    scheduler = scheduler_for(model, requests)
    return pictures(run(scheduler, max_steps)), scheduler.denoiser.stats


def assert_same(actual: dict[int, Image], expected: dict[int, Image]) -> None:
    assert actual.keys() == expected.keys()
    for seed, image in expected.items():
        np.testing.assert_array_equal(actual[seed], image)


@pytest.mark.parametrize("max_steps", [1, None])
@pytest.mark.parametrize("capturable", [True, False])
def test_pictures_match_the_host_bit_for_bit(
    model: Model, on_host: Model, cuda: Runtime, monkeypatch: pytest.MonkeyPatch, max_steps: int, capturable: bool
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    expected, _ = generated(on_host, *MIXED)
    assert len(expected) == 6
    for _ in range(2):
        actual, stats = generated(model, *MIXED, max_steps=max_steps)
        assert_same(actual, expected)
        assert (stats.replayed > 0) == capturable

    assert (cuda.captures > 0) == capturable


@pytest.mark.parametrize("request_", POOL, ids=lambda request: f"seed {request.seed}")
@pytest.mark.usefixtures("captured")
def test_a_picture_generated_alone_matches_the_host(model: Model, alone: Any, request_: Request) -> None:
    assert_same(generated(model, request_)[0], alone(request_))


@pytest.mark.usefixtures("captured")
def test_a_step_is_captured_once_for_all_pictures_of_its_sizes_and_replayed(model: Model, cuda: Runtime) -> None:
    scheduler = Scheduler(model, 1)
    for seed in range(3):
        scheduler.add(Request("a <w>", steps=5, seed=seed))
        assert len(pictures(run(scheduler))) == 1

    assert (cuda.captures, cuda.launches) == (1, 3 * 5 - 2)  # the first two runs are not captured
    assert (scheduler.denoiser.stats.steps, scheduler.denoiser.stats.replayed) == (15, 13)
    assert scheduler.denoiser.stats.padding == 0


@pytest.mark.usefixtures("captured")
def test_every_step_after_a_warm_up_is_a_replay_and_binds_nothing(model: Model, cuda: Runtime, alone: Any) -> None:
    scheduler = Scheduler(model, 3)
    scheduler.warm()
    captures, bindings = cuda.captures, scheduler.denoiser.stats.bindings
    assert captures == bindings == 5  # 1, 2, 3, 4 and 6 branches
    requests = [POOL[5], POOL[6], Request("a cat", seed=2, steps=12, guidance_scale=1.0)]
    for request in requests:
        scheduler.add(request)
    assert_same(pictures(run(scheduler)), {k: v for request in requests for k, v in alone(request).items()})

    stats = scheduler.denoiser.stats
    assert stats.steps == stats.replayed > 0
    assert (cuda.captures, stats.bindings) == (captures, bindings)
    assert 0 < stats.padding < stats.branches  # all three have five branches, which run as six


@pytest.mark.usefixtures("captures_fail")
def test_nothing_is_bound_after_a_warm_up_that_failed_to_capture(model: Model) -> None:
    scheduler = Scheduler(model, 4)
    scheduler.warm()
    bindings = scheduler.denoiser.stats.bindings
    for seed in range(4):
        scheduler.add(Request("a cat", seed=seed, steps=2 + seed, guidance_scale=4.0 if seed else 1.0))
    assert len(pictures(run(scheduler))) == 4

    assert (bindings, scheduler.denoiser.stats.bindings) == (8, 8)
    assert scheduler.denoiser.stats.replayed == 0


@pytest.mark.parametrize("capturable", [True, False])
def test_at_most_one_step_is_queued_ahead_and_the_host_waits_for_nothing_else(
    model: Model, cuda: Runtime, monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    scheduler = Scheduler(model, 1)
    scheduler.warm()
    waits, events = {}, {}
    for steps in (4, 40):
        cuda.most_runs_queued = 0
        before = cuda.waits, cuda.event_waits
        scheduler.add(Request("a <w>", steps=steps, sampler=Sampler.EULER_A))
        assert len(pictures(run(scheduler))) == 1
        waits[steps], events[steps] = cuda.waits - before[0], cuda.event_waits - before[1]
        assert cuda.most_runs_queued == 2  # the running one, and one ahead

    assert waits[4] >= waits[40]  # the first also encodes the prompts
    assert events == {4: 4, 40: 40}


def test_the_host_never_waits_for_the_step_it_just_queued(model: Model, cuda: Runtime) -> None:
    scheduler = Scheduler(model, 1)
    scheduler.warm()
    scheduler.add(Request("a <w>", steps=6))
    waits = []
    for _ in range(5):
        before = cuda.event_waits
        scheduler.step()
        waits.append(cuda.event_waits - before)

    assert waits == [0, 1, 1, 1, 1]  # for the step before the one that was just queued
    pictures(run(scheduler))


@pytest.mark.usefixtures("captures_fail")
@pytest.mark.parametrize("max_steps", [1, None])
def test_pictures_are_the_same_if_the_engine_cannot_be_captured(
    model: Model, on_host: Model, cuda: Runtime, max_steps: int | None
) -> None:
    expected, _ = generated(on_host, *MIXED)
    for _ in range(2):
        actual, stats = generated(model, *MIXED, max_steps=max_steps)
        assert_same(actual, expected)
        assert stats.replayed == 0
    assert cuda.captures == 0


@pytest.mark.parametrize("capturable", [True, False])
def test_rows_that_join_leave_or_are_cancelled_do_not_change_other_pictures(
    model: Model, monkeypatch: pytest.MonkeyPatch, alone: Any, capturable: bool
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    scheduler = Scheduler(model, 3)
    events: list[Event] = []
    scheduler.add(POOL[3])
    for turn in range(60):
        events += scheduler.step()
        if turn == 2:
            scheduler.add(POOL[0])
        if turn == 3:
            cancelled = scheduler.add(POOL[5])
        if turn == 6:
            scheduler.cancel(cancelled)
            scheduler.add(POOL[6])
        if turn == 8:
            scheduler.add(POOL[1])
            scheduler.add(POOL[9])
        if turn == 10:
            scheduler.cancel(scheduler.add(POOL[10]))
    assert not scheduler

    assert_same(pictures(events), {k: v for i in (3, 0, 6, 1, 9) for k, v in alone(POOL[i]).items()})
    assert not any(event.id == cancelled for event in events if isinstance(event, PictureDone))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from(POOL),
            st.integers(0, 6),  # turns before it is added
            st.none() | st.integers(0, 6),  # turns after which it is cancelled
        ),
        min_size=1,
        max_size=6,
    ),
    max_rows=st.integers(1, 4),
    capturable=st.booleans(),
    warm=st.booleans(),
)
def test_a_picture_matches_the_host_whatever_else_shares_the_device(
    model: Model, alone: Any, plan: list[tuple[Request, int, int | None]], max_rows: int, capturable: bool, warm: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
        scheduler = Scheduler(model, max_rows)
        if warm:
            scheduler.warm()
        events: list[Event] = []
        requests: dict[int, Request] = {}
        cancelled: set[int] = set()
        for request, delay, lifetime in plan:
            for _ in range(delay):
                events += scheduler.step()
            requests[id := scheduler.add(request)] = request
            for _ in range(lifetime or 0):
                events += scheduler.step()
            if lifetime is not None:
                cancelled.add(id)
                scheduler.cancel(id)
        events += run(scheduler)

    assert [event for event in events if isinstance(event, Failed)] == []
    done = [event for event in events if isinstance(event, PictureDone)]
    for event in done:
        np.testing.assert_array_equal(event.image, alone(event.request)[event.seed])
    for id, request in requests.items():
        count = sum(event.id == id for event in done)
        assert count == request.num_images or (id in cancelled and count < request.num_images)


@pytest.mark.parametrize("capturable", [True, False])
def test_previews_match_the_host(
    model: Model, on_host: Model, monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    requests = [Request("a <w>", seed=1, steps=7, previews=2), Request("a cat", seed=2, steps=5)]

    def previews(model: Model) -> dict[tuple[int, int], Any]:
        events = run(scheduler_for(model, requests))
        assert len(pictures(events)) == 2
        steps = [event for event in events if isinstance(event, StepDone)]
        return {(event.id, event.step): event.denoised for event in steps}

    expected, actual = previews(on_host), previews(model)
    assert actual.keys() == expected.keys()
    assert [key for key, denoised in actual.items() if denoised is not None] == [(0, 2), (0, 4), (0, 6)]
    for key, denoised in expected.items():
        if denoised is not None:
            np.testing.assert_array_equal(actual[key], denoised)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_nan_is_reported_with_its_step_and_stays_in_its_row(
    model: Model, monkeypatch: pytest.MonkeyPatch, alone: Any, capturable: bool, step: int
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    broken = Request("a <w>", seed=77, steps=5, sampler=Sampler.EULER_A)
    poison(monkeypatch, seed=77, step=step)
    scheduler = Scheduler(model, 2)
    bad, good = scheduler.add(broken), scheduler.add(POOL[5])
    later = scheduler.add(POOL[0])  # gets the slot of the broken row
    events = run(scheduler)

    [failure] = [event for event in events if isinstance(event, Failed)]
    assert failure.id == bad
    assert isinstance(failure.error, NotFinite)
    assert f"graph 'denoise_step' produced NaN or infinity at step {step} of picture 0" in str(failure.error)
    done = {event.id: event.image for event in events if isinstance(event, PictureDone)}
    assert done.keys() == {good, later}
    np.testing.assert_array_equal(done[good], alone(POOL[5])[7])
    np.testing.assert_array_equal(done[later], alone(POOL[0])[1])


def poison(monkeypatch: pytest.MonkeyPatch, seed: int, step: int) -> None:
    """Makes the noise of one picture NaN at one of its steps."""
    from oneword.runtime import scheduler as module

    class Poisoned(NoiseStream):
        draws = 0

        def take(self) -> Any:
            self.draws += 1
            noise = super().take()
            return np.full_like(noise, np.nan) if self.draws == step else noise

    class Generator(module.TorchGenerator):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.number = number

    def stream(generator: Any, shape: Any, draws: Any) -> NoiseStream:
        return (Poisoned if generator.number == seed else NoiseStream)(generator, shape, draws)

    monkeypatch.setattr(module, "TorchGenerator", Generator)
    monkeypatch.setattr(module, "NoiseStream", stream)


@pytest.mark.parametrize(("capturable", "at"), [(True, 1), (True, 2), (False, 1), (False, 5)])  # replayed from 3 on
def test_after_a_failed_step_the_rows_continue_with_their_state(
    model: Model, monkeypatch: pytest.MonkeyPatch, alone: Any, capturable: bool, at: int
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    requests = [POOL[0], POOL[3], POOL[5], POOL[6], POOL[9], POOL[10]]
    scheduler = scheduler_for(model, requests)
    steps, failed = 0, False
    enqueue = onnxruntime_cuda.CudaBinding.run

    def failing(binding: Any, stream: int | None = None) -> None:
        nonlocal steps, failed
        if "branch_row" in binding.inputs:
            steps += 1
            if steps >= at and not failed and len(scheduler.denoiser.rows) > 1:
                failed = True
                raise EngineError("out of memory")
        enqueue(binding, stream)

    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "run", failing)
    assert_same(pictures(run(scheduler)), {k: v for request in requests for k, v in alone(request).items()})
    assert failed


def test_a_ring_of_buffers_that_is_too_short_would_be_detected(
    model: Model, monkeypatch: pytest.MonkeyPatch, alone: Any
) -> None:
    """The simulation reads pinned memory late enough: one buffer for two queued steps changes the pictures."""
    start = Arena.__init__

    def short(arena: Arena, *args: Any) -> None:
        start(arena, *args)
        for ring in (arena._schedule, arena._noise, arena._finite):
            del ring[1:]

    monkeypatch.setattr(Arena, "__init__", short)
    actual, _ = generated(model, MIXED[0])

    assert (actual[1] != alone(MIXED[0])[1]).any()


def test_loading_a_word_transfers_only_its_rows_and_encoding_does_not_transfer_the_table(
    model: Model, cuda: Runtime
) -> None:
    generated(model, Request("a cat", steps=1))
    before = cuda.from_host
    model.load(Concept("<x>", {"text_encoder": np.full((3, 32), 0.3, np.float32)}))
    contexts = model.encode([model.tokenize("a cat"), model.tokenize("a <x>")])
    assert cuda.from_host - before < model._tables["text_encoder"].array.numpy().nbytes

    [table], concept = model._tables.values(), Concept("<y>", {"text_encoder": np.full((3, 32), 0.2, np.float32)})
    before = cuda.from_host
    table.place({concept.identity: concept.vectors["text_encoder"]})
    assert cuda.from_host - before == 3 * 32 * 4
    assert np.abs(contexts[0].hidden_states - contexts[1].hidden_states).max() > 0.01


def test_a_device_array_is_bound_in_place_and_checked(model: Model, cuda: Runtime) -> None:
    engine: Any = model.engine("vae_decoder")
    latents, images = gpu_stream().put(np.ones((1, 4, 8, 8), np.float32)), gpu_stream().empty((1, 64, 64, 3), "u1")
    binding = engine.bind({}, {"latents": latents}, {"images": images})

    assert binding.inputs["latents"] is latents
    assert binding.outputs["images"] is images
    binding.run()
    np.testing.assert_array_equal(images.numpy(), engine.run({"latents": latents.numpy()})["images"])
    with pytest.raises(FeedError, match=r"'latents' of vae_decoder is int64"):
        engine.bind({"images": (1, 64, 64, 3)}, {"latents": gpu_stream().put(np.ones((1, 4, 8, 8), np.int64))})


def test_regions_of_an_array_are_written_and_read(cuda: Runtime) -> None:
    array, host = gpu_stream().empty((3, 4, 2), "f4"), np.zeros((3, 4, 2), np.float32)
    regions = (..., 1.5), (1, np.arange(8).reshape(4, 2)), ((slice(None), 2), 7.0), ([0, 2], 3.0), ((2, 1), 9.0)
    for region, values in regions:
        array.write(region, values)
        host[region] = values
        np.testing.assert_array_equal(array.numpy(), host)
        np.testing.assert_array_equal(array.read(region), host[region])


@pytest.mark.parametrize("late", [False, True])
def test_host_memory_may_be_changed_after_it_was_written_to_an_array(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    runtime = Runtime(reads_pageable_memory=late)
    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    stream, host = CudaStream(Device()), np.array([1, 2])
    array = stream.put(host)
    host[:] = 9
    copied = stream.empty((2,), host.dtype)
    stream.copy(copied, array)
    for value in (5, 6):
        array.write(0, value)

    assert (copied.numpy().tolist(), array.numpy().tolist()) == ([1, 2], [6, 2])


def test_waiting_in_a_capture_is_an_error_and_the_stream_stays_usable(cuda: Runtime) -> None:
    stream = gpu_stream()
    with pytest.raises(EngineError, match="cudaStreamSynchronize failed on GPU 0: operation not permitted"):
        stream.capture(stream.wait)

    np.testing.assert_array_equal(stream.put(np.arange(3)).numpy(), [0, 1, 2])


def test_a_capture_that_there_is_no_memory_for_is_destroyed(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    destroyed: list[object] = []
    monkeypatch.setattr(cuda, "cudaGraphInstantiate", lambda graph, flags: (2, None))
    monkeypatch.setattr(cuda, "cudaGraphDestroy", lambda graph: (destroyed.append(graph), (0,))[1])
    stream = gpu_stream()
    first, second = stream.put(np.arange(3)), stream.put(np.zeros(3, int))

    with pytest.raises(EngineError, match="cudaGraphInstantiate failed on GPU 0"):
        stream.capture(lambda: stream.copy(second, first))

    assert len(destroyed) == 1
    stream.copy(second, first)
    np.testing.assert_array_equal(second.numpy(), [0, 1, 2])


def test_pinned_memory_is_read_and_written_when_the_copy_is_done(cuda: Runtime) -> None:
    stream = gpu_stream()
    source, target = stream.pinned((3,), np.float32), stream.pinned((3,), np.float32)
    assert source.tolist() == target.tolist() == [0, 0, 0]
    array = stream.empty((3,), np.float32)
    source[:] = 1
    stream.upload(array, source)
    source[:] = 2  # too early: the queued copy has not read it yet
    stream.download(target, array)
    event = stream.record()
    assert target.tolist() == [0, 0, 0]
    event.wait()

    assert target.tolist() == [2, 2, 2]


def test_an_event_waits_for_the_work_queued_before_it_and_no_more(cuda: Runtime) -> None:
    stream = gpu_stream()
    first, second = stream.pinned((1,), np.int64), stream.pinned((1,), np.int64)
    stream.download(first, stream.put(np.array([3])))
    event = stream.record()
    source = stream.put(np.array([4]))
    stream.download(second, source)
    event.wait()
    assert (first.tolist(), second.tolist()) == ([3], [0])
    stream.record().wait()
    assert second.tolist() == [4]


def test_a_replayed_capture_reads_the_current_content_of_pinned_memory(cuda: Runtime) -> None:
    stream = gpu_stream()
    source, array = stream.pinned((2,), np.float32), stream.empty((2,), np.float32)
    replay = stream.capture(lambda: stream.upload(array, source))
    for value in (5, 6):
        source[:] = value
        replay()
        np.testing.assert_array_equal(array.numpy(), [value, value])


def test_memory_freed_under_queued_work_is_detected(cuda: Runtime) -> None:
    _, pointer = cuda.cudaMalloc(8)
    cuda.cudaMemsetAsync(pointer, 0, 8, 1)
    cuda.cudaFree(pointer)
    cuda.wait()
    assert cuda.violations == [
        "8 bytes were freed while queued work uses them",
        "queued work used 8 bytes that were freed or never allocated",
    ]
    cuda.violations.clear()


@pytest.mark.parametrize("kind", ["empty", "pinned"])
def test_arrays_are_freed_after_the_work_that_uses_them(cuda: Runtime, kind: str) -> None:
    stream = gpu_stream()
    target = stream.empty((4,), np.float32)
    source: Any = getattr(stream, kind)((4,), np.float32)
    if kind == "empty":
        stream.copy(target, source)
    else:
        source[:] = 3
        stream.upload(target, source)
    del source

    np.testing.assert_array_equal(target.numpy(), [0 if kind == "empty" else 3] * 4)
    assert cuda.violations == []
