"""The calls of CUDA's runtime that oneword makes, on the host's memory, to hold without a GPU what a GPU asks for.

As late as CUDA may be: queued work is done when somebody waits and not before, so that a buffer read or reused too
early is seen. Memory of the host is read when a copy is queued, as CUDA does with pageable memory. While a stream is
captured work is recorded and not done, and what CUDA then refuses is refused and breaks the capture. What is computed,
and what libraries allocate at their first calls, is not CUDA's.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

CAPTURE_REFUSES, CAPTURE_BROKEN = 900, 901  # cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureInvalidated

Work = Callable[[], object]


class Runtime:
    """Stands for `cuda.bindings.runtime`: every call gives a status, then what it gives."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaError_t = SimpleNamespace(cudaErrorInsufficientDriver=35, cudaErrorNoDevice=100)

    def __init__(self) -> None:
        self.waits = self.captures = self.launches = self.from_host = 0
        self._memory: dict[int, Any] = {}
        self._queued: list[Work] = []
        self._captured: list[Work] | None = None
        self._broken = False

    def queue(self, work: Work) -> tuple[int]:
        """In the order of the one stream there is."""
        (self._queued if self._captured is None else self._captured).append(work)
        return (0,)

    def refused(self) -> bool:
        """Whether a capture is going on, which is broken by what asks."""
        self._broken |= self._captured is not None
        return self._captured is not None

    def wait(self) -> int:
        """Does all that was queued; the status."""
        if self.refused():
            return CAPTURE_REFUSES
        self.waits += 1
        queued, self._queued = self._queued, []
        for work in queued:
            work()
        return 0

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.refused():
            return CAPTURE_REFUSES, 0
        buffer = (ctypes.c_uint8 * size)(*([0xCD] * min(size, 64)))  # nobody promised zeros
        self._memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[int]:
        status = self.wait()
        if status == 0:
            self._memory.pop(pointer)
        return (status,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            return self.queue(lambda: ctypes.memmove(target, source, size))
        if self.refused():
            return (CAPTURE_REFUSES,)
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.from_host += size
            values = ctypes.string_at(source, size)
            return self.queue(lambda: ctypes.memmove(target, values, size))
        return self.queue(lambda: ctypes.memmove(target, source, size))

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        return self.queue(lambda: ctypes.memset(pointer, value, size))

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (self.wait(),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self._captured, self._broken = [], False
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, object]:
        captured, self._captured = self._captured, None
        if self._broken:
            return CAPTURE_BROKEN, None
        self.captures += 1
        return 0, captured

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return 0, list(graph)

    def cudaGraphLaunch(self, executable: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for work in executable:
            self.queue(work)
        return (0,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[int]:
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 1

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: str, index: int) -> tuple[int, int]:
        return 0, {"major": 8, "minor": 9}[attribute]

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(name=b"Simulated")

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 1 << 30, 2 << 30

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"operation not permitted when stream is capturing" if status == CAPTURE_REFUSES else b"failed"


class Session:
    """An ONNX Runtime session of the CPU that is bound and queued like one of the CUDA provider."""

    def __init__(self, inner: Any, runtime: Runtime) -> None:
        self._inner, self._runtime = inner, runtime

    def io_binding(self) -> Any:
        inner = self._inner.io_binding()

        def bind(kind: Callable[..., None]) -> Callable[..., None]:
            return lambda name, device, index, *rest: kind(name, "cpu", index, *rest)

        return SimpleNamespace(inner=inner, bind_input=bind(inner.bind_input), bind_output=bind(inner.bind_output))

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._runtime.queue(lambda: self._inner.run_with_iobinding(binding.inner))

    def run_with_ort_values(self, names: Any, feeds: Any) -> Any:
        self._runtime.wait()
        return self._inner.run_with_ort_values(names, feeds)
