"""Gradient descent of directions: a row's length is fixed, and a step turns it by an angle. Pure tensors, no state.

Source: directional textual inversion, DTI (arXiv 2512.13672), algorithm 1, with the normalised gradient and no moments.
With e = m v, |v| = 1, m the vocabulary's mean length and mu the unit initial row, a step at the rate lr is

    g = m dL/de - kappa mu,   g = g - <g, v> v,   g = g / |g|,   v = (v - lr g) / |v - lr g|

so the rate is the tangent of the angle of a step, whatever the model's scale. A row with dL/de = 0 is in no prompt of
the batch and does not move: normalised, the prior alone would turn it back by the full angle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

KAPPA = 1e-4
"""The strength of the prior towards the initial row, as in the paper's code for Stable Diffusion."""


def unit(rows: torch.Tensor) -> torch.Tensor:
    """The directions of rows [n, D]."""
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-8)


class DirectionalDescent(torch.optim.Optimizer):
    """Turns rows [n, D]. Each parameter group has its `length`; the rows must have it at the start."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, kappa: float = KAPPA) -> None:
        super().__init__(groups, {"lr": lr, "kappa": kappa})
        for group in self.param_groups:
            group["initial"] = [unit(rows.detach()) for rows in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step. A row whose gradient is zero stays."""
        for group in self.param_groups:
            for rows, initial in zip(group["params"], group["initial"], strict=True):
                if rows.grad is None:
                    continue
                direction = unit(rows)
                in_batch = rows.grad.any(-1, keepdim=True)
                gradient = group["length"] * rows.grad - group["kappa"] * initial
                gradient -= (gradient * direction).sum(-1, keepdim=True) * direction
                gradient /= torch.linalg.vector_norm(gradient, dim=-1, keepdim=True) + 1e-8
                turned = group["length"] * unit(direction - group["lr"] * gradient)
                rows.copy_(torch.where(in_batch, turned, rows))
