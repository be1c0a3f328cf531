"""CUDA and TensorRT, as far as they can be tested without a GPU; tests that need a GPU are marked."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from oneword.engines.builder import Flavour
from oneword.engines.cuda import CudaStream, Device, contiguous_part
from oneword.engines.engine import Engine
from oneword.engines.errors import EngineError, FeedError, MissingPackage, OnewordError, UsageError
from oneword.engines.graph import Graph
from oneword.engines.open import Backend, EngineOptions, gpu_stream, open_engine
from oneword.engines.plans import PlanCache, PlanKey
from oneword.engines.tensorrt import TensorRtEngine, fitting_plans, narrowest, widest
from oneword.runtime.bundle import PLANS, Bundle
from oneword.runtime.profiles import DEFAULT_LIMITS, graph_ranges
from tests.simulated_cuda import Runtime

GPU_BACKENDS = (Backend.CUDA, Backend.TENSORRT, Backend.TENSORRT_RTX)


def opened(path: Path, name: str, backend: Backend) -> Engine:
    bundle = Bundle.open(path)
    ranges = graph_ranges(bundle.manifest, name, DEFAULT_LIMITS)
    return open_engine(backend, name, bundle.graph(name), path, EngineOptions(plans=path / PLANS, ranges=ranges))


def has_gpu() -> bool:
    try:
        gpu_stream()
    except OnewordError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_without_a_driver_the_error_says_what_to_install(tiny_bundle: Path, backend: Backend) -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(
        EngineError, match=r"an NVIDIA driver for CUDA 13 or newer is needed and there is none"
    ) as caught:
        opened(tiny_bundle, "denoise_step", backend)
    assert "\n" not in str(caught.value)


def test_a_driver_of_an_older_major_version_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    monkeypatch.setattr(runtime, "cudaRuntimeGetVersion", lambda: (0, 13020))
    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (0, 12080))
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (35, 0))

    with pytest.raises(EngineError, match=r"for CUDA 13 or newer is needed and this one supports CUDA 12\.8: "):
        Device()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_without_cuda_python_the_error_gives_the_pip_command(
    tiny_bundle: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu_stream.cache_clear()
    with pytest.raises(MissingPackage, match=r"cuda-python is not installed: in a checkout .* -e '\.\[cuda\]'"):
        opened(tiny_bundle, "denoise_step", backend)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_ti_run_without_a_gpu_fails_with_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
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
def test_a_region_is_one_transfer_if_its_memory_is_contiguous(region: object, contiguous: bool) -> None:
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


def planned(bundle: Bundle, target: str, name: str = "denoise_step", **ranges: tuple[int, int, int]) -> PlanKey:
    """Stores a plan of a graph in the bundle's cache; these tests never open its bytes."""
    graph = bundle.graph(name)
    key = PlanKey(graph.digest, "tensorrt-rtx", "1.7", target, graph.precision, ranges)
    PlanCache(bundle.path / PLANS / f"tensorrt-rtx-1.7-{target.replace(',', '+')}").load_or_build(key, lambda: b"plan")
    return key


def test_plans_are_found_by_graph_version_and_gpu(own_bundle: Bundle) -> None:
    plans, plan_key = own_bundle.path / PLANS, planned(own_bundle, "sm89,sm120", B=(1, 1, 4))
    graph = own_bundle.graph("denoise_step")
    for target in ("sm89", "sm120"):
        assert [key for _, key in fitting_plans(plans, graph, Flavour.RTX, "1.7", target)] == [plan_key]
    assert fitting_plans(plans, graph, Flavour.RTX, "1.7", "sm86") == []  # a plan can be built
    assert fitting_plans(plans, graph, Flavour.RTX, "1.8", "sm89") == []  # of another version
    assert fitting_plans(plans, own_bundle.graph("vae_decoder"), Flavour.RTX, "1.7", "sm89") == []


def test_a_gpu_without_a_plan_for_which_none_can_be_built_is_named_in_the_error(own_bundle: Bundle) -> None:
    planned(own_bundle, "sm89", B=(1, 1, 4))
    with pytest.raises(
        UsageError, match=r"this GPU is sm90, tensorrt-rtx builds for sm75.*there are plans for sm89\).*tensorrt$"
    ):
        fitting_plans(own_bundle.path / PLANS, own_bundle.graph("denoise_step"), Flavour.RTX, "1.7", "sm90")


def test_the_narrowest_plan_that_fits_is_chosen(own_bundle: Bundle) -> None:
    wide = planned(own_bundle, "sm89", B=(1, 1, 4), h=(1, 8, 16))
    static = planned(own_bundle, "sm89", B=(1, 1, 1), h=(8, 8, 8))
    graph = own_bundle.graph("denoise_step")
    plans = fitting_plans(own_bundle.path / PLANS, graph, Flavour.RTX, "1.7", "sm89")
    assert narrowest("denoise_step", plans, {"B": 1, "h": 8})[1] == static
    assert narrowest("denoise_step", plans, {"B": 2, "h": 8})[1] == wide
    with pytest.raises(FeedError, match=r"given h = 17, its plan takes .*ti-export --max-batch, --max-size"):
        narrowest("denoise_step", plans, {"B": 1, "h": 17})


def test_the_widest_sizes_are_the_largest_of_all_plans() -> None:
    wide, static = {"B": (1, 1, 4), "h": (1, 8, 16)}, {"B": (1, 1, 1), "h": (32, 32, 32), "T": (77, 77, 77)}
    assert widest([wide, static]) == {"B": 4, "h": 32, "T": 77}
    assert widest([]) == {}


class Plan:
    """A deserialized plan and its execution context: records its calls and infers the shapes passed to it."""

    device_memory_size_v2 = 512

    def __init__(self, graph: Graph, shapes: dict[str, tuple[int, ...]]) -> None:
        self.names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        self.num_io_tensors, self.shapes = len(self.names), shapes
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.activations: list[tuple[int, int]] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, strategy: str) -> "Plan":
        assert strategy == "user managed"
        return self

    def set_device_memory(self, address: int, size: int) -> None:
        self.activations.append((address, size))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name, (-1,))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        return True


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaStream]:
    runtime = Runtime()
    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    yield CudaStream(Device())
    assert runtime.violations == []


@pytest.fixture
def decoder(own_bundle: Bundle, simulated: CudaStream, monkeypatch: pytest.MonkeyPatch) -> TensorRtEngine:
    """The decoder, with a plan for up to four pictures of up to 16 x 16 latents and a static one of 4 x 4."""
    planned(own_bundle, "sm89", "vae_decoder", B=(1, 1, 4), h=(1, 8, 16), w=(1, 8, 16))
    planned(own_bundle, "sm89", "vae_decoder", B=(1, 1, 1), h=(4, 4, 4), w=(4, 4, 4))
    monkeypatch.setattr("oneword.engines.tensorrt.installed_version", lambda flavour: "1.7")
    library = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"))
    monkeypatch.setattr("oneword.engines.tensorrt._library", lambda flavour: library)
    graph, folder = own_bundle.graph("vae_decoder"), own_bundle.path
    return TensorRtEngine("vae_decoder", graph, folder, Flavour.RTX, simulated, folder / PLANS, ())


def test_the_limits_of_tensorrt_are_those_of_its_plans(decoder: TensorRtEngine) -> None:
    assert decoder.limits == {"B": 4, "h": 16, "w": 16}
    with pytest.raises(FeedError, match=r"vae_decoder was given B = 5, its plan takes 1 to 4: build it with ti-export"):
        decoder.bind({"latents": (5, 4, 8, 8), "images": (5, 64, 64, 3)})


def test_tensorrt_binds_given_device_arrays_in_place(
    decoder: TensorRtEngine, simulated: CudaStream, monkeypatch: pytest.MonkeyPatch, own_bundle: Bundle
) -> None:
    plan = Plan(own_bundle.graph("vae_decoder"), {"images": (2, 64, 64, 3), "finite": (2,)})
    library = SimpleNamespace(deserialize_cuda_engine=lambda data: plan)
    monkeypatch.setattr("oneword.engines.tensorrt._runtime", lambda flavour: library)
    latents, images = simulated.put(np.zeros((2, 4, 8, 8), np.float32)), simulated.empty((2, 64, 64, 3), np.uint8)
    binding = decoder.bind({}, {"latents": latents}, {"images": images})

    assert plan.addresses["latents"] == latents.pointer
    assert plan.addresses["images"] == images.pointer
    assert binding.outputs["finite"].shape == (2,)  # inferred by the plan
    binding.run()
    binding.run(simulated.handle)
    with pytest.raises(EngineError, match="graph 'vae_decoder' was opened for another stream"):
        binding.run(7)
    assert plan.streams == [simulated.handle] * 2
    assert not binding.capturable  # TensorRT-RTX; TensorRT's runs are captured
    with pytest.raises(FeedError, match="'images' of vae_decoder has shape 1x64x64x3"):
        decoder.bind({}, {"latents": latents}, {"images": simulated.empty((1, 64, 64, 3), np.uint8)})


def test_the_bindings_of_a_plan_share_the_memory_of_its_activations(
    decoder: TensorRtEngine, monkeypatch: pytest.MonkeyPatch, own_bundle: Bundle
) -> None:
    plan = Plan(own_bundle.graph("vae_decoder"), {"images": (2, 64, 64, 3), "finite": (2,)})
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: plan)
    monkeypatch.setattr("oneword.engines.tensorrt._runtime", lambda flavour: runtime)
    for _ in range(2):
        decoder.bind({}, {"latents": np.zeros((2, 4, 8, 8), np.float32)})

    first, second = plan.activations
    assert first == second
    assert first[1] == plan.device_memory_size_v2


def test_a_context_is_destroyed_after_the_work_that_uses_it(
    decoder: TensorRtEngine, simulated: CudaStream, monkeypatch: pytest.MonkeyPatch, own_bundle: Bundle
) -> None:
    log: list[str] = []

    class Context(Plan):
        def execute_async_v3(self, stream: int) -> bool:
            simulated.device.runtime.queue(lambda: log.append("run"))
            return True

        def __del__(self) -> None:
            log.append("destroyed")

    shapes = {"images": (1, 64, 64, 3), "finite": (1,)}
    plan_graph = own_bundle.graph("vae_decoder")
    plan = Plan(plan_graph, {})
    monkeypatch.setattr(plan, "create_execution_context", lambda strategy: Context(plan_graph, shapes))
    library = SimpleNamespace(deserialize_cuda_engine=lambda data: plan)
    monkeypatch.setattr("oneword.engines.tensorrt._runtime", lambda flavour: library)
    latents = simulated.put(np.zeros((1, 4, 8, 8), np.float32))
    outputs = {"images": simulated.empty(shapes["images"], np.uint8), "finite": simulated.empty((1,), np.bool_)}
    binding = decoder.bind({}, {"latents": latents}, outputs)
    binding.run()
    del binding

    assert log == ["run", "destroyed"]


def test_without_a_plan_or_sizes_to_build_one_the_error_says_how_to_build_it(
    own_bundle: Bundle, simulated: CudaStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.tensorrt.installed_version", lambda flavour: "1.7")
    graph, plans = own_bundle.graph("vae_decoder"), own_bundle.path / PLANS
    message = r"no plan of graph 'vae_decoder' for sm89: build it with ti-export --plans"
    with pytest.raises(EngineError, match=message):
        TensorRtEngine("vae_decoder", graph, own_bundle.path, Flavour.RTX, simulated, plans, ())


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("plans"))
    return Bundle.open(tmp_path / "bundle")


@pytest.mark.gpu
def test_arrays_on_the_gpu_are_written_and_read_by_region() -> None:
    stream = gpu_stream()
    array, host = stream.empty((3, 4, 2), "f4"), np.zeros((3, 4, 2), np.float32)
    for region, values in ((..., 1.5), (1, np.arange(8).reshape(4, 2)), ((slice(None), 2), 7.0), ([0, 2], 3.0)):
        array.write(region, values)
        host[region] = values
        np.testing.assert_array_equal(array.numpy(), host)
    assert stream.device.memory()[0] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("graph", ["text_encoder", "vae_encoder", "vae_decoder", "denoise_step"])
def test_every_graph_on_the_gpu_matches_pytorch(
    tiny_model_dir: Path, tiny_bundle: Path, backend: Backend, graph: str
) -> None:
    from oneword.export.families import family_of
    from oneword.export.parity import references
    from oneword.export.source import load_source

    pytest.importorskip({"onnxruntime-cuda": "onnxruntime"}.get(backend, backend.replace("-", "_")))
    engine = opened(tiny_bundle, graph, backend)
    (traceable,) = [item for item in family_of(load_source(tiny_model_dir)).graphs if item.name == graph]
    for case in references(traceable, [{"B": 1, "N": 2, "M": 2, "T": 20, "h": 8, "w": 8}]):
        for name, value in engine.run(case.feeds).items():
            np.testing.assert_allclose(value, case.outputs[name], rtol=0, atol=2e-3 if value.dtype == "f4" else 1)
