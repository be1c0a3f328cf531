"""The engine protocol: a compiled graph, bound to fixed buffers and run on a stream. No backend, no diffusion."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import EngineError, FeedError
from oneword.engines.graph import DType, Graph, TensorSpec

NumpyArray: TypeAlias = npt.NDArray[Any]
Region: TypeAlias = Any  # what numpy accepts between [ ]: an int, a slice, Ellipsis, or a tuple of them
Shape: TypeAlias = tuple[int, ...]


class Array(Protocol):
    """A tensor that stays on the device where it was created until its values are read."""

    @property
    def shape(self) -> Shape: ...

    def numpy(self) -> NumpyArray:
        """All values on the host; a view if the device is the host."""
        ...

    def read(self, region: Region) -> NumpyArray:
        """A copy of one region on the host."""
        ...

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region in place, cast to the array's dtype."""
        ...


AnyArray: TypeAlias = NumpyArray | Array
"""An existing array, on the host or on the device."""


class Binding(Protocol):
    """A graph at fixed shapes with fixed buffers: write `inputs`, `run()`, read `outputs`, any number of times."""

    @property
    def inputs(self) -> Mapping[str, Array]: ...

    @property
    def outputs(self) -> Mapping[str, Array]: ...

    @property
    def capturable(self) -> bool:
        """Whether runs on a stream may be captured there and replayed."""
        ...

    def run(self, stream: int | None = None) -> None:
        """Computes the outputs. Raises EngineError."""
        ...

    def specialize(self) -> None:
        """Compiles the graph for these shapes only, if that makes runs faster; takes seconds."""
        ...


class ShapeUse(Enum):
    """What the shapes of bindings mean to an engine."""

    ANY = auto()
    """All shapes are bound at once and run equally well."""
    PADDED = auto()
    """Bindings are faster once specialized, so that a few padded shapes are better than exact ones."""
    FIRST = auto()
    """The graph is compiled for the first shapes that are bound, and again, for any shape, once others are."""


class Engine(Protocol):
    """One compiled graph."""

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str:
        """The backend, its version and the precision it computes in, for reports: `onnxruntime 1.32.0 cpu fp32`."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of each named axis that has a limit. Callers split larger work into several calls."""
        ...

    @property
    def shape_use(self) -> ShapeUse:
        """Which shapes are best bound."""
        ...

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> Binding:
        """Returns a binding with a buffer for every input and output: the given array if there is one, else zeros.

        `shapes` gives the shape of every input that is not in `inputs` (an optional one may be missing if other inputs
        fix its axes), and of an output with an axis that no input has. Given arrays on the engine's device are used in
        place, without a copy, so several bindings can share buffers. Raises FeedError.
        """
        ...

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """One call, host to host. Raises FeedError before the engine is called, EngineError if it fails."""
        ...


Replay: TypeAlias = Callable[[], None]
"""Queues the captured work again."""


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Returns once everything queued before this point is done. Raises EngineError."""
        ...


class Stream(Protocol):
    """An in-order execution queue: a CUDA stream or the host."""

    @property
    def depth(self) -> int:
        """How many steps may be queued ahead of the running one: 0 on the host, where nothing is queued."""
        ...

    def put(self, values: NumpyArray) -> Array:
        """An array with these values on the stream's device. On the host it is the values themselves."""
        ...

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> NumpyArray:
        """Host memory (zeros) that `upload` and `download` may use while the host continues."""
        ...

    def upload(self, target: Array, source: NumpyArray) -> None:
        """Queues target = source. Pinned memory must stay unchanged until an event recorded later is done."""
        ...

    def download(self, target: NumpyArray, source: Array) -> None:
        """Queues target = source. Read `target` once an event recorded later is done."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Queues target = source, both on the stream's device."""
        ...

    def load_row(self, target: Array, source: Array, row: int) -> None:
        """Queues target = source[row], both on the stream's device."""
        ...

    def run(self, binding: Binding) -> None:
        """Queues one run of the binding's graph."""
        ...

    def capture(self, work: Callable[[], None]) -> Replay:
        """Records what `work` queues, without executing it, for replay as one unit. Raises EngineError."""
        ...

    def record(self) -> Event:
        """The point after everything queued so far."""
        ...

    def memory_in_use(self) -> int | None:
        """Bytes of device memory in use by all processes; None on the host."""
        ...


class HostArray:
    """A tensor in host memory."""

    def __init__(self, values: NumpyArray) -> None:
        self._values = values

    @property
    def shape(self) -> Shape:
        """Sizes of the axes."""
        return self._values.shape

    def numpy(self) -> NumpyArray:
        """The buffer itself."""
        return self._values

    def read(self, region: Region) -> NumpyArray:
        """A copy of one region."""
        return np.array(self._values[region])

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region in place."""
        self._values[region] = values


class HostStream:
    """The host as a stream: everything runs immediately. It is also its own event, which is done when recorded."""

    depth = 0

    def put(self, values: NumpyArray) -> Array:
        """See Stream."""
        return HostArray(values)

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> NumpyArray:
        """See Stream."""
        return np.zeros(shape, dtype)

    def upload(self, target: Array, source: NumpyArray) -> None:
        """See Stream."""
        target.write(..., source)

    def download(self, target: NumpyArray, source: Array) -> None:
        """See Stream."""
        target[...] = source.numpy()

    def copy(self, target: Array, source: Array) -> None:
        """See Stream."""
        target.write(..., source.numpy())

    def load_row(self, target: Array, source: Array, row: int) -> None:
        """See Stream."""
        target.write(..., source.numpy()[row])

    def run(self, binding: Binding) -> None:
        """See Stream."""
        binding.run()

    def capture(self, work: Callable[[], None]) -> Replay:
        """See Stream. A replay calls `work` again."""
        return work

    def record(self) -> Event:
        """See Stream."""
        return self

    def wait(self) -> None:
        """See Event."""

    def memory_in_use(self) -> None:
        """See Stream."""


def on_host(array: AnyArray) -> NumpyArray:
    """The values on the host, without a copy if they are already there."""
    return array if isinstance(array, np.ndarray) else array.numpy()


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype of a tensor's elements."""
    return np.dtype(dtype.value)


def check_shapes(
    graph: str, specs: Mapping[str, TensorSpec], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], dict[str, Shape]]:
    """Sizes of the named axes, and the shape of every input. Raises FeedError at the first mismatch."""
    _check_names(graph, specs, shapes)
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, spec in specs.items():
        shape = tuple(shapes.get(name, ()))
        if name not in shapes:
            continue
        if len(shape) != len(spec.axes):
            raise FeedError(f"{name!r} of {graph} has {len(shape)} axes {_x(shape)}, the graph takes {spec}")
        for axis, size in zip(spec.axes, shape, strict=True):
            if isinstance(axis, int) and size != axis:
                raise FeedError(
                    f"{name!r} of {graph} is {_x(shape)}, the graph takes {spec}: "
                    "give that shape, or export the model for it with ti-export"
                )
            if isinstance(axis, str) and size != sizes.setdefault(axis, size):
                raise FeedError(
                    f"{name!r} of {graph} is {_x(shape)}, so {axis} = {size}, "
                    f"but {first[axis]!r} has {axis} = {sizes[axis]}: both must agree in {spec}"
                )
            if isinstance(axis, str):
                first.setdefault(axis, name)
            if size < 1:
                raise FeedError(f"{name!r} of {graph} is {_x(shape)}: every axis of {spec} must be at least 1")
    return sizes, {name: shape_of(graph, spec, sizes) for name, spec in specs.items()}


def host_buffers(
    graph: str,
    input_specs: Mapping[str, TensorSpec],
    output_specs: Mapping[str, TensorSpec],
    shapes: Mapping[str, Sequence[int]],
    inputs: Mapping[str, AnyArray] | None,
    outputs: Mapping[str, AnyArray] | None,
) -> tuple[dict[str, NumpyArray], dict[str, NumpyArray]]:
    """Host memory for every input and output: given arrays in place, zeros for the rest. See Engine.bind."""
    arrays = {name: on_host(array) for name, array in {**(inputs or {}), **(outputs or {})}.items()}
    specs = {**input_specs, **output_specs}
    _, input_shapes, output_shapes = bound_shapes(
        graph, input_specs, output_specs, shapes, {name: array.shape for name, array in arrays.items()}
    )
    for name, value in arrays.items():
        check_dtype(graph, specs[name], value.dtype)
        if not value.flags.c_contiguous:
            raise FeedError(f"{name!r} of {graph} is not contiguous: pass numpy.ascontiguousarray of it")

    def buffer(name: str, shape: Shape) -> NumpyArray:
        return arrays[name] if name in arrays else np.zeros(shape, numpy_dtype(specs[name].dtype))

    return (
        {name: buffer(name, shape) for name, shape in input_shapes.items()},
        {name: buffer(name, shape) for name, shape in output_shapes.items()},
    )


def bound_shapes(
    graph: str,
    input_specs: Mapping[str, TensorSpec],
    output_specs: Mapping[str, TensorSpec],
    shapes: Mapping[str, Sequence[int]],
    array_shapes: Mapping[str, Shape],
) -> tuple[dict[str, int], dict[str, Shape], dict[str, Shape]]:
    """Sizes of the named axes, and the shapes of every input and output of a binding. Raises FeedError.

    `shapes` and `array_shapes` are by name, for inputs and outputs alike: what `bind` was passed as shapes, and the
    shapes of the arrays it was passed; see Engine.bind.
    """
    all_shapes = {name: tuple(shape) for name, shape in {**shapes, **array_shapes}.items()}
    fixed_outputs = {name: all_shapes.pop(name) for name in [*all_shapes] if name in output_specs}
    sizes, input_shapes = check_shapes(graph, input_specs, all_shapes)
    output_shapes = {}
    for name, spec in output_specs.items():
        output_shapes[name] = fixed_outputs.get(name) or shape_of(graph, spec, sizes)
        _check_output(graph, spec, output_shapes[name], sizes)
    return sizes, input_shapes, output_shapes


def check_feeds(graph: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, NumpyArray]) -> dict[str, Shape]:
    """The shape of every input, optional ones included. Raises FeedError at the first wrong name, dtype or shape."""
    _check_names(graph, specs, feeds)
    for name, value in feeds.items():
        check_dtype(graph, specs[name], value.dtype)
    return check_shapes(graph, specs, {name: value.shape for name, value in feeds.items()})[1]


def complete_feeds(
    graph: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, NumpyArray]
) -> dict[str, NumpyArray]:
    """Every input, C-contiguous, zeros for omitted ones. Raises as check_feeds does."""
    shapes = check_feeds(graph, specs, feeds)
    missing = {name: np.zeros(shapes[name], numpy_dtype(specs[name].dtype)) for name in shapes.keys() - feeds.keys()}
    return {name: np.ascontiguousarray(value) for name, value in {**feeds, **missing}.items()}


def check_opened(
    name: str,
    path: Path,
    graph: Graph,
    inputs: Mapping[str, Sequence[object]],
    outputs: Mapping[str, Sequence[object]],
) -> None:
    """Raises EngineError if an opened graph has other inputs or outputs than its manifest says.

    `inputs` and `outputs` are the opened shapes by name: a number for every fixed axis, empty if unknown.
    """
    for verb, specs, opened in (("takes", graph.inputs, inputs), ("returns", graph.outputs, outputs)):
        if opened.keys() != {spec.name for spec in specs}:
            raise EngineError(
                f"graph {name!r} ({path}) {verb} {', '.join(sorted(opened))}, "
                f"its manifest says {', '.join(sorted(spec.name for spec in specs))}: export the model again with "
                "ti-export"
            )
        for spec in specs:
            shape = opened[spec.name]
            if shape and not _same_axes(spec.axes, shape):
                raise EngineError(
                    f"graph {name!r} ({path}) {verb} {spec.name} [{', '.join(map(str, shape))}], "
                    f"its manifest says {spec}: export the model again with ti-export"
                )


def _same_axes(axes: Sequence[str | int], shape: Sequence[object]) -> bool:
    """Whether an opened shape has as many axes, and the same sizes where both are numbers."""
    if len(axes) != len(shape):
        return False
    pairs = zip(axes, shape, strict=True)
    return all(axis == size for axis, size in pairs if isinstance(axis, int) and isinstance(size, int))


def check_dtype(graph: str, spec: TensorSpec, dtype: np.dtype[Any]) -> None:
    """Raises FeedError if this is not the dtype that the graph takes."""
    if dtype != numpy_dtype(spec.dtype):
        raise FeedError(f"{spec.name!r} of {graph} is {dtype}, the graph takes {spec}: cast it to {spec.dtype}")


def shape_of(graph: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor whose named axes have these sizes. Raises FeedError that names an axis without a size."""
    for axis in spec.axes:
        if isinstance(axis, str) and axis not in sizes:
            raise FeedError(f"no given shape fixes axis {axis} of {spec} of {graph}: pass the shape of {spec.name!r}")
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes)


def _check_output(graph: str, spec: TensorSpec, shape: Shape, sizes: Mapping[str, int]) -> None:
    """Raises FeedError if the graph would write past the end of an output of this shape, or not fill it."""
    expected = [sizes.get(axis) if isinstance(axis, str) else axis for axis in spec.axes]
    if len(shape) != len(expected) or any(size not in (None, has) for size, has in zip(expected, shape, strict=True)):
        fixed = ", ".join(f"{axis} = {sizes[axis]}" for axis in spec.axes if isinstance(axis, str) and axis in sizes)
        raise FeedError(
            f"{spec.name!r} of {graph} has shape {_x(shape)}, the graph returns {spec}"
            + (f" with {fixed}" if fixed else "")
        )


def _check_names(graph: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, object]) -> None:
    for name in feeds:
        if name not in specs:
            raise FeedError(f"{graph} has no input {name!r}, it takes {', '.join(specs)}")
    missing = [name for name, spec in specs.items() if name not in feeds and not spec.optional]
    if missing:
        raise FeedError(f"{graph} was not given {', '.join(missing)}; it takes {', '.join(specs)}")


def _x(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)
