"""A bundle, the name of a graph and a back end become an engine; the back end is imported when asked for."""

from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from oneword.engines.bundle import PLANS, Bundle
from oneword.engines.engine import Engine
from oneword.engines.plans import PlanCache

if TYPE_CHECKING:
    from oneword.engines.cuda import Queue


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


@cache
def gpu_queue() -> "Queue":
    """The one queue that all engines of this process share, so that what one gives another may read."""
    from oneword.engines.cuda import Device, Queue

    return Queue(Device())
