"""The tests' simulated CUDA in place of a GPU, to run on a machine without one what is written for one."""

from pathlib import Path
from typing import Any


def simulate_cuda() -> Any:
    """Patches this process permanently: ONNX Runtime's CUDA provider computes on the CPU, in simulated device memory,
    and its runs can be captured as TensorRT's can. Returns the simulation, a `tests.simulated_cuda.Runtime`."""
    import onnxruntime

    import oneword.engines.cuda
    from oneword.engines import onnxruntime_cuda
    from oneword.engines.onnxruntime import open_session
    from tests.simulated_cuda import Runtime, Session

    runtime = Runtime()

    def on_the_cpu(name: str, path: Path, providers: Any) -> Any:
        return Session(open_session(name, path, ["CPUExecutionProvider"], threads=1), runtime)

    modules: list[Any] = [oneword.engines.cuda, onnxruntime_cuda, onnxruntime]
    cuda, provider, library = modules
    cuda._runtime = lambda: runtime
    provider.open_session = on_the_cpu
    provider.CudaBinding.capturable = True
    library.get_available_providers = lambda: [onnxruntime_cuda.PROVIDER]
    return runtime
