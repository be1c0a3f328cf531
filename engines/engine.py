"""What an engine is: a compiled graph that is bound to fixed buffers and run. No back end, and nothing of diffusion."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import EngineError, FeedError
from oneword.engines.spec import DType, TensorSpec

NumpyArray: TypeAlias = npt.NDArray[Any]
Region: TypeAlias = Any  # what numpy takes between [ ]: an int, a slice, Ellipsis, or a tuple of them
Shape: TypeAlias = tuple[int, ...]


class Array(Protocol):
    """A tensor that stays on the device where it was made until `numpy()` is asked for."""

    @property
    def shape(self) -> Shape: ...

    def numpy(self) -> NumpyArray:
        """The values on the host; a view where the device is the host."""
        ...

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region in place, cast to the array's dtype."""
        ...

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


Given: TypeAlias = NumpyArray | Array
"""An input that lies somewhere already: in memory of the host, or of the device, where an engine's queue put it."""


class Binding(Protocol):
    """A graph at fixed shapes with fixed buffers: write `inputs`, `run()`, read `outputs`, as often as you like."""

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


class Engine(Protocol):
    """One compiled graph."""

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str:
        """The back end, its version and what it computes in, as it is reported: `onnxruntime 1.32.0 cpu fp32`."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def bind(self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, Given] | None = None) -> Binding:
        """Buffers for every input and output, inputs filled with zeros.

        `shapes` gives the shape of every input (an optional one may lack where other inputs fix its axes), and of an
        output whose axes no input has. An input in `arrays` is read where it lies, without a copy, if that is where
        the engine runs. Raises FeedError.
        """
        ...

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """One call, host to host. Raises FeedError before, EngineError in the engine."""
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

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region in place."""
        self._values[region] = values

    def __dlpack__(self) -> Any:
        return self._values.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._values.__dlpack_device__()
        return int(kind), int(index)


def on_host(given: Given) -> NumpyArray:
    """The values on the host: where they lie, if that is there."""
    return given if isinstance(given, np.ndarray) else given.numpy()


_NUMPY: dict[DType, np.dtype[Any]] = {dtype: np.dtype(dtype.value) for dtype in DType if dtype is not DType.BFLOAT16}
_NUMPY[DType.BFLOAT16] = np.dtype(np.uint16)  # numpy has none: the bits


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype that holds a tensor's elements; bfloat16 as its bits in uint16."""
    return _NUMPY[dtype]


def bfloat16_bits(values: NumpyArray) -> npt.NDArray[np.uint16]:
    """Numbers as the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def check_shapes(
    graph: str, specs: Mapping[str, TensorSpec], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], dict[str, Shape]]:
    """Sizes of the named axes, and the shape of every input; the first thing wrong raises FeedError."""
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
                raise FeedError(f"{name!r} of {graph} is {_x(shape)}: every axis of {spec} is at least 1")
    return sizes, {name: shape_of(graph, spec, sizes) for name, spec in specs.items()}


def host_buffers(
    graph: str,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    shapes: Mapping[str, Sequence[int]],
    given_arrays: Mapping[str, Given] | None,
) -> tuple[dict[str, NumpyArray], dict[str, NumpyArray]]:
    """Host memory for every input and output: arrays as they lie, zeros for the rest. See Engine.bind."""
    arrays = {name: on_host(array) for name, array in (given_arrays or {}).items()}
    given = {name: tuple(shape) for name, shape in shapes.items()} | {n: a.shape for n, a in arrays.items()}
    of_outputs = {name: given.pop(name) for name in [*given] if name in outputs}
    sizes, input_shapes = check_shapes(graph, inputs, given)
    for name, value in arrays.items():
        check_dtype(graph, inputs[name], value.dtype)
        if not value.flags.c_contiguous:
            raise FeedError(f"{name!r} of {graph} is not contiguous: pass numpy.ascontiguousarray of it")
    return (
        {
            name: arrays[name] if name in arrays else np.zeros(shape, numpy_dtype(inputs[name].dtype))
            for name, shape in input_shapes.items()
        },
        {
            name: np.zeros(of_outputs.get(name) or shape_of(graph, spec, sizes), numpy_dtype(spec.dtype))
            for name, spec in outputs.items()
        },
    )


def check_feeds(graph: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, NumpyArray]) -> dict[str, Shape]:
    """The shape of every input, optional ones included; the first wrong name, dtype or shape raises FeedError."""
    _check_names(graph, specs, feeds)
    for name, value in feeds.items():
        check_dtype(graph, specs[name], value.dtype)
    return check_shapes(graph, specs, {name: value.shape for name, value in feeds.items()})[1]


def complete_feeds(
    graph: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, NumpyArray]
) -> dict[str, NumpyArray]:
    """Every input, C-contiguous, zeros for those left out. Raises as check_feeds does."""
    shapes = check_feeds(graph, specs, feeds)
    missing = {name: np.zeros(shapes[name], numpy_dtype(specs[name].dtype)) for name in shapes.keys() - feeds.keys()}
    return {name: np.ascontiguousarray(value) for name, value in {**feeds, **missing}.items()}


def check_opened(graph: str, path: Path, specs: Mapping[str, TensorSpec], opened: Iterable[str]) -> None:
    """Raises EngineError where an opened graph takes other inputs than its manifest says."""
    given = set(opened)
    if given != set(specs):
        raise EngineError(
            f"graph {graph!r} ({path}) takes {', '.join(sorted(given))}, "
            f"its manifest says {', '.join(sorted(specs))}: export the model again with ti-export"
        )


def check_dtype(graph: str, spec: TensorSpec, dtype: np.dtype[Any]) -> None:
    """Raises FeedError where elements of this dtype are not what the graph takes."""
    if dtype != numpy_dtype(spec.dtype):
        raise FeedError(f"{spec.name!r} of {graph} is {dtype}, the graph takes {spec}: cast it to {spec.dtype}")


def shape_of(graph: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor where its named axes have these sizes. Raises FeedError naming the axis that lacks."""
    for axis in spec.axes:
        if isinstance(axis, str) and axis not in sizes:
            raise FeedError(f"no shape was given that fixes axis {axis} of {spec} of {graph}: give the shape of it")
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes)


def _check_names(graph: str, specs: Mapping[str, TensorSpec], given: Mapping[str, object]) -> None:
    for name in given:
        if name not in specs:
            raise FeedError(f"{graph} has no input {name!r}, it takes {', '.join(specs)}")
    missing = [name for name, spec in specs.items() if name not in given and not spec.optional]
    if missing:
        raise FeedError(f"{graph} was not given {', '.join(missing)}; it takes {', '.join(specs)}")


def _x(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)
