"""Lengths of embedding vectors: the vocabulary's median and mean, and how a recipe changes a word's. Pure tensors."""

from __future__ import annotations

import torch

from oneword.train.recipe import Norm


def vocabulary_norm(table: torch.Tensor) -> float:
    """The median length of the vocabulary's rows [V, D]."""
    return float(torch.linalg.vector_norm(table.float(), dim=-1).median())


def vocabulary_mean_norm(table: torch.Tensor) -> float:
    """The mean length of the vocabulary's rows [V, D] that are not zero."""
    lengths = torch.linalg.vector_norm(table.float(), dim=-1)
    return float(lengths[lengths > 0].mean())


def with_norm(rows: torch.Tensor, norm: Norm, target: float, rate: float) -> torch.Tensor:
    """Returns `rows` [n, D] with lengths left free, set to `target`, or pulled towards it by min(1, 100 x rate).

    The pull is from cloneofsimo's lora (`ti_train`); the target, the vocabulary's median, is from OneTrainer.
    """
    if norm is Norm.FREE:
        return rows
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-8)
    pull = 1.0 if norm is Norm.FIXED else min(1.0, 100 * rate)
    return rows / length * (length + pull * (target - length))
