"""TensorRT and TensorRT-RTX on a GPU: a graph's plans, run on device buffers. The only module that imports `tensorrt`
and `tensorrt_rtx` into this process. Not covered: building plans, which is in `oneword.engines.builder`.

Every input and output is a plain buffer, bound once; a run is one `execute_async_v3` on the shared stream. As runs
follow each other there, all bindings of a plan share the memory for its activations.
"""

import importlib
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from oneword.engines.builder import RTX_TARGETS, Flavour, build_plan, installed_version, plan_cache, target_of
from oneword.engines.cuda import CudaStream, Device, DeviceArray
from oneword.engines.engine import AnyArray, Array, NumpyArray, Shape, ShapeUse, check_feeds, check_shapes
from oneword.engines.errors import EngineError, FeedError, UsageError, not_imported
from oneword.engines.graph import Graph, TensorSpec
from oneword.engines.plans import PlanCache, PlanKey, Ranges


class TensorRtEngine:
    """The plans of one graph on this machine's GPU, from the caches under `plans`; if no plan fits, plans for `ranges`
    are built first.

    Raises:
        MissingPackage: the flavour or cuda-python is not installed.
        EngineError: no GPU, an old driver, or a plan that the library refuses.
        UsageError: the flavour does not build for this GPU.
    """

    shape_use = ShapeUse.ANY

    def __init__(
        self,
        name: str,
        graph: Graph,
        folder: Path,
        flavour: Flavour,
        stream: CudaStream,
        plans: Path | None,
        ranges: Sequence[Ranges],
    ) -> None:
        self.name = name
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.outputs}
        version = installed_version(flavour)
        self.stream = stream
        device = stream.device
        self.backend = f"{flavour} {version} {device.name} {device.target} {graph.precision}"
        self._flavour = flavour
        plans = folder / "plans" if plans is None else plans
        self._plans = fitting_plans(plans, graph, flavour, version, device.target)
        if not self._plans:
            target = target_of(flavour, device.target)
            for plan_ranges in ranges:
                build_plan(name, graph, folder, plans, flavour, version, target, plan_ranges)
            self._plans = fitting_plans(plans, graph, flavour, version, device.target)
        if not self._plans:
            raise EngineError(
                f"{plans} has no plan of graph {name!r} for {device.target}: build it with ti-export --plans"
            )
        self.limits = widest([key.ranges for _, key in self._plans])
        self._opened: dict[str, Any] = {}
        self._activations: dict[str, DeviceArray] = {}

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> "TensorRtBinding":
        """See Engine.bind. Host arrays are copied to the device once, when they are bound."""
        arrays = {name: array.shape for name, array in {**(inputs or {}), **(outputs or {})}.items()}
        fixed = {name: shape for name, shape in shapes.items() if name in self.inputs}
        sizes, input_shapes = check_shapes(
            self.name, self.inputs, {**fixed, **{name: shape for name, shape in arrays.items() if name in self.inputs}}
        )
        context, activations = self._context(narrowest(self.name, self._plans, sizes), input_shapes)
        inferred = {name: shape for name in self.outputs if (shape := known_shape(context, name))}
        shapes = {**inferred, **shapes}
        buffers = self.stream.buffers(self.name, self.inputs, self.outputs, shapes, inputs, outputs)
        capturable = self._flavour is Flavour.TENSORRT
        return TensorRtBinding(self.name, self.stream, context, activations, *buffers, capturable)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        shapes = check_feeds(self.name, self.inputs, feeds)
        bound = self.bind(shapes, {name: np.ascontiguousarray(value) for name, value in feeds.items()})
        bound.run()
        return {name: value.numpy() for name, value in bound.outputs.items()}

    def _context(self, plan: tuple[PlanCache, PlanKey], shapes: Mapping[str, Shape]) -> tuple[Any, DeviceArray]:
        """An execution context at these shapes, and the memory of its activations."""
        engine, key = self._engine(*plan), plan[1].name
        if key not in self._activations:
            self._activations[key] = self.stream.empty((engine.device_memory_size_v2,), np.uint8)
        activations = self._activations[key]
        strategy = _library(self._flavour).ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"{self._flavour} has no room for graph {self.name!r}: {_memory(self.stream.device)}")
        context.set_device_memory(activations.pointer, activations.nbytes)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"the plan of graph {self.name!r} does not accept {name!r} as {list(shape)}")
        return context, activations

    def _engine(self, cache: PlanCache, key: PlanKey) -> Any:
        """The plan, deserialized at its first use, after its hash is checked."""
        if key.name not in self._opened:
            data = cache.load(key)
            if data is None:
                raise EngineError(
                    f"{cache.path(key)} has changed since it was built: delete {cache.folder} to rebuild it"
                )
            engine = _runtime(self._flavour).deserialize_cuda_engine(data)
            if engine is None:
                raise EngineError(
                    f"{self._flavour} refuses the plan {cache.path(key)} on {self.stream.device.name}: "
                    f"delete {cache.folder} to rebuild it"
                )
            names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
            if names != {*self.inputs, *self.outputs}:
                raise EngineError(f"the plan of graph {self.name!r} has {', '.join(sorted(names))}: export it again")
            self._opened[key.name] = engine
        return self._opened[key.name]


class TensorRtBinding:
    """An execution context with its buffers; a run is queued and not waited for.

    TensorRT-RTX cannot be captured: it swaps in better kernels while it runs, which a capture would never use.
    """

    def __init__(
        self,
        name: str,
        stream: CudaStream,
        context: Any,
        activations: DeviceArray,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        capturable: bool,
    ) -> None:
        self._name, self._stream, self._context = name, stream, context
        self._activations = activations  # which the context uses by address
        self.capturable = capturable
        self.inputs: Mapping[str, Array] = inputs
        self.outputs: Mapping[str, Array] = outputs
        for key, array in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(key, array.pointer)
        # The context is destroyed with the binding, once no queued work can use it any more.
        weakref.finalize(self, stream.device.runtime.cudaStreamSynchronize, stream.handle)

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The plan runs on the shared stream; any other is refused."""
        if stream not in (None, self._stream.handle):
            raise EngineError(f"graph {self._name!r} was opened for another stream: open an engine on that one")
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(f"graph {self._name!r} failed on {self._stream.device.name}")

    def specialize(self) -> None:
        """See Binding. Does nothing: every shape is equally fast."""


def fitting_plans(
    plans: Path, graph: Graph, flavour: Flavour, version: str, target: str
) -> list[tuple[PlanCache, PlanKey]]:
    """The plans of a graph that this library version built for this GPU.

    Raises UsageError if there is none and none can be built.
    """
    folders = plans.glob(f"{flavour}-{version}-*")
    targets = [folder.name.removeprefix(f"{flavour}-{version}-").replace("+", ",") for folder in sorted(folders)]
    caches = [plan_cache(plans, flavour, version, gpus) for gpus in targets if target in gpus.split(",")]
    fitting = [
        (cache, key)
        for cache in caches
        for key in cache.recorded()
        if (key.graph_digest, key.precision) == (graph.digest, graph.precision)
    ]
    if not fitting and flavour is Flavour.RTX and target not in RTX_TARGETS:
        raise UsageError(
            f"this GPU is {target}, {flavour} builds for {', '.join(RTX_TARGETS)}"
            + (f" (there are plans for {', '.join(targets)})" if targets else "")
            + ": use --engine tensorrt"
        )
    return fitting


def widest(ranges: Sequence[Ranges]) -> dict[str, int]:
    """The largest size of each axis that any of these plans accepts."""
    axes = {axis for sizes in ranges for axis in sizes}
    return {axis: max(sizes[axis][2] for sizes in ranges if axis in sizes) for axis in axes}


def narrowest(
    graph: str, plans: Sequence[tuple[PlanCache, PlanKey]], sizes: Mapping[str, int]
) -> tuple[PlanCache, PlanKey]:
    """The plan with the least room that accepts these sizes. Raises FeedError if none does."""
    fitting = [(cache, key) for cache, key in plans if not outside(key.ranges, sizes)]
    if not fitting:
        ranges = min((key.ranges for _, key in plans), key=lambda plan: (len(outside(plan, sizes)), -room(plan)))
        axis, size = next(iter(outside(ranges, sizes).items()))
        smallest, _, largest = ranges[axis]
        raise FeedError(
            f"{graph} was given {axis} = {size}, its plan takes {smallest} to {largest}: "
            "build it with ti-export --max-batch, --max-size or --static-size"
        )
    return min(fitting, key=lambda plan: room(plan[1].ranges))


def room(ranges: Ranges) -> int:
    """How far apart a plan's smallest and largest sizes are, over all axes."""
    return sum(largest - smallest for smallest, _, largest in ranges.values())


def outside(ranges: Ranges, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that a plan of these ranges does not accept."""
    return {axis: size for axis, size in sizes.items() if not ranges[axis][0] <= size <= ranges[axis][2]}


def known_shape(context: Any, name: str) -> Shape | None:
    """The shape of an output, if the plan can infer it before it runs."""
    shape = tuple(int(size) for size in context.get_tensor_shape(name))
    return None if any(size < 0 for size in shape) else shape


@cache
def _runtime(flavour: Flavour) -> Any:
    trt = _library(flavour)
    return trt.Runtime(trt.Logger(trt.Logger.ERROR))


def _library(flavour: Flavour) -> Any:
    try:
        return importlib.import_module(flavour.replace("-", "_"))
    except ImportError as error:
        raise not_imported(str(flavour), str(flavour), error) from error


def _memory(device: Device) -> str:
    free, total = device.memory()
    return (
        f"{free >> 20} of {total >> 20} MiB of {device.name} are free; "
        "build the plan with a smaller --max-batch or --max-size"
    )
