"""Optimizes a traced graph by the rules of torch.onnx; its fusions, which begin with opset 23, are not among them.

Of onnxscript's rules, SlicesSplit is left out: it compares every node with every other, and took more than half of the
rules' time on the denoising step of a tiny Stable Diffusion, which has none of the adjoining slices that it looks for.
"""

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants, inline
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter.pattern import RewriteRuleSet

ROUNDS = 2


def optimize(model: onnx_ir.Model) -> None:
    """Folds constants, simplifies operators, and removes what is unused or repeated, in place."""
    rules = RewriteRuleSet([rule for rule in _DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"])
    inline(model)
    for _ in range(ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True)
        rewritten = rules.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten):
            break
    rules.apply_to_model(_one_node())  # they refer to the last graph that they saw, and so to its weights
    for cleanup in (
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        cleanup(model)


def _one_node() -> onnx_ir.Model:
    """A model that no rule changes."""
    x = onnx_ir.Input("x")
    node = onnx_ir.node("Sin", [x])
    return onnx_ir.Model(onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
