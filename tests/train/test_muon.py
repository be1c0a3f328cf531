"""Muon: PyTorch's steps in bfloat16, and the Newton-Schulz iteration's effect on singular values in float32."""

from __future__ import annotations

import pytest
import torch

from oneword.train.miniature.muon import Muon, orthogonal

SHAPES = [(6, 20), (20, 6), (8, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.ones(shape) for shape in SHAPES] for _ in range(2))
    muon = Muon(ours, 0.02, 0.01, dtype)
    reference = torch.optim.Muon(theirs, 0.02, 0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = its.grad = torch.randn(mine.shape)
        muon.step()
        reference.step()
    step = (theirs[0] - 1).abs().max()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0 if dtype is torch.bfloat16 else 0.03 * step)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_maps_singular_values_by_its_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    assert values.min() > 0.5
    assert values.max() < 1.3
    torch.testing.assert_close(orthogonal(matrix), u @ values.diag() @ v, atol=1e-4, rtol=0)
