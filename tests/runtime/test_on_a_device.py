"""Pictures made with everything in a device's memory, on a simulated CUDA: nothing waits, and nothing is other than on
the host. What runs on a real GPU is marked `gpu`, in tests/engines.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneword.engines import onnxruntime_cuda
from oneword.engines.errors import EngineError, FeedError
from oneword.engines.onnxruntime import open_session
from oneword.engines.open import Backend, gpu_queue
from oneword.runtime.batch import Failed, PictureDone, StepDone
from oneword.runtime.concept import Concept
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.samplers import Sampler
from tests.simulated_cuda import Runtime, Session

ort = pytest.importorskip("onnxruntime")

WORD = Concept("<w>", {"text_encoder": np.random.default_rng(0).normal(0, 0.5, (2, 32)).astype(np.float32)})
MIXED = [
    Request("a <w>", seed=1, steps=5, sampler=Sampler.EULER_A),
    Request("a cat", seed=2, steps=3, guidance_scale=1.0, num_images=2),
    Request("a <w> and a dog", seed=4, steps=20, sampler=Sampler.LCM),
    Request("a <w>", seed=5, steps=6, guidance_interval=(0.5, 5.0)),
    Request("a boat", seed=6, steps=3, size=(64, 32)),
]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()

    def on_the_cpu(name: str, path: Path, inputs: Any, providers: Any) -> Session:
        return Session(open_session(name, path, inputs, ["CPUExecutionProvider"], threads=1), runtime)

    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    monkeypatch.setattr(onnxruntime_cuda, "open_session", on_the_cpu)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnxruntime_cuda.PROVIDER])
    gpu_queue.cache_clear()
    yield runtime
    gpu_queue.cache_clear()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TensorRT, whose runs can be captured."""
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", True)


@pytest.fixture
def model(tiny_bundle: Path, cuda: Runtime) -> Model:
    model = Model.open(tiny_bundle, Backend.CUDA)
    model.load(WORD)
    return model


@pytest.fixture(scope="module")
def on_host(tiny_bundle: Path) -> Model:
    model = Model.open(tiny_bundle, threads=1)
    model.load(WORD)
    return model


def made(model: Model, requests: Sequence[Request], listen: bool) -> dict[int, Image]:
    events = list(generate(model, requests, listen=listen))
    assert not [event.error for event in events if isinstance(event, Failed)]
    assert listen == any(isinstance(event, StepDone) for event in events)
    return {event.seed: event.image for event in events if isinstance(event, PictureDone)}


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
def test_pictures_are_the_host_s_to_the_bit(
    model: Model, on_host: Model, cuda: Runtime, monkeypatch: pytest.MonkeyPatch, listen: bool, capturable: bool
) -> None:
    monkeypatch.setattr(onnxruntime_cuda.CudaBinding, "capturable", capturable)
    here = made(on_host, MIXED, listen)
    for _ in range(2):
        there = made(model, MIXED, listen)
        assert len(there) == 6
        for seed, image in here.items():
            np.testing.assert_array_equal(there[seed], image)

    assert (cuda.captures > 0) == capturable


@pytest.mark.usefixtures("captured")
def test_nothing_waits_between_steps_where_nobody_listens_and_all_are_one_piece(model: Model, cuda: Runtime) -> None:
    made(model, [Request("a <w>", steps=3)], listen=False)  # the first calls are not captured
    waits = {}
    for steps in (4, 40):
        before = cuda.captures, cuda.launches
        made(model, [Request("a <w>", steps=steps)], listen=False)
        assert (cuda.captures - before[0], cuda.launches - before[1]) == (1, 1)
        before, waits[steps] = (cuda.captures, cuda.launches), cuda.waits
        made(model, [Request("a <w>", steps=steps, seed=1)], listen=False)
        assert (cuda.captures - before[0], cuda.launches - before[1]) == (0, 1)
        waits[steps] = cuda.waits - waits[steps]

    assert waits[4] == waits[40]


def test_nothing_waits_between_steps_that_cannot_be_captured(model: Model, cuda: Runtime) -> None:
    waits = {}
    for steps in (4, 40):
        before = cuda.waits
        made(model, [Request("a <w>", steps=steps)], listen=False)
        waits[steps] = cuda.waits - before

    assert cuda.captures == 0
    assert waits[4] >= waits[40]  # the first encodes the empty prompt too


@pytest.mark.usefixtures("captured")
def test_a_step_is_captured_once_for_all_pictures_of_its_sizes(model: Model, cuda: Runtime) -> None:
    for seed in range(3):
        made(model, [Request("a <w>", steps=5, seed=seed)], listen=True)

    assert cuda.captures == 1
    assert cuda.launches == 3 * 5 - 2


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("listen", [True, False])
def test_pictures_come_where_the_engine_refuses_to_be_captured(
    model: Model, on_host: Model, cuda: Runtime, monkeypatch: pytest.MonkeyPatch, listen: bool
) -> None:
    run = Session.run_with_iobinding

    def waiting(session: Session, binding: Any, options: Any) -> None:
        if cuda.wait():
            raise RuntimeError("a kernel wanted to wait")
        run(session, binding, options)

    monkeypatch.setattr(Session, "run_with_iobinding", waiting)
    for _ in range(2):
        there = made(model, MIXED, listen)
    for seed, image in made(on_host, MIXED, listen).items():
        np.testing.assert_array_equal(there[seed], image)
    assert cuda.captures == 0


def test_a_word_is_its_rows_on_the_device_and_a_prompt_does_not_carry_the_table(model: Model, cuda: Runtime) -> None:
    made(model, [Request("a cat", steps=1)], listen=False)
    before = cuda.from_host
    model.load(Concept("<x>", {"text_encoder": np.full((3, 32), 0.3, np.float32)}))
    assert cuda.from_host - before == 3 * 32 * 4

    before = cuda.from_host
    known = model.encode([model.tokenize("a cat"), model.tokenize("a <x>")])
    assert cuda.from_host - before < model._tables["text_encoder"].array.numpy().nbytes
    assert np.abs(known[0].hidden_states - known[1].hidden_states).max() > 0.01


def test_an_array_of_the_device_is_bound_as_it_lies_and_checked(model: Model, cuda: Runtime) -> None:
    engine: Any = model.engine("vae_decoder")
    latents = engine.queue.put(np.ones((1, 4, 8, 8), np.float32))
    binding = engine.bind({"images": (1, 64, 64, 3)}, {"latents": latents})

    assert binding.inputs["latents"] is latents
    with pytest.raises(FeedError, match=r"'latents' of vae_decoder is int64"):
        engine.bind({"images": (1, 64, 64, 3)}, {"latents": engine.queue.put(np.ones((1, 4, 8, 8), np.int64))})


def test_regions_of_an_array_are_written_and_read(cuda: Runtime) -> None:
    array, host = gpu_queue().empty((3, 4, 2), "f4"), np.zeros((3, 4, 2), np.float32)
    for region, values in ((..., 1.5), (1, np.arange(8).reshape(4, 2)), ((slice(None), 2), 7.0), ([0, 2], 3.0)):
        array.write(region, values)
        host[region] = values
        np.testing.assert_array_equal(array.numpy(), host)


def test_waiting_in_a_capture_is_an_error_and_the_stream_goes_on(cuda: Runtime) -> None:
    queue = gpu_queue()
    with pytest.raises(EngineError, match="cudaStreamSynchronize failed on GPU 0: operation not permitted"):
        queue.capture(queue.wait)

    np.testing.assert_array_equal(queue.put(np.arange(3)).numpy(), [0, 1, 2])
