"""What of CUDA and TensorRT can be held without a GPU; what needs one is marked."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oneword.engines.builder import Flavour
from oneword.engines.cuda import _alive, contiguous_part, dlpack_capsule
from oneword.engines.engine import NumpyArray
from oneword.engines.errors import EngineError, FeedError, MissingPackage, OnewordError, UsageError
from oneword.engines.open import Backend, gpu_queue, open_engine
from oneword.engines.plans import PlanCache, PlanKey
from oneword.engines.tensorrt import fitting_plans, narrowest
from oneword.runtime.bundle import PLANS, Bundle

GPU_BACKENDS = (Backend.CUDA, Backend.TENSORRT, Backend.TENSORRT_RTX)


def gpu_is_here() -> bool:
    try:
        gpu_queue()
    except OnewordError:
        return False
    return True


@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_without_a_driver_the_error_says_what_to_install(tiny_bundle: Path, backend: Backend) -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(EngineError, match=r"an NVIDIA driver for CUDA [\d.]+ is needed and there is none") as caught:
        open_engine(Bundle.open(tiny_bundle), "denoise_step", backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_without_cuda_python_the_error_is_the_line_that_installs_it(
    tiny_bundle: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu_queue.cache_clear()
    with pytest.raises(MissingPackage, match=r"cuda-python is not installed: pip install 'oneword\[cuda\]'"):
        open_engine(Bundle.open(tiny_bundle), "denoise_step", backend)


@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU")
def test_ti_run_without_a_gpu_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "oneword.runtime.cli", tiny_bundle, "a cat", "--engine", "tensorrt-rtx"]
    run = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert "driver" in run.stderr or "cuda-python" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("region", "contiguous"),
    [
        (..., True),
        (1, True),
        (-1, True),
        ((1, 2), True),
        (slice(1, 3), True),
        ((0, slice(1, 3)), True),
        ((slice(None), 1), False),
        ((..., 0), False),
        ([0, 2], False),
        (np.array([True, False, True]), False),
    ],
)
def test_a_region_is_one_transfer_where_its_memory_is_one_piece(region: object, contiguous: bool) -> None:
    host = np.arange(24.0).reshape(3, 4, 2)
    part = contiguous_part(host, region)
    assert (part is not None) == contiguous
    if part is not None:
        np.testing.assert_array_equal(part, host[region])  # type: ignore[index]
        assert np.shares_memory(part, host)


def test_a_single_number_of_a_vector_is_a_region_too() -> None:
    host = np.arange(3)
    part = contiguous_part(host, 1)
    assert part is not None
    part[...] = 7
    assert host.tolist() == [0, 7, 2]


class OnTheHost:
    """What a device array does, with the host's memory."""

    def __init__(self, values: NumpyArray) -> None:
        self.values = values

    def __dlpack__(self, **_: object) -> object:
        return dlpack_capsule(self, self.values.ctypes.data, self.values.shape, self.values.dtype, (1, 0))

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
def test_a_dlpack_capsule_is_the_same_memory_and_keeps_it_alive_until_its_reader_lets_go(dtype: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    before = len(_alive)
    seen = np.from_dlpack(OnTheHost(values))  # type: ignore[arg-type]
    np.testing.assert_array_equal(seen, values)
    assert seen.dtype == values.dtype
    assert np.shares_memory(seen, values)
    assert len(_alive) == before + 1
    del seen
    gc.collect()
    assert len(_alive) == before


def planned(bundle: Bundle, target: str, **ranges: tuple[int, int, int]) -> PlanKey:
    """A plan of the denoiser in the bundle's cache: its bytes are never opened here."""
    graph = bundle.graph("denoise_step")
    key = PlanKey(graph.digest, "tensorrt-rtx", "1.7", target, graph.precision, ranges)
    PlanCache(bundle.path / PLANS / f"tensorrt-rtx-1.7-{target.replace(',', '+')}").load_or_build(key, lambda: b"plan")
    return key


def test_plans_are_found_by_graph_version_and_gpu(own_bundle: Bundle) -> None:
    both = planned(own_bundle, "sm89,sm120", B=(1, 1, 4))
    graph = own_bundle.graph("denoise_step")
    for target in ("sm89", "sm120"):
        assert [key for _, key in fitting_plans(own_bundle, graph, Flavour.RTX, "1.7", target)] == [both]
    assert fitting_plans(own_bundle, graph, Flavour.RTX, "1.7", "sm86") == []  # it can be built
    assert fitting_plans(own_bundle, graph, Flavour.RTX, "1.8", "sm89") == []  # of another version
    assert fitting_plans(own_bundle, own_bundle.graph("vae_decoder"), Flavour.RTX, "1.7", "sm89") == []


def test_a_gpu_that_no_plan_fits_and_none_can_be_made_for_is_named(own_bundle: Bundle) -> None:
    planned(own_bundle, "sm89", B=(1, 1, 4))
    with pytest.raises(
        UsageError, match=r"this GPU is sm90, tensorrt-rtx builds for sm75.*the bundle has plans for sm89\).*tensorrt$"
    ):
        fitting_plans(own_bundle, own_bundle.graph("denoise_step"), Flavour.RTX, "1.7", "sm90")


def test_the_narrowest_plan_that_fits_is_taken(own_bundle: Bundle) -> None:
    wide = planned(own_bundle, "sm89", B=(1, 1, 4), h=(1, 8, 16))
    static = planned(own_bundle, "sm89", B=(1, 1, 1), h=(8, 8, 8))
    plans = fitting_plans(own_bundle, own_bundle.graph("denoise_step"), Flavour.RTX, "1.7", "sm89")
    assert narrowest("denoise_step", plans, {"B": 1, "h": 8})[1] == static
    assert narrowest("denoise_step", plans, {"B": 2, "h": 8})[1] == wide
    with pytest.raises(FeedError, match=r"given h = 17, its plan takes .*ti-export --max-batch, --max-size"):
        narrowest("denoise_step", plans, {"B": 1, "h": 17})


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("plans"))
    return Bundle.open(tmp_path / "bundle")


@pytest.mark.gpu
def test_arrays_on_the_gpu_are_written_and_read_by_region() -> None:
    queue = gpu_queue()
    array, host = queue.empty((3, 4, 2), "f4"), np.zeros((3, 4, 2), np.float32)
    for region, values in ((..., 1.5), (1, np.arange(8).reshape(4, 2)), ((slice(None), 2), 7.0), ([0, 2], 3.0)):
        array.write(region, values)
        host[region] = values
        np.testing.assert_array_equal(array.numpy(), host)
    assert queue.device.memory()[0] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("graph", ["text_encoder", "vae_encoder", "vae_decoder", "denoise_step"])
def test_every_graph_on_the_gpu_is_that_of_pytorch(
    tiny_model_dir: Path, tiny_bundle: Path, backend: Backend, graph: str
) -> None:
    from oneword.export.families import family_of
    from oneword.export.parity import references
    from oneword.export.source import load_source

    pytest.importorskip({"onnxruntime-cuda": "onnxruntime"}.get(backend, backend.replace("-", "_")))
    engine = open_engine(Bundle.open(tiny_bundle), graph, backend)
    (traceable,) = [each for each in family_of(load_source(tiny_model_dir)).graphs if each.name == graph]
    for case in references(traceable, [{"B": 1, "N": 2, "M": 2, "T": 20, "h": 8, "w": 8}]):
        for name, value in engine.run(case.feeds).items():
            np.testing.assert_allclose(value, case.outputs[name], rtol=0, atol=2e-3 if value.dtype == "f4" else 1)
