"""How pictures are noised for learning, and what the network should predict: diffusion or flow matching. Pure tensors.

A timestep is a whole number below `len(noising)`. In diffusion it is the schedule's. In flow matching it is a quantile
of the times' distribution, so that evenly drawn timesteps give times distributed as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch

from oneword.engines.errors import UsageError
from oneword.export.families import Exportable
from oneword.export.source import Source
from oneword.runtime.flow import FlowSchedule
from oneword.runtime.schedule import ScheduleKind
from oneword.train.losses import min_snr_weights, noise_scheduler, prediction_target
from oneword.train.recipe import Recipe

QUANTILES = 1000


class Noising(Protocol):
    """Noises latents x_0 [B, C, h, w] with eps of the same shape, at timesteps t [B] i64."""

    def __len__(self) -> int:
        """The number of timesteps."""
        ...

    def times(self, t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """The network's input for t [B]."""
        ...

    def noisy(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t."""
        ...

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should predict for x_t."""
        ...

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """The weights of the errors [B]."""
        ...


class Diffusion:
    """A schedule of betas (arXiv 2006.11239), with min-SNR weights if `min_snr` is not None."""

    def __init__(self, config: Mapping[str, Any], min_snr: float | None) -> None:
        self.scheduler = noise_scheduler(config)
        self.min_snr = min_snr

    def __len__(self) -> int:
        return len(self.scheduler)

    def times(self, t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """The timesteps themselves."""
        return t

    def noisy(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """sqrt(abar) x_0 + sqrt(1 - abar) eps."""
        return cast(torch.Tensor, self.scheduler.add_noise(x_0, eps, t))

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """eps, v or x_0."""
        return prediction_target(self.scheduler, x_0, eps, t)

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Ones, or min-SNR weights."""
        return torch.ones(len(t)) if self.min_snr is None else min_snr_weights(self.scheduler, t, self.min_snr)


class FlowMatching:
    """Straight paths from picture to noise, at logit-normal times (arXiv 2403.03206, sections 2 and 3.1).

    A time is sigma = shift(sigmoid(n)) with n normal, and the shift is the model's own, which may depend on the size.
    The normal quantiles are those in the middle of QUANTILES equal parts, so that all are finite.
    """

    def __init__(self, config: Mapping[str, Any], kind: ScheduleKind, patch: int) -> None:
        self.schedule = FlowSchedule.read(config, kind, image_tokens=0)
        self.patch = patch

    def __len__(self) -> int:
        return QUANTILES

    def sigmas(self, t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """The times [B] float32, from 0 (picture) to 1 (noise)."""
        _, _, h, w = x_0.shape
        schedule = replace(self.schedule, image_tokens=(h // self.patch) * (w // self.patch))
        normal = torch.special.ndtri((t.double() + 0.5) / QUANTILES)
        return torch.from_numpy(schedule.shifted(normal.sigmoid().numpy())).float()

    def times(self, t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """1000 sigma."""
        return 1000 * self.sigmas(t, x_0)

    def noisy(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) x_0 + sigma eps."""
        sigma = self.sigmas(t, x_0)[:, None, None, None]
        return (1 - sigma) * x_0 + sigma * eps

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The direction from picture to noise."""
        return eps - x_0

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Ones."""
        return torch.ones(len(t))


def noising_of(source: Source, family: Exportable, recipe: Recipe) -> Noising:
    """The noising that a model was trained with. Raises `UsageError` for a recipe that does not suit it."""
    if family.schedule is ScheduleKind.BETAS:
        return Diffusion(source.scheduler_config, recipe.min_snr)
    if recipe.min_snr is not None:
        raise UsageError(
            f"min_snr is {recipe.min_snr} and {source.model} is a model of flow matching, whose loss has no weights: "
            "leave min_snr out"
        )
    return FlowMatching(source.scheduler_config, family.schedule, denoise_patch(family))


def denoise_patch(family: Exportable) -> int:
    """The side, in latents, of a token of the family's network."""
    return next(graph.limits["patch"] for graph in family.graphs if graph.name == "denoise_step")
