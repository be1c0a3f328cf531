"""CUDA through cuda-python: a device, its arrays, a stream and its captures. The only module that imports `cuda`.

Memory, execution order and the replay of captured work. Not covered: kernels.
"""

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import (
    AnyArray,
    Array,
    Binding,
    Event,
    NumpyArray,
    Region,
    Replay,
    Shape,
    bound_shapes,
    check_dtype,
    numpy_dtype,
)
from oneword.engines.errors import EngineError, not_imported
from oneword.engines.graph import TensorSpec

_NO_TIMING = 2  # cudaEventDisableTiming
_NON_BLOCKING = 1  # cudaStreamNonBlocking: no order with the default stream, which other libraries may use


class Device:
    """One NVIDIA GPU.

    Raises:
        MissingPackage: cuda-python is not installed.
        EngineError: there is no GPU, or its driver is missing or too old.
    """

    def __init__(self, index: int = 0) -> None:
        self.runtime = _runtime()
        self.index = index
        self._refuse_old_drivers()
        count = self.call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise EngineError(f"there is no GPU {index}, this machine has {count}: check CUDA_VISIBLE_DEVICES")
        self.call("cudaSetDevice", index)
        attribute = self.runtime.cudaDeviceAttr
        self.capability = (
            int(self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, index)),
            int(self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, index)),
        )
        self.reads_pageable_memory = bool(
            self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrPageableMemoryAccess, index)
        )
        """Whether a queued copy may read host memory that is not pinned when it runs; other GPUs read it at once."""
        self.name = self.call("cudaGetDeviceProperties", index).name.decode()

    @property
    def target(self) -> str:
        """`sm89` for capability (8, 9)."""
        return "sm{}{}".format(*self.capability)

    def call(self, function: str, *arguments: Any) -> Any:
        """Calls a CUDA runtime function and returns its result. Raises EngineError with the runtime's message."""
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status) != 0:
            message = self.runtime.cudaGetErrorString(status)[1].decode()
            raise EngineError(f"{function} failed on GPU {self.index}: {message}")
        return values[0] if values else None

    def memory(self) -> tuple[int, int]:
        """Free and total memory in bytes."""
        status, free, total = self.runtime.cudaMemGetInfo()
        if int(status) != 0:
            raise EngineError(f"cudaMemGetInfo failed on GPU {self.index}")
        return int(free), int(total)

    def _refuse_old_drivers(self) -> None:
        """Raises EngineError for a missing or old driver, before another call fails with a less helpful message."""
        required, installed = (getattr(self.runtime, f"cuda{part}GetVersion")()[1] for part in ("Runtime", "Driver"))
        status = self.runtime.cudaGetDeviceCount()[0]
        if installed == 0 or status == self.runtime.cudaError_t.cudaErrorInsufficientDriver:
            has = "there is none" if installed == 0 else f"this one supports CUDA {_version(installed)}"
            raise EngineError(
                f"an NVIDIA driver for CUDA {required // 1000} or newer is needed and {has}: "
                "install or update the driver"
            )
        if status == self.runtime.cudaError_t.cudaErrorNoDevice:
            raise EngineError("the NVIDIA driver finds no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES")


class CudaStream:
    """An in-order stream of a device; nothing waits until values are read. See oneword.engines.engine.Stream."""

    depth = 1

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = int(device.call("cudaStreamCreateWithFlags", _NON_BLOCKING))
        weakref.finalize(self, device.runtime.cudaStreamDestroy, self.handle)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> "DeviceArray":
        """An array of zeros."""
        return DeviceArray(self, shape, np.dtype(dtype))

    def put(self, values: NumpyArray) -> "DeviceArray":
        """Copies a host array to the device."""
        array = self.empty(values.shape, values.dtype)
        self.send(array.pointer, np.ascontiguousarray(values))
        return array

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> NumpyArray:
        """See Stream. The memory is freed with the array, once the stream has finished all work queued so far."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        pointer = int(self.device.call("cudaMallocHost", max(size, 1)))
        memory = (ctypes.c_uint8 * size).from_address(pointer)
        ctypes.memset(pointer, 0, size)
        runtime = self.device.runtime
        weakref.finalize(memory, _free, runtime, self.handle, runtime.cudaFreeHost, pointer)
        return np.ndarray(shape, dtype, memory)  # type: ignore[arg-type]

    def buffers(
        self,
        graph: str,
        input_specs: Mapping[str, TensorSpec],
        output_specs: Mapping[str, TensorSpec],
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None,
        outputs: Mapping[str, AnyArray] | None,
    ) -> tuple[dict[str, "DeviceArray"], dict[str, "DeviceArray"]]:
        """Device memory for every input and output: given device arrays in place, copies of given host arrays, zeros
        for the rest. See Engine.bind."""
        arrays = {**(inputs or {}), **(outputs or {})}
        specs = {**input_specs, **output_specs}
        _, input_shapes, output_shapes = bound_shapes(
            graph, input_specs, output_specs, shapes, {name: array.shape for name, array in arrays.items()}
        )

        def buffer(name: str, shape: Shape) -> DeviceArray:
            array = arrays.get(name)
            if array is None:
                return self.empty(shape, numpy_dtype(specs[name].dtype))
            if not isinstance(array, DeviceArray):
                array = self.put(array if isinstance(array, np.ndarray) else array.numpy())
            check_dtype(graph, specs[name], array.dtype)
            return array

        return (
            {name: buffer(name, shape) for name, shape in input_shapes.items()},
            {name: buffer(name, shape) for name, shape in output_shapes.items()},
        )

    def upload(self, target: Array, source: NumpyArray) -> None:
        """See Stream."""
        assert isinstance(target, DeviceArray)
        self.transfer(target.pointer, source.ctypes.data, target.nbytes, "HostToDevice")

    def download(self, target: NumpyArray, source: Array) -> None:
        """See Stream."""
        assert isinstance(source, DeviceArray)
        self.transfer(target.ctypes.data, source.pointer, source.nbytes, "DeviceToHost")

    def copy(self, target: Array, source: Array) -> None:
        """See Stream."""
        self.load_row(target, source, 0)

    def load_row(self, target: Array, source: Array, row: int) -> None:
        """See Stream."""
        assert isinstance(target, DeviceArray)
        assert isinstance(source, DeviceArray)
        self.transfer(target.pointer, source.pointer + row * target.nbytes, target.nbytes, "DeviceToDevice")

    def run(self, binding: Binding) -> None:
        """See Stream."""
        binding.run(self.handle)

    def send(self, target: int, source: NumpyArray) -> None:
        """Copies contiguous host memory, which need not be pinned and may be changed afterwards, to an address."""
        self.transfer(target, source.ctypes.data, source.nbytes, "HostToDevice")
        if self.device.reads_pageable_memory:
            self.wait()

    def transfer(self, target: int, source: int, size: int, kind: str) -> None:
        """Queues a copy of `size` bytes between addresses. Memory of the host should be pinned: see `send`."""
        kinds = self.device.runtime.cudaMemcpyKind
        direction = getattr(kinds, f"cudaMemcpy{kind}")
        self.device.call("cudaMemcpyAsync", target, source, size, direction, self.handle)

    def capture(self, work: Callable[[], None]) -> Replay:
        """See Stream. `work` must have run before: libraries allocate and tune in their first calls."""
        call, runtime = self.device.call, self.device.runtime
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # an array that is collected during the capture would free memory, which breaks it
        try:
            call("cudaStreamBeginCapture", self.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                work()
            except BaseException:
                status, *graphs = runtime.cudaStreamEndCapture(self.handle)  # a stream that captures refuses other work
                if int(status) == 0:
                    runtime.cudaGraphDestroy(*graphs)
                raise
            graph = call("cudaStreamEndCapture", self.handle)
        finally:
            if collecting:
                gc.enable()
        try:
            executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)
        return _Captured(self, executable)

    def record(self) -> Event:
        """See Stream."""
        return CudaEvent(self)

    def wait(self) -> None:
        """Waits until everything queued so far is done."""
        self.device.call("cudaStreamSynchronize", self.handle)

    def memory_in_use(self) -> int:
        """See Stream."""
        free, total = self.device.memory()
        return total - free


class CudaEvent:
    """A point in a stream, recorded at construction."""

    def __init__(self, stream: CudaStream) -> None:
        self._device = stream.device
        self._handle = stream.device.call("cudaEventCreateWithFlags", _NO_TIMING)
        weakref.finalize(self, stream.device.runtime.cudaEventDestroy, self._handle)
        stream.device.call("cudaEventRecord", self._handle, stream.handle)

    def wait(self) -> None:
        """See Event."""
        self._device.call("cudaEventSynchronize", self._handle)


class _Captured:
    """A captured graph; a call queues it once."""

    def __init__(self, stream: CudaStream, executable: Any) -> None:
        self._stream, self._executable = stream, executable
        weakref.finalize(self, stream.device.runtime.cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        self._stream.device.call("cudaGraphLaunch", self._executable, self._stream.handle)


class DeviceArray:
    """A C-contiguous tensor on a GPU, initially zeros. Reads and writes are in the order of its stream."""

    def __init__(self, stream: CudaStream, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.stream, self.dtype = stream, dtype
        self._shape = tuple(shape)
        self.nbytes = math.prod(self._shape) * dtype.itemsize
        device = stream.device
        self.pointer = int(device.call("cudaMalloc", max(self.nbytes, 1)))
        weakref.finalize(self, _free, device.runtime, stream.handle, device.runtime.cudaFree, self.pointer)
        device.call("cudaMemsetAsync", self.pointer, 0, self.nbytes, stream.handle)

    @property
    def shape(self) -> Shape:
        """Sizes of the axes."""
        return self._shape

    def numpy(self) -> NumpyArray:
        """A copy on the host, made once everything queued so far is done."""
        values = np.empty(self._shape, self.dtype)
        self.stream.transfer(values.ctypes.data, self.pointer, self.nbytes, "DeviceToHost")
        self.stream.wait()
        return values

    def read(self, region: Region) -> NumpyArray:
        """A copy of one region. Only the region is transferred if it is contiguous, otherwise the whole array is."""
        part = contiguous_part(self._mirror, region)
        if part is None:
            return np.array(self.numpy()[region])
        values = np.empty(part.shape, self.dtype)
        offset = part.ctypes.data - self._mirror.ctypes.data
        self.stream.transfer(values.ctypes.data, self.pointer + offset, part.nbytes, "DeviceToHost")
        self.stream.wait()
        return values

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region: one transfer if it is contiguous, otherwise the array is read, changed and written."""
        part = contiguous_part(self._mirror, region)
        if part is None:
            self._mirror[...] = self.numpy()
            self._mirror[region] = values
            part = self._mirror
        else:
            part[...] = values
        offset = part.ctypes.data - self._mirror.ctypes.data
        self.stream.send(self.pointer + offset, part)

    @cached_property
    def _mirror(self) -> NumpyArray:
        """Host memory of the same shape; pages that are never written take no memory."""
        return np.empty(self._shape, self.dtype)


def contiguous_part(host: NumpyArray, region: Region) -> NumpyArray | None:
    """The view of `host` that `region` selects, or None if that is a copy or not contiguous."""
    key = region if isinstance(region, tuple) else (region,)
    if not all(isinstance(k, (int, np.integer, slice)) or k is Ellipsis for k in key):
        return None
    part = host[(*key, ...)] if Ellipsis not in key else host[key]  # with ..., numpy returns views, never scalars
    return part if part.flags.c_contiguous else None


def _free(runtime: Any, stream: int, free: Callable[[int], object], pointer: int) -> None:
    """Frees memory once no queued work can use it any more."""
    runtime.cudaStreamSynchronize(stream)
    free(pointer)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise not_imported("cuda-python", "cuda", error) from error
    return runtime


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
