"""Torch modules as engines: the reference for compiled graphs, and the backend of previews during training."""

from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
import torch

from oneword.engines.engine import AnyArray, Array, HostArray, NumpyArray, ShapeUse, complete_feeds, host_buffers
from oneword.engines.errors import EngineError, one_line
from oneword.engines.graph import Graph, TensorSpec
from oneword.export.families import Traceable, family_of
from oneword.export.source import Source
from oneword.runtime.bundle import Provenance
from oneword.runtime.model import Model
from oneword.runtime.prompt import Tokenizer


class EagerEngine:
    """An Engine that runs a graph's torch module as it is."""

    limits: Mapping[str, int] = {}
    shape_use = ShapeUse.ANY

    def __init__(self, graph: Traceable) -> None:
        self.graph = graph
        self.name = graph.name
        self.backend = f"eager {torch.__version__} cpu {graph.precision}"
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in graph.outputs}

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> "EagerBinding":
        """See Engine.bind."""
        return EagerBinding(self, *host_buffers(self.name, self.inputs, self.outputs, shapes, inputs, outputs))

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        tensors = to_torch(self.graph.inputs, complete_feeds(self.name, self.inputs, feeds))
        try:
            with torch.no_grad():
                values = self.graph.module(**tensors)
        except Exception as error:  # of any class, if a model's config has wrong values
            raise EngineError(f"graph {self.name!r} failed: {one_line(error)}") from error
        return {name: np.ascontiguousarray(value.numpy()) for name, value in zip(self.outputs, values, strict=True)}


class EagerBinding:
    """A Binding of a module's inputs and outputs in host memory."""

    capturable = False

    def __init__(
        self, engine: EagerEngine, inputs: Mapping[str, NumpyArray], outputs: Mapping[str, NumpyArray]
    ) -> None:
        self.engine = engine
        self.inputs: Mapping[str, Array] = {name: HostArray(value) for name, value in inputs.items()}
        self.outputs: Mapping[str, Array] = {name: HostArray(value) for name, value in outputs.items()}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run."""
        values = self.engine.run({name: value.numpy() for name, value in self.inputs.items()})
        for name, value in values.items():
            self.outputs[name].write(..., value)

    def specialize(self) -> None:
        """See Binding. Does nothing: every shape is equally fast."""


def to_torch(specs: tuple[TensorSpec, ...], feeds: Mapping[str, NumpyArray]) -> dict[str, torch.Tensor]:
    """Feeds as tensors, in the order of the specs."""
    return {spec.name: torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in specs}


def eager_model(source: Source) -> Model:
    """A runtime model that runs a source's own torch modules; nothing is exported."""
    exportable = family_of(source)
    engines = {graph.name: EagerEngine(graph) for graph in exportable.graphs}
    graphs = {g.name: Graph((), "", g.precision, g.inputs, g.outputs) for g in exportable.graphs}
    return Model(
        exportable.manifest(graphs, Provenance(source.name, "")),
        {
            encoder.graph: Tokenizer(
                tokenizers.Tokenizer.from_str(source.tokenizers[encoder.graph].backend_tokenizer.to_str()), encoder
            )
            for encoder in exportable.encoders
        },
        {name: table.cpu().numpy() for name, table in exportable.tables.items()},
        lambda name: engines[name],
    )
