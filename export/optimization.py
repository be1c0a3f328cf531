"""Optimizes a traced graph by the rules of torch.onnx; its fusions, which begin with opset 23, are not among them.

Of onnxscript's rules, SlicesSplit is left out: it compares every node with every other, and took more than half of the
rules' time on the denoising step of a tiny Stable Diffusion, which has none of the adjoining slices that it looks for.
"""

import copy

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants, inline
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter.pattern import RewriteRuleSet

ROUNDS = 2


def optimize(model: onnx_ir.Model) -> None:
    """Folds constants, simplifies operators, and removes what is unused or repeated, in place."""
    # Copies, because a rule keeps the last node that it looked at, and with it the model and its weights.
    rules = RewriteRuleSet([copy.deepcopy(rule) for rule in _DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"])
    inline(model)
    for _ in range(ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True)
        rewritten = rules.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten):
            break
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
