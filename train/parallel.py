"""Runs parts of a batch on separate threads, each with its share of PyTorch's threads.

PyTorch's own threads synchronise after every operation and spin while they wait: beside a busy process, they spend most
of their time waiting for each other. Parts of a batch synchronise once. How a batch is divided depends on its size and
on `torch.get_num_threads()`, never on the load, so the same run gives the same bits.

Threads that run Python share one interpreter lock. `Recorded` runs a module without Python, operation by operation and
with the same bits: nothing is fused or reordered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch.jit import optimized_execution  # type: ignore[attr-defined]

M = TypeVar("M", bound=torch.nn.Module)
T = TypeVar("T")
R = TypeVar("R")

SIZE = 8  # the fewest pictures in a part: with fewer, Python takes longer than the division saves
PARTS = 4  # the most parts, since all of them share Python's interpreter lock


def parts_of(items: Sequence[int], threads: int) -> list[list[int]]:
    """Divides `items` in order into equal parts of at least SIZE items: at most PARTS, and at most one per thread."""
    count = max(1, min(threads, PARTS, len(items) // SIZE))
    bounds = [len(items) * number // count for number in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(bounds)]


def in_threads(function: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Calls `function` on all parts at once. Results are in order. A single part is computed here, with all threads."""
    if len(parts) == 1:
        return [function(parts[0])]
    threads = torch.get_num_threads()

    def compute(part: T) -> R:
        torch.set_num_threads(max(1, threads // len(parts)))  # of the current thread
        return function(part)

    futures = [_pool().submit(compute, part) for part in parts]
    wait(futures)
    torch.set_num_threads(threads)  # of threads created later
    return [future.result() for future in futures]


class Recorded(Generic[M]):
    """A module whose operations are recorded for given input shapes, and replayed for inputs of these shapes.

    For other shapes it runs the module itself. `variant` distinguishes recordings of a module that has been changed.
    """

    def __init__(self, module: M) -> None:
        self.module = module
        self.variant: object = None
        self._recordings: dict[Hashable, Callable[..., torch.Tensor] | None] = {}

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Returns the module's output. Several threads may call it at once."""
        recording = self._recordings.get(self._key(inputs))
        if recording is None:
            return self.module(*inputs)
        with optimized_execution(False):  # exactly the recorded operations
            return recording(*(tensor for tensor in inputs if tensor is not None))

    def record(self, *inputs: torch.Tensor | None) -> None:
        """Records the module for inputs of these shapes, unless it has been recorded."""
        key = self._key(inputs)
        if key in self._recordings:
            return
        present = [place for place, tensor in enumerate(inputs) if tensor is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other shapes, which never use this recording, and deprecation
            filled = _Filled(self.module, present, len(inputs))
            try:
                recording = torch.jit.trace(filled, tuple(inputs[place] for place in present), check_trace=False)
            except Exception:  # of many kinds: a module that cannot be recorded is run as it is, only slower
                recording = None
            self._recordings[key] = recording

    def _key(self, inputs: Sequence[torch.Tensor | None]) -> Hashable:
        return self.variant, tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs)


class _Filled(torch.nn.Module):
    """A module that is given only the inputs at `places`; the others are None."""

    def __init__(self, module: torch.nn.Module, places: Sequence[int], count: int) -> None:
        super().__init__()
        self.module, self.places, self.count = module, places, count

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs: list[torch.Tensor | None] = [None] * self.count
        for place, tensor in zip(self.places, tensors, strict=True):
            inputs[place] = tensor
        return self.module(*inputs)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PARTS, thread_name_prefix="part")
