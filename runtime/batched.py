"""Runs a graph over any number of items, in calls of 8, 4, 2 and 1, or one at a time if the engine would compile the
graph again for more; each size of call is bound once. No denoising."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from oneword.engines.engine import AnyArray, Binding, Engine, NumpyArray, ShapeUse, shape_of

CALLS: Final = (8, 4, 2, 1)
_MAX_BINDINGS: Final = 16


class BatchedGraph:
    """One engine, and its bindings by the size of the call and of the items.

    `fixed` inputs, such as the embedding table, are shared by all items. No call exceeds the engine's limit.
    """

    def __init__(self, engine: Engine, fixed: Mapping[str, AnyArray]) -> None:
        self._engine, self._fixed = engine, fixed
        most = 1 if engine.shape_use is ShapeUse.FIRST else CALLS[0]
        self._largest = max(1, min(most, engine.limits.get("B", most)))
        self._bindings: OrderedDict[tuple[object, ...], Binding] = OrderedDict()

    def __call__(
        self, feeds: Mapping[str, NumpyArray], sizes: Mapping[str, int] | None = None
    ) -> dict[str, NumpyArray]:
        """Every output [n, ...] for inputs [n, ...]. `sizes` gives the sizes of axes that only outputs have.

        Raises FeedError before the engine is called, EngineError if it fails.
        """
        count = len(next(iter(feeds.values())))
        parts = [
            self._call({name: values[part] for name, values in feeds.items()}, sizes) for part in self._parts(count)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._engine.outputs}

    def specialize(self) -> None:
        """Compiles the graph for every size of call so far, if that makes calls faster; takes seconds."""
        for binding in self._bindings.values():
            binding.specialize()

    def _parts(self, count: int) -> Iterator[slice]:
        start = 0
        while start < count:
            size = next(size for size in CALLS if size <= min(count - start, self._largest))
            yield slice(start, start + size)
            start += size

    def _call(self, feeds: Mapping[str, NumpyArray], sizes: Mapping[str, int] | None) -> dict[str, NumpyArray]:
        count = len(next(iter(feeds.values())))
        key = (*((name, values.shape) for name, values in feeds.items()), *sorted((sizes or {}).items()))
        if key not in self._bindings:
            shapes = {name: values.shape for name, values in feeds.items()}
            for name, spec in self._engine.outputs.items():
                axis_sizes = {"B": count, **(sizes or {})}
                if all(isinstance(axis, int) or axis in axis_sizes for axis in spec.axes):
                    shapes[name] = shape_of(self._engine.name, spec, axis_sizes)
            self._bindings[key] = self._engine.bind(shapes, self._fixed)
        self._bindings.move_to_end(key)
        while len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)
        binding = self._bindings[key]
        for name, values in feeds.items():
            binding.inputs[name].write(..., values)
        binding.run()
        return {name: array.read(...) for name, array in binding.outputs.items()}
