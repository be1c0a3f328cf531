"""Which graphs count as equal, and which must not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from oneword.engines.errors import EngineError, NotFinite
from oneword.engines.graph import DType, Precision, TensorSpec
from oneword.export.eager import EagerEngine
from oneword.export.families import FINITE, Traceable, family_of
from oneword.export.parity import Reference, compare, references
from oneword.export.source import load_source

SHAPES = ({"B": 1, "N": 2, "M": 2, "T": 5, "h": 4, "w": 4},)


@pytest.fixture
def decoder(tiny_model_dir: Path) -> Traceable:
    (graph,) = [g for g in family_of(load_source(tiny_model_dir)).graphs if g.name == "vae_decoder"]
    return graph


def test_a_model_that_gives_nan_is_named_and_not_compared(decoder: Traceable) -> None:
    with torch.no_grad():
        decoder.module.decoder.conv_out.bias[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(NotFinite, match="the model's own vae_decoder gives NaN or infinity in fp32"):
        references(decoder, SHAPES)


def test_nan_is_not_a_small_difference() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(float("nan")))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * self.weight, torch.ones(x.shape[0], dtype=torch.bool)

    spec = TensorSpec("x", DType.FLOAT32, ("B",))
    outputs = (TensorSpec("y", DType.FLOAT32, ("B",)), FINITE)
    engine = EagerEngine(Traceable("half", Half(), (spec,), outputs, {}))
    x, finite = np.ones(2, np.float32), np.array([True, True])
    for expected in (x, np.full(2, np.nan, np.float32)):
        with pytest.raises(EngineError, match=r"half\.y: inf relative"):
            compare(engine, [Reference({"x": x}, {"y": expected, "finite": finite})], Precision.FP32)
