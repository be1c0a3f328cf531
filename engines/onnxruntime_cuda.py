"""ONNX Runtime's CUDA provider: inputs and outputs bound to device memory, on the stream that all engines share."""

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneword.engines.cuda import CudaStream, DeviceArray
from oneword.engines.engine import AnyArray, Array, NumpyArray, ShapeUse, complete_feeds
from oneword.engines.errors import EngineError, one_line, pip_line
from oneword.engines.graph import Graph, Provider
from oneword.engines.onnxruntime import ELEMENT, check_session, load_onnxruntime, open_session

PROVIDER = "CUDAExecutionProvider"
_IDENTITY = (  # an ONNX graph that returns its input, `x`
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


class OnnxRuntimeCudaEngine:
    """An ONNX graph in ONNX Runtime's CUDA provider.

    Raises:
        MissingPackage: onnxruntime-gpu is not installed.
        EngineError: the installed build has no CUDA, or the graph cannot be opened.
    """

    limits: Mapping[str, int] = {}
    shape_use = ShapeUse.ANY

    def __init__(self, name: str, graph: Graph, folder: Path, stream: CudaStream) -> None:
        ort = load_onnxruntime("cuda")
        if PROVIDER not in ort.get_available_providers():
            raise EngineError(
                f"this onnxruntime {ort.__version__} is the build without CUDA: "
                f"pip uninstall onnxruntime, then {pip_line('cuda')}"
            )
        self.name = name
        self.stream = stream
        self.inputs = {spec.name: spec for spec in graph.inputs}
        self.outputs = {spec.name: spec for spec in graph.outputs}
        device = stream.device
        self.backend = f"onnxruntime {ort.__version__} {device.name} {device.target} {graph.precision}"
        self._ortvalue = ort.OrtValue.ortvalue_from_numpy
        path = folder / graph.onnx_for(Provider.CUDA)
        self.session = _session(name, path, stream)
        check_session(name, path, graph, self.session)
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> "CudaBinding":
        """See Engine.bind. Host arrays are copied to the device once, when they are bound."""
        return CudaBinding(self, *self.stream.buffers(self.name, self.inputs, self.outputs, shapes, inputs, outputs))

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run. ONNX Runtime copies in and out."""
        arrays = complete_feeds(self.name, self.inputs, feeds)
        try:
            ort_values = {name: self._ortvalue(value) for name, value in arrays.items()}
            values = self.session.run_with_ort_values(list(self.outputs), ort_values)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise EngineError(f"graph {self.name!r} failed: {one_line(error)}") from error
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}


class CudaBinding:
    """A session with its inputs and outputs bound to device memory; a run is queued and not waited for.

    It cannot be captured: what ONNX Runtime queues at the end of a run frees host memory, and would do so again in
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
        index = engine.stream.device.index
        for specs, arrays, bind in (
            (engine.inputs, inputs, self._io.bind_input),
            (engine.outputs, outputs, self._io.bind_output),
        ):
            for name, array in arrays.items():
                bind(name, "cuda", index, ELEMENT[specs[name].dtype], array.shape, array.pointer)

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The session runs on the shared stream; any other is refused."""
        if stream not in (None, self._engine.stream.handle):
            raise EngineError(f"graph {self._engine.name!r} was opened for another stream: open an engine on that one")
        try:
            self._engine.session.run_with_iobinding(self._io, self._engine.options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise EngineError(f"graph {self._engine.name!r} failed: {one_line(error)}") from error

    def specialize(self) -> None:
        """See Binding. Does nothing: every shape is equally fast."""


def check_provider(stream: CudaStream) -> None:
    """Opens a tiny graph. Raises EngineError if the provider, or a library that it needs, cannot be loaded."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "identity.onnx"
            path.write_bytes(_IDENTITY)
            _session("identity", path, stream)
    except OSError as error:
        raise EngineError(f"the CUDA provider cannot be tried: {error}") from error


def _session(name: str, path: Path, stream: CudaStream) -> Any:
    """A session in the provider, on this stream. Raises as open_session does."""
    ort = load_onnxruntime("cuda")
    settings = {
        "device_id": stream.device.index,
        "user_compute_stream": str(stream.handle),
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "1",  # sums in float32; else fp16 graphs sum in fp16
    }
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # which may be for JSON; a missing library is in open_session's error
        ort.preload_dlls()  # those of the pip packages, which the loader does not find
    return open_session(name, path, [(PROVIDER, settings)])
