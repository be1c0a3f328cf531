"""ONNX Runtime: graphs on the CPU, their buffers bound once. The only module that imports `onnxruntime` to run graphs;
its CUDA provider, opened through this module, is in `oneword.engines.onnxruntime_cuda`.

A graph is opened once, for any shape. The weights of a large graph are not reordered: for SD 1.5 reordering takes eight
seconds at every start and saves one to three percent of a step. All but small graphs take their memory from one arena,
so that a decoder uses what the steps before it needed, and make no memory pattern, which would hold a block for the
activations of each shape beside what the first run with that shape took from the arena. Together this saves SD 1.5 with
int8 weights a quarter of its memory. A picture of the miniature, whose graphs are small, would take 2 to 3 % longer.
"""

import functools
import importlib.metadata
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneword.engines.engine import (
    AnyArray,
    Array,
    HostArray,
    NumpyArray,
    ShapeUse,
    check_opened,
    complete_feeds,
    host_buffers,
)
from oneword.engines.errors import EngineError, not_imported, one_line, pip_line
from oneword.engines.files import size_of
from oneword.engines.graph import DType, Graph, Precision, Provider, TensorSpec
from oneword.engines.threads import cpu_threads

_SMALL, _LARGE = 32 << 20, 512 << 20  # bytes of weights

# Numbers of onnx.TensorProto.DataType.
ELEMENT = {
    DType.FLOAT32: 1,
    DType.UINT8: 2,
    DType.INT64: 7,
    DType.BOOL: 9,
    DType.FLOAT16: 10,
}


class OnnxRuntimeEngine:
    """An ONNX graph in ONNX Runtime's CPU provider.

    Raises:
        MissingPackage: onnxruntime is not installed.
        EngineError: both of its builds are installed, or the graph cannot be opened.
    """

    limits: Mapping[str, int] = {}
    shape_use = ShapeUse.ANY

    def __init__(self, name: str, graph: Graph, folder: Path, threads: int | None = None) -> None:
        ort = load_onnxruntime()
        if graph.precision is Precision.BF16:
            raise EngineError(
                f"graph {name!r} computes in bf16, which ONNX Runtime does not support on a CPU: "
                "export it with --precision fp32 or fp16"
            )
        self.name = name
        self.inputs = {spec.name: spec for spec in graph.inputs}
        self.outputs = {spec.name: spec for spec in graph.outputs}
        self.backend = f"onnxruntime {ort.__version__} cpu {graph.precision}"
        self._ortvalue = ort.OrtValue.ortvalue_from_numpy  # shares the array's memory: nothing is copied
        path = folder / graph.onnx_for(Provider.CPU)
        size = size_of(folder / graph.files[0])
        self._session = open_session(name, path, ["CPUExecutionProvider"], threads, size)
        check_session(name, path, graph, self._session)

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> "OnnxRuntimeBinding":
        """See Engine.bind. Given arrays must be C-contiguous."""
        buffers = host_buffers(self.name, self.inputs, self.outputs, shapes, inputs, outputs)
        return OnnxRuntimeBinding(self.name, self._session, self.inputs, self.outputs, *buffers)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        arrays = complete_feeds(self.name, self.inputs, feeds)
        try:
            ort_values = {name: self._ortvalue(value) for name, value in arrays.items()}
            values = self._session.run_with_ort_values(list(self.outputs), ort_values)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise EngineError(f"graph {self.name!r} failed: {one_line(error)}") from error
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}


class OnnxRuntimeBinding:
    """A session with its inputs and outputs bound to host memory by address: a run copies nothing."""

    capturable = False

    def __init__(
        self,
        name: str,
        session: Any,
        input_specs: Mapping[str, TensorSpec],
        output_specs: Mapping[str, TensorSpec],
        inputs: Mapping[str, NumpyArray],
        outputs: Mapping[str, NumpyArray],
    ) -> None:
        self._name = name
        self._session, self._binding = session, session.io_binding()
        for key, value in inputs.items():
            element = ELEMENT[input_specs[key].dtype]
            self._binding.bind_input(key, "cpu", 0, element, value.shape, value.ctypes.data)
        for key, value in outputs.items():
            element = ELEMENT[output_specs[key].dtype]
            self._binding.bind_output(key, "cpu", 0, element, value.shape, value.ctypes.data)
        # These keep alive the memory that is bound by address.
        self.inputs: Mapping[str, Array] = {key: HostArray(value) for key, value in inputs.items()}
        self.outputs: Mapping[str, Array] = {key: HostArray(value) for key, value in outputs.items()}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The CPU has no streams."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise EngineError(f"graph {self._name!r} failed: {one_line(error)}") from error

    def specialize(self) -> None:
        """See Binding. Does nothing: every shape is equally fast."""


def open_session(
    name: str,
    path: Path,
    providers: Sequence[Any],
    threads: int | None = None,
    size: int = 0,
) -> Any:
    """A session over one graph, for any shape. `size` is that of its weights, in bytes, if the CPU computes with them.

    Raises EngineError if it cannot be opened, or the first provider is not used.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would log is in the exceptions
    options.intra_op_num_threads = cpu_threads(threads)
    if size > _SMALL:
        with _arena_lock:
            _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
    if size > _LARGE:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # reorders no weights
    # Threads that wait for each other spin, then sleep. Longer spinning gains little, and beside a busy process the
    # miniature's pictures take 1.5 times as long. Threads that spin after a run slow down the next graph's by a tenth.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "10")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Fuses int8 weights with their products into operators that hold them twice and round activations to 8 bits.
    disabled = ["QDQSelectorActionTransformer"]
    try:
        session = ort.InferenceSession(
            os.fspath(path), options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise EngineError(f"cannot open graph {name!r} ({path}): {one_line(error)}") from error
    provider = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if provider not in session.get_providers():  # it would run on the CPU instead
        raise EngineError(
            f"ONNX Runtime cannot load {provider} for graph {name!r}: install the CUDA and cuDNN that this onnxruntime "
            "needs, or use another --engine"
        )
    return session


def check_session(name: str, path: Path, graph: Graph, session: Any) -> None:
    """Raises EngineError if a session has other inputs or outputs than its graph's manifest says."""
    inputs, outputs = (
        {value.name: value.shape for value in values} for values in (session.get_inputs(), session.get_outputs())
    )
    check_opened(name, path, graph, inputs, outputs)


_arena_lock = threading.Lock()


@functools.cache
def _register_arena() -> None:
    """Makes the arena of all sessions of this process that use it. It stays until the process ends. Raises
    EngineError."""
    ort = load_onnxruntime()
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(memory, None)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise EngineError(f"ONNX Runtime cannot share memory between graphs: {one_line(error)}") from error


def available_providers() -> list[str]:
    """The execution providers of the installed build. Raises as load_onnxruntime does."""
    return list(load_onnxruntime().get_available_providers())


def load_onnxruntime(extra: str = "cpu") -> Any:
    """The package. Raises MissingPackage with the line that installs it; EngineError if both builds are installed, or
    the installed one cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise not_imported("onnxruntime", extra, error) from error
    if (folder := _folder("onnxruntime")) and folder == _folder("onnxruntime-gpu"):
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {pip_line('cpu')} (or cuda)"
        )
    return onnxruntime


def _folder(distribution: str) -> str | None:
    """Where a build is installed: the first folder in sys.path that has it. None if there is none."""
    try:
        return str(importlib.metadata.distribution(distribution).locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        return None
