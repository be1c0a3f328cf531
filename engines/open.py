"""Opens a graph with a backend, which is imported at its first use. Not covered: resolving `auto`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from oneword.engines.engine import Engine, HostStream, Stream
from oneword.engines.graph import Graph
from oneword.engines.plans import PlanCache, Ranges

if TYPE_CHECKING:
    from oneword.engines import cuda


class Backend(StrEnum):
    """The library that runs the graphs, and its device."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    CUDA = "onnxruntime-cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def on_gpu(self) -> bool:
        """Whether it needs an NVIDIA GPU."""
        return self not in (Backend.ONNXRUNTIME, Backend.OPENVINO)


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine besides its graph."""

    threads: int | None = None
    """CPU threads; None uses OMP_NUM_THREADS if set, else the backend's default."""
    plans: Path | None = None
    """Folder of the caches of compiled plans; None disables them."""
    ranges: Sequence[Ranges] = ()
    """TensorRT: the sizes to build plans for if the folder has none for this GPU."""


def open_engine(
    backend: Backend, name: str, graph: Graph, folder: Path, options: EngineOptions = EngineOptions()
) -> Engine:
    """Opens the graph called `name`, whose files are in `folder`.

    Raises MissingPackage; EngineError, also if the backend needs a GPU and there is none.
    """
    match backend:
        case Backend.ONNXRUNTIME:
            from oneword.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(name, graph, folder, options.threads)
        case Backend.OPENVINO:
            from oneword.engines.openvino import OpenVinoEngine

            plans = None if options.plans is None else PlanCache(options.plans / "openvino")
            return OpenVinoEngine(name, graph, folder, options.threads, plans=plans)
        case Backend.CUDA:
            from oneword.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

            return OnnxRuntimeCudaEngine(name, graph, folder, gpu_stream())
        case Backend.TENSORRT | Backend.TENSORRT_RTX:
            from oneword.engines.builder import Flavour
            from oneword.engines.tensorrt import TensorRtEngine

            return TensorRtEngine(name, graph, folder, Flavour(backend), gpu_stream(), options.plans, options.ranges)


def stream_of(backend: Backend) -> Stream:
    """The stream that a backend's engines run on. Raises MissingPackage, and EngineError if there is no GPU."""
    return gpu_stream() if backend.on_gpu else HostStream()


@cache
def gpu_stream() -> "cuda.CudaStream":
    """The stream that all engines of this process share, so that one can read what another wrote."""
    from oneword.engines import cuda

    return cuda.CudaStream(cuda.Device())
