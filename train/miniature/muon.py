"""Muon (Jordan et al. 2024) with products in a given type. PyTorch's always uses bfloat16, which a CPU may emulate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: The coefficients of the Newton-Schulz iteration, and how often it runs; PyTorch's too.
_NEWTON_SCHULZ, _STEPS = (3.4445, -4.7750, 2.0315), 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with Nesterov's momentum, decoupled weight decay and updates of AdamW's root mean square.

    `dtype` is the type of the products that orthogonalise a gradient. Where bfloat16 is emulated, float32 is 20 times
    as fast.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Updates the matrices in place from their gradients; `closure` is not called."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, _MOMENTUM).to(self.dtype))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors, whose singular values are roughly 1 (0.7 to 1.2)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
