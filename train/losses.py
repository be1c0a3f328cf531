"""The loss of textual inversion: noise schedule, target, weights, penalty. Pure tensors: no models, no files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import DDPMScheduler

from oneword.engines.errors import UsageError
from oneword.train.word import Rows


def noise_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The model's noise schedule, whichever sampler its config was written for."""
    keys = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
        "rescale_betas_zero_snr",
    )  # fmt: skip
    return DDPMScheduler(**{key: config[key] for key in keys if key in config})


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, eps: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict: eps, v (Salimans and Ho 2022) or x0."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return cast(torch.Tensor, scheduler.get_velocity(latents, eps, timesteps))
    if kind == "sample":
        return latents
    raise UsageError(f"the model predicts {kind!r}: use a model that predicts epsilon, v_prediction or sample")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) as the weight of the x0 error (Hang et al., arXiv 2303.09556), for each prediction type [B]."""
    alphas: torch.Tensor = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    clipped = snr.clamp(max=gamma)
    weights = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}
    return weights[scheduler.config.prediction_type]


def distance_to_start(rows: Rows, initial: Rows) -> torch.Tensor:
    """The mean squared distance of a word's rows to its initial rows, summed over text encoders."""
    return torch.stack([(rows[name] - initial[name]).square().sum(-1).mean() for name in rows]).sum()
