"""The loop over a denoiser's steps, on the host against the same steps made one by one."""

from pathlib import Path

import numpy as np
import pytest

from oneword.engines.bundle import Bundle
from oneword.engines.engine import Engine, NumpyArray
from oneword.engines.loop import HostQueue, Loop
from oneword.engines.open import Backend, open_engine

STEPS, ROWS = 5, 2


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(Bundle.open(tiny_bundle), "denoise_step", threads=1)


def feeds() -> dict[str, NumpyArray]:
    """Two guided rows with contexts of their own, the second half masked."""
    random = np.random.default_rng(0)
    latents = {n: random.standard_normal((ROWS, 4, 8, 8), np.float32) for n in ("sample", "known", "known_noise")}
    return {
        **latents,
        "previous": np.zeros((ROWS, 4, 8, 8), np.float32),
        "noise": np.zeros((ROWS, 4, 8, 8), np.float32),
        "mask": np.stack([np.ones((1, 8, 8)), np.tri(8)[None]]).astype(np.float32),
        "branch_row": np.array([0, 0, 1, 1]),
        "branch_context": np.array([0, 1, 0, 2]),
        "uncond_branch": np.array([0, 2]),
        "cond_branch": np.array([1, 3]),
        "context": random.standard_normal((3, 20, 32), np.float32),
    }


def tables() -> tuple[NumpyArray, NumpyArray]:
    """A schedule that uses every column, and noise for each step."""
    random = np.random.default_rng(1)
    schedule = random.uniform(0.1, 0.6, (STEPS, ROWS, 11)).astype(np.float32)
    schedule[:, :, 0] = np.linspace(900, 100, STEPS)[:, None]
    return schedule, random.standard_normal((STEPS, ROWS, 4, 8, 8), np.float32)


def one_by_one(engine: Engine) -> tuple[NumpyArray, NumpyArray]:
    given = feeds()
    for row, noise in zip(*tables(), strict=True):
        out = engine.run({**given, "schedule": row, "noise": noise})
        given["sample"], given["previous"] = out["next_sample"], out["denoised"]
    return given["sample"], given["previous"]


def looped(engine: Engine, schedule: NumpyArray, noise: NumpyArray | None) -> Loop:
    given = feeds()
    binding = engine.bind({**{name: value.shape for name, value in given.items()}, "schedule": (ROWS, 11)})
    for name, value in given.items():
        binding.inputs[name].write(..., value)
    loop = Loop(binding, getattr(engine, "queue", None) or HostQueue())
    loop.begin(schedule, noise)
    return loop


def test_steps_of_the_loop_are_the_engine_s_own(engine: Engine) -> None:
    loop = looped(engine, *tables())
    for _ in range(STEPS):
        loop.step()
    sample, denoised = one_by_one(engine)
    np.testing.assert_array_equal(loop.sample, sample)
    np.testing.assert_array_equal(loop.denoised, denoised)


@pytest.mark.parametrize("listened", [0, 1, 3, STEPS])
def test_what_is_left_can_be_done_in_one_piece(engine: Engine, listened: int) -> None:
    loop = looped(engine, *tables())
    for _ in range(listened):
        loop.step()
    loop.finish()
    np.testing.assert_array_equal(loop.sample, one_by_one(engine)[0])
    assert loop.done == STEPS


def test_every_row_of_every_step_is_known_to_be_finite_or_not(engine: Engine) -> None:
    schedule, noise = tables()
    noise[2, 1, 0, 0, 0] = np.nan
    loop = looped(engine, schedule, noise)
    loop.step()
    loop.step()
    assert loop.finite.tolist() == [[True, True]] * 2
    loop.finish()
    assert loop.finite.tolist() == [[True, True]] * 2 + [[True, False]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [Backend.CUDA, Backend.TENSORRT, Backend.TENSORRT_RTX])
def test_the_captured_loop_is_the_host_s(tiny_bundle: Path, engine: Engine, backend: Backend) -> None:
    pytest.importorskip({"onnxruntime-cuda": "onnxruntime"}.get(backend, backend.replace("-", "_")))
    on_gpu = open_engine(Bundle.open(tiny_bundle), "denoise_step", backend)
    stepped, whole = looped(on_gpu, *tables()), looped(on_gpu, *tables())
    for _ in range(STEPS):
        stepped.step()
    whole.finish()
    np.testing.assert_array_equal(stepped.sample, whole.sample)
    np.testing.assert_allclose(whole.sample, one_by_one(engine)[0], rtol=0, atol=2e-3)
