"""The torch modules behind the Engine protocol: what compiled graphs are compared with, and previews while training."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from oneword.engines.engine import (
    Array,
    Given,
    HostArray,
    NumpyArray,
    check_shapes,
    complete_feeds,
    numpy_dtype,
    on_host,
)
from oneword.engines.errors import EngineError, one_line
from oneword.engines.spec import TensorSpec
from oneword.export.families import Traceable
from oneword.export.trace import to_torch


class EagerEngine:
    """One graph's torch module, run as it is."""

    def __init__(self, graph: Traceable) -> None:
        self.graph = graph
        self.name = graph.name
        self.backend = f"eager {torch.__version__} cpu {graph.precision}"
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.outputs}

    def bind(self, shapes: Mapping[str, Sequence[int]], arrays: Mapping[str, Given] | None = None) -> "EagerBinding":
        """See Engine.bind; shapes of outputs are not needed here."""
        values = {name: on_host(array) for name, array in (arrays or {}).items()}
        given = {n: tuple(s) for n, s in shapes.items() if n in self.inputs} | {n: a.shape for n, a in values.items()}
        _, all_shapes = check_shapes(self.name, self.inputs, given)
        inputs = {
            name: values[name] if name in values else np.zeros(shape, numpy_dtype(self.inputs[name].dtype))
            for name, shape in all_shapes.items()
        }
        return EagerBinding(self, inputs)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        tensors = to_torch(self.graph.inputs, complete_feeds(self.name, self.inputs, feeds))
        try:
            with torch.no_grad():
                values = self.graph.module(*tensors.values())
        except RuntimeError as error:
            raise EngineError(f"graph {self.name!r} failed: {one_line(error)}") from error
        return {name: np.ascontiguousarray(value.numpy()) for name, value in zip(self.outputs, values, strict=True)}


class EagerBinding:
    """A module with its inputs held; outputs are there after the first run."""

    capturable = False

    def __init__(self, engine: EagerEngine, inputs: Mapping[str, NumpyArray]) -> None:
        self.engine = engine
        self.inputs: Mapping[str, Array] = {name: HostArray(value) for name, value in inputs.items()}
        self.outputs: dict[str, Array] = {}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run."""
        values = self.engine.run({name: value.numpy() for name, value in self.inputs.items()})
        if not self.outputs:  # filled in place: a caller may have taken the mapping before the first run
            self.outputs.update({name: HostArray(value) for name, value in values.items()})
        for name, value in values.items():
            self.outputs[name].write(..., value)
