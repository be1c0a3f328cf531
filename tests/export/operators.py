"""The operators of ONNX graphs: those in a file, and those that ONNX Runtime ran."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from oneword.engines.engine import NumpyArray
from oneword.engines.graph import Graph, Provider
from oneword.engines.open import Backend, open_engine
from oneword.export.fusion import DOMAIN
from oneword.runtime.bundle import Bundle


def attentions_and_norms(bundle: Path, provider: Provider = Provider.CPU) -> dict[str, tuple[int, int]]:
    """How many MultiHeadAttention and SkipLayerNormalization each graph's copy has; (0, 0) without a copy."""
    counts = {}
    for name, graph in Bundle.open(bundle).manifest.graphs.items():
        operators = own_operators(bundle / graph.onnx_for(provider))
        counts[name] = (operators["MultiHeadAttention"], operators["SkipLayerNormalization"])
        assert sum(operators.values()) == sum(counts[name]), f"{name} has other operators too: {operators}"
    return counts


def own_operators(path: Path) -> Counter[str]:
    """ONNX Runtime's own operators in an ONNX file, counted by type."""
    model = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)


def operators_run(
    name: str, graph: Graph, folder: Path, feeds: Mapping[str, NumpyArray], monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """The operators that ONNX Runtime runs for a graph on the CPU, counted by type, from its own profile."""
    import onnxruntime as ort

    sessions = []
    InferenceSession = ort.InferenceSession

    def profiled(path: str, options: Any, **settings: Any) -> Any:
        options.enable_profiling = True
        options.profile_file_prefix = f"{profiles}/profile"
        sessions.append(InferenceSession(path, options, **settings))
        return sessions[0]

    with tempfile.TemporaryDirectory() as profiles, monkeypatch.context() as patch:
        patch.setattr(ort, "InferenceSession", profiled)
        open_engine(Backend.ONNXRUNTIME, name, graph, folder).run(feeds)
        events = json.loads(Path(sessions[0].end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    return [event["args"]["op_name"] for event in sorted(kernels, key=lambda event: event["ts"])]


def random(shape: tuple[int, ...], seed: int = 0) -> NumpyArray:
    """Normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
