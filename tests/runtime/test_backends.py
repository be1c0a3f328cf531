"""The backend that `auto` chooses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oneword.engines import onnxruntime_cuda
from oneword.engines.errors import EngineError, UsageError
from oneword.engines.graph import Precision
from oneword.engines.onnxruntime import open_session
from oneword.engines.open import Backend, gpu_stream
from oneword.engines.plans import PlanCache, PlanKey
from oneword.runtime import backends
from oneword.runtime.backends import _has_plans, choose_backend
from oneword.runtime.bundle import Bundle
from tests.simulated_cuda import Runtime


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle with an empty plans folder."""
    opened = Bundle.open(tiny_bundle)
    return Bundle(tmp_path, opened.manifest)


def test_a_named_backend_is_used_and_an_unknown_one_is_refused(bundle: Bundle) -> None:
    assert choose_backend(bundle, "onnxruntime") == (Backend.ONNXRUNTIME, "")
    with pytest.raises(UsageError, match="no backend is called 'abacus': choose one of auto, onnxruntime"):
        choose_backend(bundle, "abacus")


def test_the_fastest_backend_without_an_obstacle_is_chosen_and_the_obstacles_are_reported(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacles = {Backend.TENSORRT: "not installed", Backend.TENSORRT_RTX: "no GPU", Backend.CUDA: "no GPU"}
    monkeypatch.setattr(backends, "_obstacles", lambda bundle, backend: iter(filter(None, [obstacles.get(backend)])))
    backend, reason = choose_backend(bundle)

    assert backend is Backend.OPENVINO
    assert reason.startswith("openvino is used; not tensorrt: not installed; not tensorrt-rtx: no GPU")

    obstacles |= {Backend.OPENVINO: "not installed", Backend.ONNXRUNTIME: "broken"}
    with pytest.raises(EngineError, match="no backend can run this bundle here: not tensorrt: not installed"):
        choose_backend(bundle)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated GPU, and ONNX Runtime as a build with CUDA whose libraries are not installed."""
    library = pytest.importorskip("onnxruntime")
    runtime = Runtime()
    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    monkeypatch.setattr(library, "get_available_providers", lambda: [onnxruntime_cuda.PROVIDER])
    monkeypatch.setattr(library, "preload_dlls", lambda: print("Failed to load libcublas.so.13"))
    gpu_stream.cache_clear()
    yield library
    gpu_stream.cache_clear()
    assert runtime.violations == []


@pytest.mark.usefixtures("cuda")
@pytest.mark.filterwarnings("ignore:Specified provider")  # this build has no CUDA
def test_without_the_libraries_of_cuda_the_cpu_is_used_and_nothing_is_printed(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, reason = choose_backend(bundle)

    assert not backend.on_gpu
    assert "not onnxruntime-cuda: ONNX Runtime cannot load CUDAExecutionProvider" in reason
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("cuda")
def test_with_the_libraries_of_cuda_the_gpu_is_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def on_the_cpu(name: str, path: Path, providers: Any) -> Any:
        opened.append(name)
        return open_session(name, path, ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime_cuda, "open_session", on_the_cpu)

    assert choose_backend(bundle)[0] is Backend.CUDA
    assert opened == ["identity"]


def test_only_plans_of_this_library_version_gpu_and_graph_count(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oneword.engines import builder

    monkeypatch.setattr(builder, "installed_version", lambda flavour: "11.4")

    def store(folder: str, digests: dict[str, str], flavour: str = "tensorrt") -> None:
        for name, digest in digests.items():
            key = PlanKey(digest, flavour, "11.4", "sm89", Precision.FP32, {"B": (1, 1, 4)}, (name,))
            PlanCache(bundle.path / "plans" / folder).load_or_build(key, lambda: b"plan")

    digests = {name: graph.digest for name, graph in bundle.manifest.graphs.items()}
    store("tensorrt-rtx-11.4-sm89", digests, "tensorrt-rtx")
    store("tensorrt-10.3-sm89", digests)
    store("tensorrt-11.4-sm120", digests)
    store("tensorrt-11.4-sm89", dict.fromkeys(digests, "of other weights"))
    assert not _has_plans(bundle, Backend.TENSORRT, "sm89")

    store("tensorrt-11.4-sm89", digests)
    assert _has_plans(bundle, Backend.TENSORRT, "sm89")
