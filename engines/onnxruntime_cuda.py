"""ONNX Runtime's CUDA provider: inputs and outputs bound to memory of the device, on the queue all engines share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from oneword.engines.cuda import DeviceArray, Queue
from oneword.engines.engine import Array, Given, NumpyArray, complete_feeds
from oneword.engines.errors import EngineError, one_line
from oneword.engines.onnxruntime import ELEMENT, load_onnxruntime, open_session
from oneword.engines.spec import Precision, TensorSpec

PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCudaEngine:
    """An ONNX graph in ONNX Runtime's CUDA provider.

    Raises:
        MissingPackage: onnxruntime-gpu is not installed.
        EngineError: the build that is installed has no CUDA, or the graph cannot be opened.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        precision: Precision,
        queue: Queue,
    ) -> None:
        ort = load_onnxruntime("cuda")
        if PROVIDER not in ort.get_available_providers():
            raise EngineError(
                f"this onnxruntime {ort.__version__} is the build without CUDA: "
                "pip uninstall onnxruntime, then pip install 'oneword[cuda]'"
            )
        self.name = name
        self.queue = queue
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        device = queue.device
        self.backend = f"onnxruntime {ort.__version__} {device.name} {device.target} {precision}"
        settings = {"device_id": device.index, "user_compute_stream": str(queue.stream), "use_tf32": "0"}
        self._ortvalue = ort.OrtValue.ortvalue_from_numpy_with_onnx_type  # bfloat16 comes as its bits
        self.session = open_session(name, path, self.inputs, [(PROVIDER, settings)])
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, Given] | None = None) -> "CudaBinding":
        """See Engine.bind. Arrays of the host are copied to the device once, here."""
        inputs, outputs = self.queue.buffers(self.name, self.inputs, self.outputs, shapes, arrays or {})
        return CudaBinding(self, inputs, outputs)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run. ONNX Runtime copies in and out."""
        arrays = complete_feeds(self.name, self.inputs, feeds)
        try:
            given = {name: self._ortvalue(value, ELEMENT[self.inputs[name].dtype]) for name, value in arrays.items()}
            values = self.session.run_with_ort_values(list(self.outputs), given)
        except Exception as error:  # its exceptions have no common base of their own
            raise EngineError(f"graph {self.name!r} failed: {one_line(error)}") from error
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}


class CudaBinding:
    """A session with its inputs and outputs bound to memory of the device; a run queues it and waits for nothing.

    It is not captured: what ONNX Runtime queues at the end of a run frees memory of the host, and would do so again at
    every replay (microsoft/onnxruntime 32081, 32121).
    """

    capturable = False

    def __init__(
        self, engine: OnnxRuntimeCudaEngine, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        self._engine = engine
        self._io = engine.session.io_binding()
        self.inputs: Mapping[str, Array] = inputs
        self.outputs: Mapping[str, Array] = outputs
        index = engine.queue.device.index
        for specs, arrays, bind in (
            (engine.inputs, inputs, self._io.bind_input),
            (engine.outputs, outputs, self._io.bind_output),
        ):
            for name, array in arrays.items():
                bind(name, "cuda", index, ELEMENT[specs[name].dtype], array.shape, array.pointer)

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The session's own stream is the queue's; another one is refused."""
        if stream not in (None, self._engine.queue.stream):
            raise EngineError(f"graph {self._engine.name!r} was opened for another stream: open an engine on that one")
        try:
            self._engine.session.run_with_iobinding(self._io, self._engine.options)
        except Exception as error:  # its exceptions have no common base of their own
            raise EngineError(f"graph {self._engine.name!r} failed: {one_line(error)}") from error
