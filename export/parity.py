"""Compares a compiled graph with its torch module, and a fused copy with its graph, on fresh inputs of several shapes.

The references are computed first, so that the module can be freed before the compiled graph is opened.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oneword.engines.engine import Engine, NumpyArray
from oneword.engines.errors import EngineError, NotFinite
from oneword.engines.graph import DType, Precision, Weights
from oneword.export.eager import EagerEngine
from oneword.export.families import Traceable
from oneword.export.trace import example_feeds

# None equals the traced sizes; odd sizes, a single row and ragged branches are included.
SHAPES: tuple[Mapping[str, int], ...] = (
    {"B": 1, "N": 2, "M": 2, "T": 77, "h": 8, "w": 8},
    {"B": 2, "N": 4, "M": 3, "T": 16, "h": 9, "w": 15},
    {"B": 4, "N": 5, "M": 2, "T": 5, "h": 17, "w": 16},
)
# Float outputs: largest |difference| / largest |reference|. Pictures: mean |difference| in levels of 255.
TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 5e-2}  # ONNX Runtime does not run bf16 on a CPU
PICTURE_TOLERANCE = {Precision.FP32: 0.05, Precision.FP16: 2.0}
INT8_TOLERANCE, INT8_PICTURE_TOLERANCE = 1e-1, 4.0
"""Between a graph with int8 weights and its module, whose weights are float32."""
FUSED_TOLERANCE = {Precision.FP32: 1e-5, Precision.FP16: 5e-3}
"""Between a fused copy and its graph."""


@dataclass(frozen=True)
class Reference:
    """Inputs, and the torch module's outputs for them."""

    feeds: Mapping[str, NumpyArray]
    outputs: Mapping[str, NumpyArray]


@dataclass(frozen=True)
class Difference:
    """The largest difference of one output between a compiled graph and its module, over all shapes.

    Float outputs: largest |difference| / largest |reference|. Pictures: mean |difference| in levels of 255.
    """

    graph: str
    output: str
    value: float
    unit: str
    allowed: float

    def __str__(self) -> str:
        return f"{self.graph}.{self.output}: {self.value:.1e} {self.unit} (allowed {self.allowed:g})"


def references(graph: Traceable, shapes: Sequence[Mapping[str, int]] = SHAPES) -> list[Reference]:
    """Runs the module at every shape with seeds 1, 2, ...: never with the inputs it was traced with.

    Raises NotFinite if the module itself gives NaN or infinity, since there is then nothing to compare with.
    """
    eager = EagerEngine(graph)
    feeds = [example_feeds(graph, sizes, seed) for seed, sizes in enumerate(shapes, start=1)]
    cases = [Reference(f, eager.run(f)) for f in feeds]
    if not all(case.outputs["finite"].all() for case in cases):
        raise NotFinite(
            f"the model's own {graph.name} gives NaN or infinity in {graph.precision}: "
            "export it with --precision fp32, or check its weights"
        )
    return cases


def compare(
    engine: Engine, cases: Iterable[Reference], precision: Precision, weights: Weights = Weights.FLOAT
) -> list[Difference]:
    """The largest difference of each output over all cases. Raises EngineError if one is larger than allowed."""
    if weights is Weights.INT8:
        message = "differs from the model: export it without --weights int8"
        return _compare(engine, cases, INT8_TOLERANCE, INT8_PICTURE_TOLERANCE, message)
    message = "differs from the model: try another precision"
    return _compare(engine, cases, TOLERANCE[precision], PICTURE_TOLERANCE[precision], message)


def compare_fused(fused: Engine, cases: Iterable[Reference], precision: Precision) -> list[Difference]:
    """As compare, for a graph's fused copy; the outputs of the cases are the graph's own."""
    message = "differs from the graph it is a copy of"
    return _compare(fused, cases, FUSED_TOLERANCE[precision], PICTURE_TOLERANCE[precision], message)


def _compare(
    engine: Engine, cases: Iterable[Reference], tolerance: float, picture_tolerance: float, message: str
) -> list[Difference]:
    worst: dict[str, float] = {}
    for case in cases:
        outputs = engine.run(case.feeds)
        for name, expected in case.outputs.items():
            distance = difference(engine, name, outputs[name], expected)
            worst[name] = max(worst.get(name, 0.0), distance)
    differences = []
    for name, value in worst.items():
        picture = engine.outputs[name].dtype is DType.UINT8
        allowed = 0.0 if name == "finite" else picture_tolerance if picture else tolerance
        result = Difference(engine.name, name, value, "levels" if picture else "relative", allowed)
        if not value <= allowed:
            raise EngineError(f"{result} on {engine.backend}: the compiled graph {message}")
        differences.append(result)
    return differences


def difference(engine: Engine, name: str, actual: NumpyArray, expected: NumpyArray) -> float:
    """The distance of one output, as in Difference; infinite if the shapes differ or either has NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if engine.outputs[name].dtype is DType.UINT8:
        return float(np.abs(actual.astype(np.float32) - expected.astype(np.float32)).mean())
    if actual.dtype == np.bool_:
        return float((actual != expected).any())
    distance = float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    return float("inf") if np.isnan(distance) else distance
