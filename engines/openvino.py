"""OpenVINO: graphs on the CPU, in bfloat16 where the processor has it. The only module that imports `openvino`.

A graph exported in fp32 computes its convolutions and products in bfloat16 then, as `backend` says; what follows the
last of them, which in `denoise_step` is the sampler's update, stays in float32.

A small graph is compiled once for any shape. What dynamic shapes cost in each run is a third of its time, so a binding
that has run often is compiled once more, for its own shapes. Both are kept as plans.

A large graph is compiled for the shapes it is first used at, which is faster in each run and in the first by seconds,
and for any shape when others come: it has its weights twice then, until the first binding is gone. Of what is not small
no plan is kept: it would hold the weights again, and take as long to read.
"""

import contextlib
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oneword.engines.engine import (
    Array,
    Given,
    HostArray,
    NumpyArray,
    Shape,
    check_opened,
    complete_feeds,
    host_buffers,
)
from oneword.engines.errors import EngineError, FileError, MissingPackage, one_line
from oneword.engines.files import size_of
from oneword.engines.plans import PlanCache, PlanKey
from oneword.engines.spec import DType, Precision, TensorSpec
from oneword.engines.threads import cpu_threads

OFTEN = 100  # runs of one binding, after which compiling its graph for its own shapes begins to pay
_SMALL = 64 << 20  # bytes of a graph that is cheap to hold once more
_LARGE = 512 << 20  # bytes of a graph for whose first shapes it pays to wait
_MOST_PLANS = 32


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO for the CPU, or its plan from `plans`, where `digest` is the graph's.

    `exact` keeps float32 whatever the processor has.

    Raises:
        MissingPackage: openvino is not installed.
        EngineError: the graph cannot be compiled.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        precision: Precision,
        threads: int | None = None,
        exact: bool = False,
        plans: PlanCache | None = None,
        digest: str = "",
    ) -> None:
        ov = _openvino()
        self.name = name
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        if any(spec.dtype is DType.BFLOAT16 for spec in (*inputs, *outputs)):
            raise EngineError(f"graph {name!r} takes bfloat16 tensors, which openvino cannot share: export it in fp32")
        core = ov.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        low = not exact and "BF16" in capabilities
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if low else "f32", "PERFORMANCE_HINT": "LATENCY"}
        if count := cpu_threads(threads):
            settings["INFERENCE_NUM_THREADS"] = str(count)
        self.backend = f"openvino {ov.__version__.split('-')[0]} cpu {Precision.BF16 if low else precision}"
        key = PlanKey(
            graph_digest=digest,
            backend="openvino",
            version=ov.__version__,
            device=f"{core.get_property('CPU', 'FULL_DEVICE_NAME')} {sorted(capabilities)}",
            precision=precision,
            ranges={},
            flags=(settings["INFERENCE_PRECISION_HINT"], settings["PERFORMANCE_HINT"]),
        )
        try:
            self._compiler = _Compiler(core, path, settings, plans, key)
        except RuntimeError as error:
            raise EngineError(f"cannot open graph {name!r} ({path}): {one_line(error)}") from error
        check_opened(name, path, self.inputs, self._compiler.inputs)

    def bind(self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, Given] | None = None) -> "OpenVinoBinding":
        """See Engine.bind. Arrays given must be C-contiguous; they are read where they lie at every run."""
        of_inputs, of_outputs = host_buffers(self.name, self.inputs, self.outputs, shapes, arrays)
        return OpenVinoBinding(self.name, self._compiler, of_inputs, of_outputs)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        arrays = complete_feeds(self.name, self.inputs, feeds)
        compiled, _ = _compiled_for(self.name, self._compiler, {name: value.shape for name, value in arrays.items()})
        request = compiled.create_infer_request()
        for name, value in arrays.items():
            request.set_tensor(name, _tensor(value))
        _infer(self.name, request)
        return {name: request.get_tensor(name).data.copy() for name in self.outputs}


class OpenVinoBinding:
    """A request whose inputs and outputs are host memory that it shares: a run copies nothing."""

    capturable = False

    def __init__(
        self,
        name: str,
        compiler: "_Compiler",
        inputs: Mapping[str, NumpyArray],
        outputs: Mapping[str, NumpyArray],
    ) -> None:
        self._name = name
        self._compiler = compiler
        self._shapes = {key: value.shape for key, value in inputs.items()}
        self._tensors = {key: _tensor(value) for key, value in {**inputs, **outputs}.items()}
        self._runs = 0
        kept = compiler.kept(self._shapes)
        compiled, self._own = _compiled_for(name, compiler, self._shapes) if kept is None else (kept, True)
        self._request = self._bound(compiled)
        self.inputs: Mapping[str, Array] = {key: HostArray(value) for key, value in inputs.items()}
        self.outputs: Mapping[str, Array] = {key: HostArray(value) for key, value in outputs.items()}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The CPU has no streams."""
        if self._runs == OFTEN and not self._own and self._compiler.small:
            with contextlib.suppress(RuntimeError):  # the request that ran so far is as good
                self._request = self._bound(self._compiler.compile(self._shapes))
        self._runs += 1
        _infer(self._name, self._request)

    def _bound(self, compiled: Any) -> Any:
        request = compiled.create_infer_request()
        for key, tensor in self._tensors.items():
            request.set_tensor(key, tensor)
        return request


class _Compiler:
    """Compiles one graph, for any shape or for given ones, or reads what an earlier start compiled."""

    def __init__(
        self, core: Any, path: Path, settings: Mapping[str, str], plans: PlanCache | None, key: PlanKey
    ) -> None:
        self._core, self._path, self._settings, self._plans, self._key = core, path, settings, plans, key
        size = size_of(path)
        self.small = size <= _SMALL
        self._turn = threading.Lock()
        self._first: tuple[Mapping[str, Shape], Any] | None = None
        self._any = None
        if not self.small:
            self._plans = None
        if size <= _LARGE:
            self._any = self.compile()
        self.inputs = [value.any_name for value in (self._any or core.read_model(path)).inputs]

    def compiled_for(self, shapes: Mapping[str, Shape]) -> tuple[Any, bool]:
        """What runs these shapes, and whether it does only these. Raises RuntimeError, which is OpenVINO's."""
        with self._turn:
            if self._any is not None:
                return self._any, False
            if self._first is None:
                self._first = dict(shapes), self._compile(shapes)
            if self._first[0] == shapes:
                return self._first[1], True
            self._any, self._first = self._compile(None), None  # who runs the first goes on with it
            return self._any, False

    def compile(self, shapes: Mapping[str, Shape] | None = None) -> Any:
        """Raises RuntimeError, which is OpenVINO's."""
        fresh = None

        def build() -> bytes:
            nonlocal fresh
            fresh = self._compile(shapes)
            stream = io.BytesIO()
            fresh.export_model(stream)
            return stream.getvalue()

        if self._plans is not None and len([*self._plans.folder.glob("*.plan")]) < _MOST_PLANS:
            with contextlib.suppress(FileError):  # a full or read-only disk is no reason not to run
                plan = self._plans.load_or_build(self._key_for(shapes), build)
                return fresh or self._read(plan) or self._compile(shapes)
        return fresh or self.kept(shapes) or self._compile(shapes)

    def kept(self, shapes: Mapping[str, Shape] | None) -> Any | None:
        """What an earlier start compiled, if it did."""
        plan = None if self._plans is None else self._plans.load(self._key_for(shapes))
        return None if plan is None else self._read(plan)

    def _compile(self, shapes: Mapping[str, Shape] | None) -> Any:
        model = self._core.read_model(self._path)
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        return self._core.compile_model(model, "CPU", self._settings)

    def _read(self, plan: bytes) -> Any | None:
        try:
            return self._core.import_model(io.BytesIO(plan), "CPU", self._settings)
        except RuntimeError:
            return None

    def _key_for(self, shapes: Mapping[str, Shape] | None) -> PlanKey:
        ranges = {f"{name}.{i}": (n, n, n) for name, shape in (shapes or {}).items() for i, n in enumerate(shape)}
        return replace(self._key, ranges=ranges)


def _tensor(value: NumpyArray) -> Any:
    return _openvino().Tensor(value, shared_memory=True)


def _compiled_for(name: str, compiler: _Compiler, shapes: Mapping[str, Shape]) -> tuple[Any, bool]:
    try:
        return compiler.compiled_for(shapes)
    except RuntimeError as error:
        raise EngineError(f"cannot compile graph {name!r} for {dict(shapes)}: {one_line(error)}") from error


def _infer(name: str, request: Any) -> None:
    try:
        request.infer()
    except RuntimeError as error:
        raise EngineError(f"graph {name!r} failed: {one_line(error)}") from error


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingPackage("openvino", "openvino") from error
    return openvino
