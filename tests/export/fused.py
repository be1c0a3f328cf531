"""What the fused copies of a bundle's graphs contain."""

from collections import Counter
from pathlib import Path

import onnx

from oneword.engines.graph import Provider
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
