"""The two forms of a step that `benchmarks.fusion` compares are the same step."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion import FUSED, GRAPH, step


def test_the_graph_and_its_fused_copy_take_the_same_step(tiny_bundle: Path) -> None:
    options = Namespace(bundle=tiny_bundle, size=64, threads=1)
    results: list[Any] = [step(name, options)() for name in (GRAPH, FUSED)]
    assert results[0]["denoised"].std() > 0.1
    for name, expected in results[0].items():
        np.testing.assert_allclose(results[1][name], expected, rtol=1e-5, atol=1e-5)
