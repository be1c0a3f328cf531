"""A simulated CUDA runtime in host memory: the calls that oneword makes, to test a GPU's requirements without a GPU.

Queued work runs as late as CUDA allows: only when something waits for it, so that a buffer read or reused too early is
detected. Pageable host memory is read when a copy is queued, as in CUDA; pinned memory is read and written when the
copy runs. Waiting for an event runs the work queued before it was recorded, and no more. While a stream is captured,
work is recorded but does not run, and calls that CUDA forbids during a capture fail and break it. With
`reads_pageable_memory` pageable memory is read when the copy runs, too.

Stricter than CUDA: memory that is freed while queued work uses it, or used after it was freed, is recorded in
`violations`, which every test must find empty. Not covered: CUDA's own arithmetic, and what libraries allocate at their
first calls.
"""

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

CAPTURE_REFUSES, CAPTURE_BROKEN = 900, 901  # cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureInvalidated
GARBAGE = 0xCD  # fills memory that has not been written

Span = tuple[int, int]
"""Address and bytes."""


@dataclass(eq=False)
class Work:
    """A queued operation, and the memory it uses."""

    do: Callable[[], object]
    uses: tuple[Span, ...] = ()
    is_run: bool = False
    """Whether it runs a graph, such as a step."""


class Runtime:
    """Stands in for `cuda.bindings.runtime`: every call returns a status, then its results."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major",
        cudaDevAttrComputeCapabilityMinor="minor",
        cudaDevAttrPageableMemoryAccess="pageable",
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaError_t = SimpleNamespace(cudaErrorInsufficientDriver=35, cudaErrorNoDevice=100)

    def __init__(self, reads_pageable_memory: bool = False) -> None:
        self._reads_pageable_memory = reads_pageable_memory
        self.waits = 0
        """How often the host waited for all queued work."""
        self.event_waits = 0
        """How often the host waited for an event."""
        self.captures = self.launches = self.from_host = 0
        self.most_runs_queued = 0
        """The most graph runs ever queued at once; on a GPU the first of them may be running."""
        self.violations: list[str] = []
        self._device: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._freed: list[Any] = []  # kept, so that use after free is recorded and does not crash
        self._queued: list[Work] = []
        self._captured: list[Work] | None = None
        self._broken = False
        self._events: dict[int, Work | None] = {}

    def queue(self, do: Callable[[], object], *uses: Span, is_run: bool = False) -> tuple[int]:
        """Queues work on the only stream."""
        self._put(Work(do, uses, is_run))
        return (0,)

    def refused(self) -> bool:
        """Whether a stream is being captured; if so, the call that asks breaks the capture."""
        self._broken |= self._captured is not None
        return self._captured is not None

    def wait(self) -> int:
        """Runs all queued work and returns the status."""
        if self.refused():
            return CAPTURE_REFUSES
        self.waits += 1
        self._do(len(self._queued))
        return 0

    def _put(self, work: Work) -> None:
        (self._queued if self._captured is None else self._captured).append(work)
        self.most_runs_queued = max(self.most_runs_queued, sum(work.is_run for work in self._queued))

    def _do(self, count: int) -> None:
        due, self._queued = self._queued[:count], self._queued[count:]
        for work in due:
            for address, size in work.uses:
                if not any(_within(memory, address, size) for memory in self._allocations()):
                    self.violations.append(f"queued work used {size} bytes that were freed or never allocated")
                    break
            else:
                work.do()

    def _allocations(self) -> Iterable[Any]:
        return (*self._device.values(), *self._pinned.values())

    def _is_pinned(self, address: int, size: int) -> bool:
        return any(_within(memory, address, size) for memory in self._pinned.values())

    def _allocate(self, memories: dict[int, Any], size: int) -> tuple[int, int]:
        if self.refused():
            return CAPTURE_REFUSES, 0
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, GARBAGE, size)  # CUDA does not promise zeros
        memories[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def _free(self, memories: dict[int, Any], pointer: int) -> tuple[int]:
        if self.refused():
            return (CAPTURE_REFUSES,)
        memory = memories.pop(pointer)
        if any(_within(memory, address, size) for work in self._queued for address, size in work.uses):
            self.violations.append(f"{len(memory)} bytes were freed while queued work uses them")
        ctypes.memset(memory, GARBAGE, len(memory))
        self._freed.append(memory)
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._allocate(self._device, size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        return self._free(self._device, pointer)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._allocate(self._pinned, size)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        return self._free(self._pinned, pointer)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        kinds = self.cudaMemcpyKind
        spans = {
            kinds.cudaMemcpyDeviceToDevice: ((target, size), (source, size)),
            kinds.cudaMemcpyHostToDevice: ((target, size),),
            kinds.cudaMemcpyDeviceToHost: ((source, size),),
        }[kind]
        if kind == kinds.cudaMemcpyHostToDevice:
            self.from_host += size
        if kind != kinds.cudaMemcpyDeviceToDevice:
            host = source if kind == kinds.cudaMemcpyHostToDevice else target
            if self._is_pinned(host, size):
                spans = ((target, size), (source, size))
            elif self.refused():
                return (CAPTURE_REFUSES,)
            elif kind == kinds.cudaMemcpyHostToDevice and not self._reads_pageable_memory:
                values = ctypes.string_at(source, size)
                return self.queue(lambda: ctypes.memmove(target, values, size), *spans)
        return self.queue(lambda: ctypes.memmove(target, source, size), *spans)

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        return self.queue(lambda: ctypes.memset(pointer, value, size), (pointer, size))

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (self.wait(),)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        handle = len(self._events) + 1
        self._events[handle] = None
        return 0, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        mark = Work(lambda: None)
        self._events[event] = mark
        self._put(mark)
        return (0,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        if self.refused():
            return (CAPTURE_REFUSES,)
        self.event_waits += 1
        mark = self._events[event]
        if mark in self._queued:
            self._do(self._queued.index(mark) + 1)
        return (0,)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        self._events[event] = None
        return (0,)

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
            self._put(work)
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
        return 0, {"major": 8, "minor": 9, "pageable": int(self._reads_pageable_memory)}[attribute]

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
    """An ONNX Runtime session on the CPU that is bound and queued like one of the CUDA provider."""

    def __init__(self, inner: Any, runtime: Runtime) -> None:
        self._inner, self._runtime = inner, runtime
        self.get_inputs, self.get_outputs = inner.get_inputs, inner.get_outputs

    def io_binding(self) -> Any:
        inner, pointers = self._inner.io_binding(), []

        def bind(kind: Callable[..., None]) -> Callable[..., None]:
            def bound(name: str, device: str, index: int, element: int, shape: Any, pointer: int) -> None:
                pointers.append((pointer, 1))
                kind(name, "cpu", index, element, shape, pointer)

            return bound

        return SimpleNamespace(
            inner=inner, pointers=pointers, bind_input=bind(inner.bind_input), bind_output=bind(inner.bind_output)
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._runtime.queue(lambda: self._inner.run_with_iobinding(binding.inner), *binding.pointers, is_run=True)

    def run_with_ort_values(self, names: Any, feeds: Any) -> Any:
        self._runtime.wait()
        return self._inner.run_with_ort_values(names, feeds)


def _within(memory: Any, address: int, size: int) -> bool:
    """Whether a span is part of an allocation."""
    start = ctypes.addressof(memory)
    return start <= address and address + size <= start + len(memory)
