"""Chooses the backend that runs a bundle on this machine, and explains why faster ones are not used."""

import importlib.util
from collections.abc import Iterator
from typing import Final

from oneword.engines.errors import EngineError, MissingPackage, OnewordError, UsageError, one_of
from oneword.engines.graph import Precision, Weights
from oneword.engines.open import Backend, gpu_stream
from oneword.runtime.bundle import PLANS, Bundle

AUTO: Final = "auto"
FASTEST_FIRST: Final = (
    Backend.TENSORRT,
    Backend.TENSORRT_RTX,
    Backend.CUDA,
    Backend.OPENVINO,
    Backend.ONNXRUNTIME,
)
"""The order in which "auto" tries them."""


def choose_backend(bundle: Bundle, name: Backend | str = AUTO) -> tuple[Backend, str]:
    """The backend called `name`, or for "auto" the fastest that is installed and can open the bundle; and one line that
    says why faster ones are not used (empty if `name` is not "auto").

    Raises UsageError for an unknown name; if "auto" finds none, MissingPackage or EngineError.
    """
    if name != AUTO:
        try:
            return Backend(name), ""
        except ValueError:
            raise UsageError(f"no backend is called {name!r}: choose {one_of([AUTO, *Backend])}") from None
    reasons: list[str] = []
    for backend in FASTEST_FIRST:
        if (reason := next(_obstacles(bundle, backend), None)) is None:
            return backend, "; ".join([f"{backend} is used", *reasons])
        reasons.append(f"not {backend}: {reason}")
    if reasons[-1].endswith("not installed"):
        raise MissingPackage("onnxruntime", "cpu")
    raise EngineError(f"no backend can run this bundle here: {'; '.join(reasons)}")


def _obstacles(bundle: Bundle, backend: Backend) -> Iterator[str]:
    """Reasons why this backend cannot run the bundle on this machine; only the first is reported."""
    module = {Backend.CUDA: "onnxruntime", Backend.TENSORRT_RTX: "tensorrt_rtx"}.get(backend, backend.value)
    if importlib.util.find_spec(module) is None:
        yield "not installed"
        return
    if backend in (Backend.TENSORRT, Backend.TENSORRT_RTX) and any(
        graph.weights is Weights.INT8 for graph in bundle.manifest.graphs.values()
    ):
        yield "the bundle has int8 weights, which it does not run"
    if backend.on_gpu:
        try:
            if backend is Backend.CUDA:
                yield from _cuda_obstacles()
            elif not _has_plans(bundle, backend, target := gpu_stream().device.target):
                yield f"the bundle has no plans for {target}"
        except OnewordError as error:
            yield str(error)
    elif any(graph.precision is Precision.BF16 for graph in bundle.manifest.graphs.values()):
        yield "the bundle computes in bf16, which it does not run on a CPU"


def _cuda_obstacles() -> Iterator[str]:
    """Raises EngineError if there is no GPU, or a library that ONNX Runtime needs cannot be loaded."""
    from oneword.engines.onnxruntime import available_providers
    from oneword.engines.onnxruntime_cuda import PROVIDER, check_provider

    if PROVIDER not in available_providers():
        yield "the installed onnxruntime has no CUDA"
    else:
        check_provider(gpu_stream())


def _has_plans(bundle: Bundle, backend: Backend, target: str) -> bool:
    """Whether every graph has a plan of the installed version for this GPU."""
    from oneword.engines.builder import Flavour, installed_version
    from oneword.engines.tensorrt import fitting_plans

    flavour = Flavour(backend)
    version = installed_version(flavour)
    graphs = bundle.manifest.graphs.values()
    return all(fitting_plans(bundle.path / PLANS, graph, flavour, version, target) for graph in graphs)
