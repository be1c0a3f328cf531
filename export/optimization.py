"""Optimizes a traced graph as torch.onnx does, in linear time.

Of onnxscript's rules, SlicesSplit is left out: it compares every node with every other, and took more than half of the
rules' time on the denoising step of a tiny Stable Diffusion, which has none of the adjoining slices that it looks for.
"""

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants, inline
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter.pattern import RewriteRuleSet

ROUNDS = 2
RULES = RewriteRuleSet([rule for rule in _DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"])


def optimize(model: onnx_ir.Model) -> None:
    """Folds constants, simplifies operators, and removes what is unused or repeated, in place."""
    inline(model)
    for _ in range(ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True)
        rewritten = RULES.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten):
            break
    for tidy in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        tidy(model)
