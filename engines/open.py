"""A bundle, the name of a graph and a back end become an engine; the back end is imported when asked for."""

from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from oneword.engines.bundle import PLANS, Bundle
from oneword.engines.engine import Engine
from oneword.engines.loop import HostQueue, Queue
from oneword.engines.plans import PlanCache

if TYPE_CHECKING:
    from oneword.engines import cuda


class Backend(StrEnum):
    """What runs the graphs."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    CUDA = "onnxruntime-cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


def open_engine(
    bundle: Bundle, graph: str, backend: Backend = Backend.ONNXRUNTIME, threads: int | None = None
) -> Engine:
    """Opens one graph of a bundle.

    `threads` is the number of CPU threads; None leaves it to OMP_NUM_THREADS, else to the back end.

    Raises UsageError for a graph that the bundle has not, MissingPackage, EngineError: also where there is no GPU for
    a back end that needs one.
    """
    entry = bundle.graph(graph)
    path = bundle.file(entry.files[0])
    match backend:
        case Backend.ONNXRUNTIME:
            from oneword.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graph, path, entry.inputs, entry.outputs, entry.precision, threads)
        case Backend.OPENVINO:
            from oneword.engines.openvino import OpenVinoEngine

            plans = PlanCache(bundle.path / PLANS / "openvino")
            return OpenVinoEngine(
                graph, path, entry.inputs, entry.outputs, entry.precision, threads, plans=plans, digest=entry.digest
            )
        case Backend.CUDA:
            from oneword.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

            return OnnxRuntimeCudaEngine(graph, path, entry.inputs, entry.outputs, entry.precision, gpu_queue())
        case Backend.TENSORRT | Backend.TENSORRT_RTX:
            from oneword.engines.builder import Flavour
            from oneword.engines.tensorrt import TensorRtEngine

            return TensorRtEngine(bundle, graph, Flavour(backend), gpu_queue())


def queue_of(backend: Backend) -> Queue:
    """Where the engines of a back end do their work. Raises MissingPackage and EngineError where there is no GPU."""
    return HostQueue() if backend in (Backend.ONNXRUNTIME, Backend.OPENVINO) else gpu_queue()


@cache
def gpu_queue() -> "cuda.Queue":
    """The one queue that all engines of this process share, so that what one gives another may read."""
    from oneword.engines import cuda

    return cuda.Queue(cuda.Device())
