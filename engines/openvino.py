"""OpenVINO: graphs on the CPU, in bfloat16 where the processor has it. The only module that imports `openvino`.

A graph exported in fp32 computes its convolutions and products in bfloat16 then, as `backend` says; what follows the
last of them, which in `denoise_step` is the sampler's update, stays in float32. Compiled graphs are kept as plans,
which hold the weights again: those of graphs above 512 MiB are not kept.
"""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oneword.engines.engine import Array, HostArray, NumpyArray, check_feeds, host_buffers, numpy_dtype
from oneword.engines.errors import EngineError, FileError, MissingPackage
from oneword.engines.plans import PlanCache, PlanKey
from oneword.engines.spec import DType, Precision, TensorSpec

_LARGEST_PLAN = 512 << 20


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
        count = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        if count:
            settings["INFERENCE_NUM_THREADS"] = str(count)
        self.backend = f"openvino {ov.__version__.split('-')[0]} cpu {Precision.BF16 if low else precision}"
        hint = settings["INFERENCE_PRECISION_HINT"]
        device = f"{core.get_property('CPU', 'FULL_DEVICE_NAME')} {sorted(capabilities)}"
        key = PlanKey(digest, "openvino", ov.__version__, device, precision, {}, (hint, "latency"))
        try:
            self._compiled = _compiled(core, path, settings, plans, key)
        except RuntimeError as error:
            raise EngineError(f"cannot open graph {name!r} ({path}): {_line(error)}") from error
        given = {value.any_name for value in self._compiled.inputs}
        if given != set(self.inputs):
            raise EngineError(
                f"graph {name!r} ({path}) takes {', '.join(sorted(given))}, "
                f"its manifest says {', '.join(sorted(self.inputs))}: export the model again with ti-export"
            )

    def bind(
        self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, NumpyArray] | None = None
    ) -> "OpenVinoBinding":
        """See Engine.bind. Arrays given must be C-contiguous; they are read where they lie at every run."""
        of_inputs, of_outputs = host_buffers(self.name, self.inputs, self.outputs, shapes, arrays)
        return OpenVinoBinding(self.name, self._compiled.create_infer_request(), of_inputs, of_outputs)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        shapes = check_feeds(self.name, self.inputs, feeds)
        missing = {name: np.zeros(shapes[name], numpy_dtype(self.inputs[name].dtype)) for name in shapes.keys() - feeds}
        request = self._compiled.create_infer_request()
        for name, value in {**feeds, **missing}.items():
            request.set_tensor(name, _tensor(np.ascontiguousarray(value)))
        _infer(self.name, request)
        return {name: request.get_tensor(name).data.copy() for name in self.outputs}


class OpenVinoBinding:
    """A request whose inputs and outputs are host memory that it shares: a run copies nothing."""

    def __init__(
        self, name: str, request: Any, inputs: Mapping[str, NumpyArray], outputs: Mapping[str, NumpyArray]
    ) -> None:
        self._name = name
        self._request = request
        self._tensors = {key: _tensor(value) for key, value in {**inputs, **outputs}.items()}
        for key, tensor in self._tensors.items():
            request.set_tensor(key, tensor)
        self.inputs: Mapping[str, Array] = {key: HostArray(value) for key, value in inputs.items()}
        self.outputs: Mapping[str, Array] = {key: HostArray(value) for key, value in outputs.items()}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The CPU has no streams."""
        _infer(self._name, self._request)


def _compiled(core: Any, path: Path, settings: Mapping[str, str], plans: PlanCache | None, key: PlanKey) -> Any:
    """The graph compiled now, or read from the plan of an earlier start; where no plan can be written, compiled."""
    fresh = None

    def build() -> bytes:
        nonlocal fresh
        fresh = core.compile_model(core.read_model(path), "CPU", settings)
        stream = io.BytesIO()
        fresh.export_model(stream)
        return stream.getvalue()

    if plans is not None and path.is_file() and path.stat().st_size <= _LARGEST_PLAN:
        with contextlib.suppress(FileError):  # a full or read-only disk is no reason not to run
            plan = plans.load_or_build(key, build)
            if fresh is None:
                with contextlib.suppress(RuntimeError):
                    return core.import_model(io.BytesIO(plan), "CPU", settings)
    return fresh or core.compile_model(core.read_model(path), "CPU", settings)


def _tensor(value: NumpyArray) -> Any:
    return _openvino().Tensor(value, shared_memory=True)


def _infer(name: str, request: Any) -> None:
    try:
        request.infer()
    except RuntimeError as error:
        raise EngineError(f"graph {name!r} failed: {_line(error)}") from error


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingPackage("openvino", "openvino") from error
    return openvino


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
