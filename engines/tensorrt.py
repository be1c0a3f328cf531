"""TensorRT and TensorRT-RTX on a GPU: plans of a bundle's graphs, run on buffers of the device. Plans are built in
`oneword.engines.builder`; the only module that imports `tensorrt` and `tensorrt_rtx` into our own process.

Every input and output is a plain buffer, bound once; a run is one `execute_async_v3` on the engine's queue.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from oneword.engines.builder import RTX_TARGETS, Flavour, Limits, build_plans, installed_version, plan_cache
from oneword.engines.bundle import PLANS, Bundle, Graph
from oneword.engines.cuda import Device, DeviceArray, Queue
from oneword.engines.engine import Array, Given, NumpyArray, Shape, check_feeds, check_shapes
from oneword.engines.errors import EngineError, FeedError, MissingPackage, UsageError
from oneword.engines.plans import PlanCache, PlanKey, Ranges
from oneword.engines.spec import TensorSpec


class TensorRtEngine:
    """The plans of one graph on this machine's GPU; where the bundle has none that fit it, one is built.

    Raises:
        MissingPackage: the flavour or cuda-python is not installed.
        EngineError: no GPU, an old driver, or a plan that the library refuses.
        UsageError: the flavour does not build for this GPU.
    """

    def __init__(self, bundle: Bundle, name: str, flavour: Flavour, queue: Queue) -> None:
        self.name = name
        graph = bundle.graph(name)
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.outputs}
        version = installed_version(flavour)
        self.queue = queue
        device = queue.device
        self.backend = f"{flavour} {version} {device.name} {device.target} {graph.precision}"
        self._flavour = flavour
        self._plans = fitting_plans(bundle, graph, flavour, version, device.target)
        if not self._plans:
            build_plans(bundle, flavour, device.target, Limits(), only=name)
            self._plans = fitting_plans(bundle, graph, flavour, version, device.target)
        self._opened: dict[str, Any] = {}

    def bind(self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, Given] | None = None) -> "Bound":
        """See Engine.bind. Arrays of the host are copied to the device once, here."""
        arrays = arrays or {}
        given = {name: tuple(shape) for name, shape in shapes.items()} | {n: a.shape for n, a in arrays.items()}
        sizes, input_shapes = check_shapes(
            self.name, self.inputs, {name: shape for name, shape in given.items() if name not in self.outputs}
        )
        context = self._context(narrowest(self.name, self._plans, sizes), input_shapes)
        inferred = {name: shape for name in self.outputs if (shape := known_shape(context, name))}
        shapes = {**inferred, **shapes}
        inputs, outputs = self.queue.buffers(self.name, self.inputs, self.outputs, shapes, arrays)
        return Bound(self.name, self.queue, context, inputs, outputs, self._flavour is Flavour.TENSORRT)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        shapes = check_feeds(self.name, self.inputs, feeds)
        bound = self.bind(shapes, {name: np.ascontiguousarray(value) for name, value in feeds.items()})
        bound.run()
        return {name: value.numpy() for name, value in bound.outputs.items()}

    def _context(self, plan: tuple[PlanCache, PlanKey], shapes: Mapping[str, Shape]) -> Any:
        """An execution context at these shapes."""
        engine = self._engine(*plan)
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self._flavour} has no room for graph {self.name!r}: {_memory(self.queue.device)}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"the plan of graph {self.name!r} does not take {name!r} as {list(shape)}")
        return context

    def _engine(self, cache: PlanCache, key: PlanKey) -> Any:
        """The plan, deserialized at its first use; its bytes are hashed before that."""
        if key.name not in self._opened:
            data = cache.load(key)
            if data is None:
                raise EngineError(
                    f"{cache.path(key)} has changed since it was built: delete {cache.folder}, it is built again"
                )
            engine = _runtime(self._flavour).deserialize_cuda_engine(data)
            if engine is None:
                raise EngineError(
                    f"{self._flavour} refuses the plan {cache.path(key)} on {self.queue.device.name}: "
                    f"delete {cache.folder}, it is built again"
                )
            names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
            if names != {*self.inputs, *self.outputs}:
                raise EngineError(f"the plan of graph {self.name!r} has {', '.join(sorted(names))}: export it again")
            self._opened[key.name] = engine
        return self._opened[key.name]


class Bound:
    """An execution context with its buffers; a run queues it and waits for nothing.

    TensorRT-RTX is not captured: it swaps better kernels in while it runs, which a capture would never see.
    """

    def __init__(
        self,
        name: str,
        queue: Queue,
        context: Any,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        capturable: bool,
    ) -> None:
        self._name, self._queue, self._context = name, queue, context
        self.capturable = capturable
        self.inputs: Mapping[str, Array] = inputs
        self.outputs: Mapping[str, Array] = outputs
        for key, array in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(key, array.pointer)

    def run(self, stream: int | None = None) -> None:
        """See Binding.run; on the engine's own queue where no stream is given."""
        if not self._context.execute_async_v3(self._queue.stream if stream is None else stream):
            raise EngineError(f"graph {self._name!r} failed on {self._queue.device.name}")


def fitting_plans(
    bundle: Bundle, graph: Graph, flavour: Flavour, version: str, target: str
) -> list[tuple[PlanCache, PlanKey]]:
    """The plans of a graph that this library made for this GPU.

    Raises UsageError where there is none and none can be made here.
    """
    folders = (bundle.path / PLANS).glob(f"{flavour}-{version}-*")
    targets = [folder.name.removeprefix(f"{flavour}-{version}-").replace("+", ",") for folder in sorted(folders)]
    caches = [plan_cache(bundle, flavour, version, each) for each in targets if target in each.split(",")]
    plans = [
        (cache, key)
        for cache in caches
        for key in cache.recorded()
        if (key.graph_digest, key.precision) == (graph.digest, graph.precision)
    ]
    if not plans and flavour is Flavour.RTX and target not in RTX_TARGETS:
        raise UsageError(
            f"this GPU is {target}, {flavour} builds for {', '.join(RTX_TARGETS)}"
            + (f" (the bundle has plans for {', '.join(targets)})" if targets else "")
            + ": use --engine tensorrt"
        )
    return plans


def narrowest(
    graph: str, plans: Sequence[tuple[PlanCache, PlanKey]], sizes: Mapping[str, int]
) -> tuple[PlanCache, PlanKey]:
    """The plan with the least room that still takes these sizes. Raises FeedError where none does."""
    fitting = [(cache, key) for cache, key in plans if not outside(key.ranges, sizes)]
    if not fitting:
        ranges = plans[0][1].ranges
        axis, size = next(iter(outside(ranges, sizes).items()))
        smallest, _, largest = ranges[axis]
        raise FeedError(
            f"{graph} was given {axis} = {size}, its plan takes {smallest} to {largest}: "
            "build it with ti-export --max-batch, --max-size or --static-size"
        )
    return min(fitting, key=lambda plan: sum(largest - least for least, _, largest in plan[1].ranges.values()))


def outside(ranges: Ranges, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that a plan of these ranges does not take."""
    return {axis: size for axis, size in sizes.items() if not ranges[axis][0] <= size <= ranges[axis][2]}


def known_shape(context: Any, name: str) -> Shape | None:
    """The shape that a plan infers for an output, where it can tell before it runs."""
    shape = tuple(int(size) for size in context.get_tensor_shape(name))
    return None if any(size < 0 for size in shape) else shape


@cache
def _runtime(flavour: Flavour) -> Any:
    try:
        trt = importlib.import_module(flavour.replace("-", "_"))
    except ImportError as error:
        raise MissingPackage(str(flavour), str(flavour)) from error
    return trt.Runtime(trt.Logger(trt.Logger.ERROR))


def _memory(device: Device) -> str:
    free, total = device.memory()
    return (
        f"{free >> 20} of {total >> 20} MiB of {device.name} are free; make it with a smaller --max-batch or --max-size"
    )
