"""CUDA through cuda-python: a device, its arrays, a queue of work and its capture. The only module to import `cuda`.

No kernels: everything here is memory, order, and replaying what was captured.
"""

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Array, Binding, Given, NumpyArray, Region, Shape, check_dtype, host_buffers
from oneword.engines.errors import EngineError, MissingPackage
from oneword.engines.loop import Replay
from oneword.engines.spec import TensorSpec

_NON_BLOCKING = 1  # cudaStreamNonBlocking: no order with the default stream, which others may use


class Device:
    """One NVIDIA GPU.

    Raises:
        MissingPackage: cuda-python is not installed.
        EngineError: there is no GPU, or its driver is absent or too old.
    """

    def __init__(self, index: int = 0) -> None:
        self.runtime = _runtime()
        self.index = index
        self._refuse_old_drivers()
        count = self.call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise EngineError(f"there is no GPU {index}, this machine has {count}")
        self.call("cudaSetDevice", index)
        attribute = self.runtime.cudaDeviceAttr
        self.capability = (
            int(self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, index)),
            int(self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, index)),
        )
        self.name = self.call("cudaGetDeviceProperties", index).name.decode()

    @property
    def target(self) -> str:
        """`sm89` for capability (8, 9)."""
        return "sm{}{}".format(*self.capability)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the runtime gives. Raises EngineError with the runtime's own words."""
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status) != 0:
            words = self.runtime.cudaGetErrorString(status)[1].decode()
            raise EngineError(f"{function} failed on GPU {self.index}: {words}")
        return values[0] if values else None

    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes in all."""
        status, free, total = self.runtime.cudaMemGetInfo()
        if int(status) != 0:
            raise EngineError(f"cudaMemGetInfo failed on GPU {self.index}")
        return int(free), int(total)

    def _refuse_old_drivers(self) -> None:
        """Before anything else fails with less to say."""
        needed, found = (getattr(self.runtime, f"cuda{which}GetVersion")()[1] for which in ("Runtime", "Driver"))
        status = self.runtime.cudaGetDeviceCount()[0]
        if found == 0 or status == self.runtime.cudaError_t.cudaErrorInsufficientDriver:
            has = "there is none" if found == 0 else f"this one reaches CUDA {_version(found)}"
            raise EngineError(
                f"an NVIDIA driver for CUDA {_version(needed)} is needed and {has}: install or update the driver"
            )
        if status == self.runtime.cudaError_t.cudaErrorNoDevice:
            raise EngineError("the NVIDIA driver sees no GPU: plug one in, or look at CUDA_VISIBLE_DEVICES")


class Queue:
    """Work in order on one stream of a device; nothing waits until somebody reads. See oneword.engines.loop.Queue."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = int(device.call("cudaStreamCreateWithFlags", _NON_BLOCKING))
        weakref.finalize(self, device.runtime.cudaStreamDestroy, self.stream)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> "DeviceArray":
        """An array of zeros."""
        return DeviceArray(self, shape, np.dtype(dtype))

    def put(self, values: NumpyArray) -> "DeviceArray":
        """A copy of an array on the device."""
        array = self.empty(values.shape, values.dtype)
        values = np.ascontiguousarray(values)
        self.transfer(array.pointer, values.ctypes.data, values.nbytes, "HostToDevice")
        return array

    def buffers(
        self,
        graph: str,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        shapes: Mapping[str, Sequence[int]],
        arrays: Mapping[str, Given],
    ) -> tuple[dict[str, "DeviceArray"], dict[str, "DeviceArray"]]:
        """Memory of the device for every input and output: `arrays` that are there as they lie, a copy of those on the
        host, zeros for the rest. See Engine.bind."""
        there = {name: array for name, array in arrays.items() if isinstance(array, DeviceArray)}
        here = {name: array for name, array in arrays.items() if name not in there}
        for name, array in there.items():
            check_dtype(graph, inputs[name], array.dtype)
        given = {**shapes, **{name: array.shape for name, array in there.items()}}
        hosts = host_buffers(graph, inputs, outputs, given, here)

        def lies(name: str, like: NumpyArray) -> DeviceArray:
            if name in there:
                return there[name]
            return self.put(like) if name in here else self.empty(like.shape, like.dtype)

        of_inputs, of_outputs = ({name: lies(name, like) for name, like in each.items()} for each in hosts)
        return of_inputs, of_outputs

    def copy(self, target: Array, source: Array, row: int | None = None) -> None:
        """See loop.Queue."""
        assert isinstance(target, DeviceArray)
        assert isinstance(source, DeviceArray)
        offset = 0 if row is None else row * target.nbytes
        self.transfer(target.pointer, source.pointer + offset, target.nbytes, "DeviceToDevice")

    def keep(self, target: Array, row: int, source: Array) -> None:
        """See loop.Queue."""
        assert isinstance(target, DeviceArray)
        assert isinstance(source, DeviceArray)
        self.transfer(target.pointer + row * source.nbytes, source.pointer, source.nbytes, "DeviceToDevice")

    def run(self, binding: Binding) -> None:
        """See loop.Queue."""
        binding.run(self.stream)

    def transfer(self, target: int, source: int, size: int, kind: str) -> None:
        """Queues a copy of `size` bytes between addresses; memory of the host is read before this returns."""
        kinds = self.device.runtime.cudaMemcpyKind
        direction = getattr(kinds, f"cudaMemcpy{kind}")
        self.device.call("cudaMemcpyAsync", target, source, size, direction, self.stream)

    def capture(self, work: Callable[[], None]) -> Replay:
        """See loop.Queue. The work must have run before: libraries allocate and tune at their first calls."""
        call, runtime = self.device.call, self.device.runtime
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # an array that is collected now would free memory, which breaks the capture
        try:
            call("cudaStreamBeginCapture", self.stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                work()
            except BaseException:
                status, *graphs = runtime.cudaStreamEndCapture(self.stream)  # left capturing it would refuse all else
                if int(status) == 0:
                    runtime.cudaGraphDestroy(*graphs)
                raise
            graph = call("cudaStreamEndCapture", self.stream)
        finally:
            if collecting:
                gc.enable()
        executable = call("cudaGraphInstantiate", graph, 0)
        call("cudaGraphDestroy", graph)
        return _Captured(self, executable)

    def wait(self) -> None:
        """See loop.Queue."""
        self.device.call("cudaStreamSynchronize", self.stream)

    def memory_in_use(self) -> int:
        """See loop.Queue."""
        free, total = self.device.memory()
        return total - free


class _Captured:
    """A captured graph; calling it queues it once."""

    def __init__(self, queue: Queue, executable: Any) -> None:
        self._queue, self._executable = queue, executable
        weakref.finalize(self, queue.device.runtime.cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        self._queue.device.call("cudaGraphLaunch", self._executable, self._queue.stream)


class DeviceArray:
    """A tensor on a GPU: zeros at first; C-contiguous. Written and read in the order of its queue."""

    def __init__(self, queue: Queue, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.queue, self.dtype = queue, dtype
        self._shape = tuple(shape)
        self.nbytes = math.prod(self._shape) * dtype.itemsize
        device = queue.device
        self.pointer = int(device.call("cudaMalloc", max(self.nbytes, 1)))
        weakref.finalize(self, device.runtime.cudaFree, self.pointer)
        device.call("cudaMemsetAsync", self.pointer, 0, self.nbytes, queue.stream)
        self._host: NumpyArray | None = None

    @property
    def shape(self) -> Shape:
        """Sizes of the axes."""
        return self._shape

    def numpy(self) -> NumpyArray:
        """A copy on the host, once everything queued before is done."""
        values = np.empty(self._shape, self.dtype)
        self.queue.transfer(values.ctypes.data, self.pointer, self.nbytes, "DeviceToHost")
        self.queue.wait()
        return values

    def write(self, region: Region, values: npt.ArrayLike) -> None:
        """Overwrites one region. One piece of memory is one transfer; anything else is read, changed and written."""
        if self._host is None:
            self._host = np.empty(self._shape, self.dtype)  # pages nobody writes cost nothing
        part = contiguous_part(self._host, region)
        if part is None:
            self._host[...] = self.numpy()
            self._host[region] = values
            part = self._host
        else:
            part[...] = values
        offset = part.ctypes.data - self._host.ctypes.data
        self.queue.transfer(self.pointer + offset, part.ctypes.data, part.nbytes, "HostToDevice")

    def __dlpack__(self, **_: Any) -> Any:
        self.queue.wait()
        return dlpack_capsule(self, self.pointer, self._shape, self.dtype, self.__dlpack_device__())

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.queue.device.index  # kDLCUDA


def contiguous_part(host: NumpyArray, region: Region) -> NumpyArray | None:
    """The view of `host` that `region` selects, or None where it is none or not contiguous."""
    key = region if isinstance(region, tuple) else (region,)
    if not all(isinstance(k, (int, np.integer, slice)) or k is Ellipsis for k in key):
        return None
    part = host[(*key, ...)] if Ellipsis not in key else host[key]  # with an ellipsis numpy gives views, never scalars
    return part if part.flags.c_contiguous else None


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_alive: dict[int, tuple[Any, ...]] = {}


def _forget(tensor: Any) -> None:
    _alive.pop(ctypes.addressof(tensor.contents), None)


_forget_callback = _Deleter(_forget)


def dlpack_capsule(owner: object, pointer: int, shape: Shape, dtype: np.dtype[Any], device: tuple[int, int]) -> Any:
    """A DLPack capsule over memory that `owner` keeps alive until the consumer lets go (dmlc.github.io/dlpack)."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    kind = _DLDataType(_KINDS[dtype.kind], 8 * dtype.itemsize, 1)
    tensor = _DLTensor(pointer, device[0], device[1], len(shape), kind, sizes, None, 0)
    managed = _DLManagedTensor(tensor, None, _forget_callback)
    _alive[ctypes.addressof(managed)] = (owner, sizes, managed)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(managed), b"dltensor", None)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise MissingPackage("cuda-python", "cuda") from error
    return runtime


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
