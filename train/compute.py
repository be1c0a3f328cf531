"""How the frozen network computes: its number type and attention, chosen by the processor and the picture's size."""

from __future__ import annotations

import torch

from oneword.train.recipe import Compute


def compute_dtype(compute: Compute) -> torch.dtype:
    """The torch type of a setting; `AUTO` is bf16 if this processor multiplies it natively, else fp32."""
    if compute is Compute.AUTO:
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return torch.bfloat16 if compute is Compute.BF16 else torch.float32


def has_fast_bf16() -> bool:
    """Whether this processor has bf16 multiplication (AVX512-BF16 or AMX)."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))


def few_positions(dtype: torch.dtype, positions: int) -> bool:
    """Whether attention by plain products and a softmax is faster than PyTorch's fused kernels.

    It is up to 1,024 positions in bf16, whose fused backward pass is ten times slower on a CPU, and up to 256 in fp32.
    """
    return positions <= (1024 if dtype is torch.bfloat16 else 256)
