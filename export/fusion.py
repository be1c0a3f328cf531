"""Fused copies of graphs for ONNX Runtime, in which operators of its own replace several of ONNX's.

    MultiHeadAttention        attention of all heads; the matrix of scores is never in memory as a whole
    SkipLayerNormalization    a residual sum with the layer norm after it
    BiasSplitGelu             the gated GELU of a feed-forward network, in CUDA only

A copy has the inputs, outputs and weights of its graph, and reads the weights from the graph's data file. Not covered:
convolutions and group norms with channels last, whose kernels need the weights in another order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass
from onnxscript.rewriter.ort_fusions.mha import fuse_mha2
from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from oneword.engines.graph import Provider

DOMAIN = "com.microsoft"
GATED_WIDTHS = (2560, 5120, 10240)
"""Widths, of both halves together, for which ONNX Runtime's CUDA provider has a kernel of BiasSplitGelu."""


def fused_copies(model: onnx_ir.Model) -> dict[Provider, onnx_ir.Model]:
    """Copies of a traced model, whose values must still have their shapes, for each provider; tensors are shared.

    Empty if there is nothing to fuse.
    """
    copies = {provider: model.clone() for provider in Provider}
    return {provider: copy for provider, copy in copies.items() if fuse(copy, provider)}


def fuse(model: onnx_ir.Model, provider: Provider) -> int:
    """Replaces operators by ONNX Runtime's own for which `provider` has a kernel. Returns how many were inserted."""
    attentions = fuse_sdpa(model)
    RemoveUnusedNodesPass()(model)  # the shapes of keys, which would be further uses of what is replaced
    fuse_mha2(model)
    replace_sdpa_by_mha(model)
    norms = fuse_skip_layer_normalization(model)
    gates = _gated_gelu.apply_to_model(model) if provider is Provider.CUDA else 0
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)  # a residual sum may be used before the norm that now returns it
    return int(attentions + norms + gates)


def save_copy(copy: onnx_ir.Model, path: Path, original: Path) -> None:
    """Writes a fused copy of the graph in `original`, whose weights it refers to. Both are in one folder."""
    stored: Mapping[str, onnx_ir.Value] = onnx_ir.load(original).graph.initializers
    for name, value in copy.graph.initializers.items():
        if name in stored:
            value.const_value = stored[name].const_value
    onnx_ir.save(copy, path)


class _GatedGelu(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript has no types
    """diffusers' GEGLU: its bias, split, GELU and product."""

    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        halves = {"num_outputs": 2, "_allow_other_attributes": True, "_outputs": ["value", "gate"]}
        value, gate = op.Split(op.Add(x, bias), **halves)
        return op.Mul(value, op.Gelu(gate, approximate="none"))

    def check(
        self, context: Any, x: onnx_ir.Value, bias: onnx_ir.Value, value: onnx_ir.Value, gate: onnx_ir.Value
    ) -> MatchResult:
        result = MatchResult()
        split = value.producer()
        if x.shape is None or x.shape.rank() != 3:
            result.fail("the kernel takes [B, T, D]", x)
        elif split is None or split.attributes.get_int("axis", 0) not in (-1, 2):
            result.fail("the kernel splits D", value)
        elif bias.shape is None or bias.shape.rank() != 1 or bias.shape[0] not in GATED_WIDTHS:
            result.fail("there is no kernel of this width", bias)
        return result

    def rewrite(self, op: Any, x: Any, bias: Any, **_: Any) -> Any:
        return op.BiasSplitGelu(x, bias, _domain=DOMAIN)


_gated_gelu = RewriteRuleSet([_GatedGelu.rule()])
